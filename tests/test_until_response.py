"""
Promise 12, second half: what is declared with ``until="response"`` is torn down
after the view and its middleware, before the first byte. If that fails, the client
gets a 500.
"""

import asyncio
import gc
import tempfile
import threading
from types import ModuleType

import asyncpg
import django
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import PermissionDenied
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import got_request_exception, request_finished, request_started
from django.http import FileResponse, Http404, HttpResponse, StreamingHttpResponse
from django.template import engines
from django.template.response import SimpleTemplateResponse
from django.test import AsyncClient, Client, override_settings
from django.utils.decorators import async_only_middleware, sync_only_middleware

from scoped import (
    LifetimeError,
    NoScopeError,
    ScopeClosedError,
    TeardownError,
    current_scope,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.asgi import ScopedASGIHandler
from scoped.core.scope import Scope
from tests.connection import Connection
from tests.slowness import within
from tests.views import Views
from tests.wsgi_server import call

log: list[str] = []
view = Views()
around: list[object] = []  # what the middleware does with the rest
reached: asyncio.Event
release: asyncio.Event


def logs(name):
    """What a generator does around its `yield`."""
    log.append(f"{name} set up")
    return _Logged(name)


class _Logged:
    def __init__(self, name):
        self.name = name

    def __enter__(self):
        return self.name

    def __exit__(self, kind, error, traceback):
        log.append(f"{self.name} saw {kind.__name__}" if kind else f"{self.name} torn down")


@request_scoped
async def db():
    with logs("db") as value:
        yield value


@request_scoped(until="response")
async def transaction():
    await db()
    with logs("transaction"):
        yield "transaction"
        await asyncio.sleep(0)


@request_scoped(until="response")
def tenant():
    with logs("tenant"):
        yield "tenant"


@request_scoped(until="response")
async def broken():
    await transaction()
    yield "broken"
    raise ValueError("deferred")


@request_scoped(until="response")
def broken_sync():
    yield "broken"
    raise KeyError("deferred")


@request_scoped(until="response")
async def lingering():
    with logs("lingering"):
        yield
        reached.set()
        await release.wait()


urlpatterns = view.urlpatterns


@async_only_middleware
def middleware(get_response):
    async def handle(request):
        return await around[0](get_response, request) if around else await get_response(request)

    return handle


@sync_only_middleware
def sync_middleware(get_response):
    def handle(request):
        return around[0](get_response, request) if around else get_response(request)

    return handle


@pytest.fixture(autouse=True)
async def _fresh():
    global reached, release
    reached, release = asyncio.Event(), asyncio.Event()
    log.clear()
    around.clear()
    with override_settings(ROOT_URLCONF=__name__):
        yield
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
def _middleware():
    with override_settings(MIDDLEWARE=[f"{__name__}.middleware"]):
        yield


@pytest.fixture
def _sync_middleware():
    with override_settings(MIDDLEWARE=[f"{__name__}.sync_middleware"]):
        yield


@pytest.fixture
def short_patience(monkeypatch):
    monkeypatch.setattr(
        Scope, "teardown_timeout", 10
    )  # put back at the end, as the handler sets it
    with override_settings(SCOPED={"TEARDOWN_TIMEOUT": 0.02}):
        yield


@pytest.fixture
def connected():
    """Connect a receiver for the length of a test."""
    pairs = []

    def connect(signal, receiver):
        signal.connect(receiver)
        pairs.append((signal, receiver))

    yield connect
    for signal, receiver in pairs:
        signal.disconnect(receiver)


async def sends(number, message):
    log.append(f"sent {message.get('status') or message.get('body', b'').decode()}")


async def get(where, **kwargs):
    connection = Connection(ScopedASGIHandler(), where, **kwargs)
    await connection.run()
    return connection


@view
async def uses(request):
    await transaction()
    return HttpResponse("used")


@view
async def breaks(request):
    await broken()
    return HttpResponse("never")


# When


async def test_it_is_torn_down_before_the_first_byte_and_what_it_uses_after_the_last():
    await get("/uses", before_send=sends)
    assert log == [
        *("db set up", "transaction set up"),
        *("transaction torn down", "sent 200", "sent used", "db torn down"),
    ]


@pytest.mark.usefixtures("_middleware")
async def test_it_is_torn_down_after_the_middleware_which_can_use_it_too():
    async def use(get_response, request):
        assert await transaction() == "transaction"
        response = await get_response(request)
        log.append("middleware")
        assert await transaction() == "transaction"
        return response

    around.append(use)
    await get("/uses")
    assert log[1:4] == ["transaction set up", "middleware", "transaction torn down"]


async def test_it_is_torn_down_after_the_template_is_rendered():
    template = engines["django"].from_string("{{ transaction }}") if engines.all() else None

    class Response(SimpleTemplateResponse):
        @property
        def rendered_content(self):
            log.append("rendered")
            return async_to_sync(transaction)()

    @view
    async def renders(request):
        return Response(template)

    assert (await get("/renders")).body == b"transaction"
    assert log == [
        *("rendered", "db set up", "transaction set up", "transaction torn down", "db torn down"),
    ]


async def test_several_are_torn_down_in_reverse_order_before_all_that_lives_longer():
    @request_scoped
    async def other():
        with logs("other"):
            yield

    @request_scoped(until="response")
    async def outer():
        tenant()
        await transaction()
        await other()
        with logs("outer"):
            yield

    @view
    async def uses_all(request):
        await outer()
        return HttpResponse("ok")

    await get("/uses_all", before_send=sends)
    assert log[:5] == [
        f"{name} set up" for name in ["tenant", "db", "transaction", "other", "outer"]
    ]
    assert log[5:] == [
        *("outer torn down", "transaction torn down", "tenant torn down"),
        *("sent 200", "sent ok", "other torn down", "db torn down"),
    ]


async def test_one_value_for_all_who_use_it_in_a_request_and_another_in_the_next():
    made = []

    @request_scoped(until="response")
    async def value():
        made.append(object())
        return made[-1]

    @view
    async def uses_often(request):
        found = await asyncio.gather(value(), value(), asyncio.create_task(value()))
        assert {*found, await value()} == {made[-1]}
        return HttpResponse()

    await get("/uses_often")
    await get("/uses_often")
    assert len(made) == 2
    assert made[0] is not made[1]


async def test_child_tasks_that_use_it_first_have_it_torn_down_before_the_first_byte():
    tasks = {}

    @request_scoped(until="response")
    async def same_task():
        tasks["set up"] = asyncio.current_task()
        async with asyncio.timeout(5):  # bound to its task
            yield
        tasks["torn down"] = asyncio.current_task()
        log.append("same_task torn down")

    @view
    async def gathers(request):
        await asyncio.gather(same_task(), transaction(), same_task())
        assert tasks["set up"] is not asyncio.current_task()
        return HttpResponse("gathered")

    await get("/gathers", before_send=sends)
    assert tasks["set up"] is tasks["torn down"]
    assert set(log[-5:-3]) == {"same_task torn down", "transaction torn down"}
    assert log[-3:] == ["sent 200", "sent gathered", "db torn down"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("status", [200, 204, 304])
async def test_a_response_without_a_body(method, status):
    @view
    async def empty(request):
        await transaction()
        return HttpResponse(status=status)

    assert (await get("/empty", method=method, before_send=sends)).status == status
    assert log[-4:-1] == ["transaction torn down", f"sent {status}", "sent "]


# Django's own, of a FileResponse under ASGI.
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators")
async def test_a_file():
    @view
    async def file(request):
        await transaction()
        handle = tempfile.TemporaryFile()  # noqa: SIM115 (the response closes it)
        handle.write(b"file")
        handle.seek(0)
        return FileResponse(handle)

    assert (await get("/file", before_send=sends)).body == b"file"
    assert log[2:5] == ["transaction torn down", "sent 200", "sent file"]
    assert log[-1] == "db torn down"


# Streams


async def test_it_is_torn_down_before_a_stream_begins():
    @view
    async def streams(request):
        await transaction()

        async def body():
            log.append("stream begins")
            yield await db()

        return StreamingHttpResponse(body())

    await get("/streams", before_send=sends)
    assert log[2:5] == ["transaction torn down", "sent 200", "stream begins"]
    assert log[-1] == "db torn down"


@pytest.mark.parametrize("used_before", [False, True])
async def test_a_streaming_body_that_asks_for_it_is_told_why_it_cannot_have_it(used_before):
    refused = []

    @view
    async def streams(request):
        if used_before:
            await transaction()

        async def body():
            with pytest.raises(ScopeClosedError) as caught:
                await transaction()
            refused.append(str(caught.value))
            with pytest.raises(ScopeClosedError):
                tenant()
            with pytest.raises(ScopeClosedError):
                transaction.get_nowait()
            yield await db()

        return StreamingHttpResponse(body())

    assert (await get("/streams")).body == b"db"
    [message] = refused
    assert "transaction" in message
    assert "the request GET /streams until its response" in message
    assert "torn down before the first byte" in message
    assert 'without until="response"' in message
    assert log.count("transaction set up") == used_before


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators")
async def test_a_sync_streaming_body_is_told_the_same():
    @view
    async def streams(request):
        tenant()

        def body():
            with pytest.raises(ScopeClosedError, match="before the first byte"):
                tenant()
            yield "streamed"

        return StreamingHttpResponse(body())

    assert (await get("/streams")).body == b"streamed"
    assert log == ["tenant set up", "tenant torn down"]


@pytest.mark.parametrize("closes", ["well", "badly"])
async def test_a_stream_that_is_dropped_for_a_500_is_never_begun_and_closed(closes, caplog):
    class Body:
        def __aiter__(self):
            log.append("iterated")
            return self

        async def __anext__(self):
            raise StopAsyncIteration

        async def aclose(self):
            log.append("stream closed")
            if closes == "badly":
                raise OSError("the file is gone")

    @view
    async def streams(request):
        await broken()
        response = StreamingHttpResponse(Body())
        log.clear()
        return response

    assert (await get("/streams")).status == 500
    assert ("the file is gone" in caplog.text) is (closes == "badly")
    assert (
        [entry for entry in log if "transaction" not in entry and "db" not in entry]
        == [
            "iterated",  # by Django, to have its iterator; but not run
            "stream closed",
        ][log.count("iterated") == 0 :]
    )


# Teardowns that fail


async def test_a_teardown_that_fails_gives_a_500_logged_as_django_logs_a_views_error(
    connected, caplog
):
    requests = []

    def note(request, **kwargs):
        requests.append(request.path)

    connected(got_request_exception, note)
    connection = await get("/breaks")
    assert connection.status == 500
    assert b"never" not in connection.body
    assert connection.complete
    assert requests == ["/breaks"]
    [record] = [record for record in caplog.records if record.name == "django.request"]
    assert record.getMessage() == "Internal Server Error: /breaks"
    error = record.exc_info[1]
    assert isinstance(error, TeardownError)
    assert "broken" in error.exceptions[0].__notes__[0]
    # What was set up before it goes on as if nothing was; what lives longer sees the failure.
    assert log == [
        "db set up",
        "transaction set up",
        "transaction torn down",
        "db saw TeardownError",
    ]


async def test_two_that_fail_are_both_in_the_500s_error(caplog):
    @view
    async def breaks_twice(request):
        broken_sync()
        await broken()
        return HttpResponse("never")

    assert (await get("/breaks_twice")).status == 500
    [record] = [record for record in caplog.records if record.name == "django.request"]
    assert [type(error) for error in record.exc_info[1].exceptions] == [ValueError, KeyError]


async def test_one_that_hangs_gives_a_500(short_patience, caplog):
    @view
    async def hangs(request):
        await transaction()
        await lingering()
        return HttpResponse("never")

    assert (await get("/hangs")).status == 500
    assert "took longer than 0.02 seconds to be torn down" in caplog.text
    assert "lingering saw CancelledError" in log
    assert log[-2:] == ["transaction torn down", "db saw TeardownError"]


@pytest.mark.usefixtures("_middleware")
@pytest.mark.parametrize("fails", [False, True])
async def test_where_sync_code_hangs_the_page_is_made_in_another_thread(short_patience, fails):
    """Promise 21: nothing ends that one."""
    go_on, made_in, left = threading.Event(), [], []

    @request_scoped(until="response")
    def commits():
        yield
        if not fails:
            go_on.wait(within(20))

    async def middleware_fails(get_response, request):
        response = await get_response(request)
        if fails:
            raise ValueError
        return response

    around.append(middleware_fails)

    def receiver(**kwargs):
        made_in.append(threading.current_thread().name)

    @view
    async def hangs(request):
        await sync_to_async(commits)()
        if fails:
            left.append(asyncio.create_task(sync_to_async(go_on.wait)(within(20))))
            await asyncio.sleep(0.01)
        return HttpResponse("never")

    got_request_exception.connect(receiver)
    try:
        assert (await get("/hangs")).status == 500
    finally:
        got_request_exception.disconnect(receiver)
        go_on.set()
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.001)
    assert not made_in[0].startswith("scoped-")


async def test_one_that_hangs_in_a_child_task_gives_a_500(short_patience):
    @view
    async def hangs(request):
        await asyncio.create_task(lingering())
        return HttpResponse("never")

    assert (await get("/hangs")).status == 500
    assert log == ["lingering set up", "lingering saw CancelledError"]


@pytest.mark.parametrize("where", ["/broken_in_child", "/sync/broken_in_sync"])
async def test_one_that_was_used_first_elsewhere_and_fails_gives_a_500(where):
    @view
    async def broken_in_child(request):
        await asyncio.gather(broken(), broken())
        return HttpResponse("never")

    @view
    def broken_in_sync(request):
        async_to_sync(broken)()
        return HttpResponse("never")

    assert (await get(where)).status == 500


async def test_a_task_group_across_the_yield_whose_child_fails_gives_a_500():
    """It cancels the task that waits at the `yield`: there, the teardown must see to it."""
    failing = asyncio.Event()

    async def fail():
        await failing.wait()
        raise ValueError

    @request_scoped(until="response")
    async def group():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
            yield

    @view
    async def uses_group(request):
        await asyncio.create_task(group())
        failing.set()
        for _ in range(5):
            await asyncio.sleep(0)
        return HttpResponse("never")

    assert (await get("/uses_group")).status == 500


async def test_a_timeout_across_the_yield_that_expires_in_the_view_gives_a_500():
    @request_scoped(until="response")
    async def hurried():
        async with asyncio.timeout(0.01):
            yield
            log.append("committed")

    @view
    async def dawdles(request):
        await asyncio.create_task(hurried())
        await asyncio.sleep(0.03)
        return HttpResponse("never")

    assert (await get("/dawdles")).status == 500
    assert log == []


async def test_the_page_with_debug_on_shows_the_line_that_failed():
    with override_settings(DEBUG=True):
        connection = await get("/breaks", headers=[(b"accept", b"text/html")])
    assert connection.status == 500
    assert b"TeardownError" in connection.body
    assert b"raise ValueError(&quot;deferred&quot;)" in connection.body
    assert b"in broken" in connection.body


async def test_exceptions_that_are_to_propagate_do():
    closed = []

    @view
    async def propagates(request):
        await broken()
        response = HttpResponse("never")
        response._resource_closers.append(lambda: closed.append("closed"))
        return response

    with override_settings(DEBUG_PROPAGATE_EXCEPTIONS=True):
        with pytest.raises(TeardownError):
            await get("/propagates")
    assert closed == ["closed"]
    assert log[-1] == "db saw TeardownError"


@pytest.mark.parametrize("fails", [False, True])
async def test_the_closers_of_a_response_run_once_dropped_or_not(fails):
    closed = []

    @view
    async def closes(request):
        if fails:
            await broken()
        response = HttpResponse("ok")
        response._resource_closers.append(lambda: closed.append("closed"))
        request.close = lambda: closed.append("request closed")
        return response

    assert (await get("/closes")).status == (500 if fails else 200)
    assert sorted(closed) == ["closed", "request closed"]


async def test_a_500_that_cannot_be_made_leaves_the_rest_in_order():
    """A project's own handler500 that raises."""
    closed = []

    @view
    async def closes(request):
        await broken()
        response = HttpResponse("never")
        response._resource_closers.append(lambda: closed.append("closed"))
        return response

    def fails(request):
        raise ZeroDivisionError

    urls = ModuleType("urls")
    urls.urlpatterns, urls.handler500 = urlpatterns, fails
    with override_settings(ROOT_URLCONF=urls):
        with pytest.raises(ZeroDivisionError):
            await get("/closes")
    assert closed == ["closed"]
    assert log[-1] == "db saw TeardownError"


# What the factory sees


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, 500), (Http404, 404), (PermissionDenied, 403)]
)
async def test_it_sees_what_the_view_raised(error, status):
    @view
    async def raises(request):
        await transaction()
        raise error

    assert (await get("/raises", before_send=sends)).status == status
    assert log[2:4] == [f"transaction saw {error.__name__}", f"sent {status}"]
    assert log[-1] == f"db saw {error.__name__}"


@pytest.mark.usefixtures("_middleware")
async def test_it_sees_what_middleware_raised_after_the_view():
    async def fails(get_response, request):
        await get_response(request)
        raise ValueError

    around.append(fails)
    assert (await get("/uses")).status == 500
    assert log[2:] == ["transaction saw ValueError", "db saw ValueError"]


@pytest.mark.usefixtures("_middleware")
async def test_it_sees_what_middleware_raised_though_the_app_is_not_installed():
    async def fails(get_response, request):
        await get_response(request)
        raise ValueError

    around.append(fails)
    from scoped.serving import receivers

    connected = got_request_exception.receivers
    got_request_exception.receivers = []
    got_request_exception.sender_receivers_cache.clear()
    try:
        receivers.connect_handler(ScopedASGIHandler)  # as when scoped.asgi is imported
        assert (await get("/uses")).status == 500
    finally:
        got_request_exception.receivers = connected
        got_request_exception.sender_receivers_cache.clear()
    assert log[2:] == ["transaction saw ValueError", "db saw ValueError"]


async def test_it_sees_the_error_of_a_view_that_returns_nothing():
    @view
    async def forgets(request):
        await transaction()

    assert (await get("/forgets")).status == 500
    assert log[2:] == ["transaction saw ValueError", "db saw ValueError"]


@async_only_middleware
def forgives(get_response):
    async def handle(request):
        return await get_response(request)

    handle.process_exception = lambda request, exception: HttpResponse("forgiven")
    return handle


async def test_it_sees_a_views_error_that_middleware_answers_with_a_200():
    @view
    async def raises(request):
        await transaction()
        raise ValueError

    with override_settings(MIDDLEWARE=[f"{__name__}.forgives"]):
        connection = await get("/raises")
    assert connection.status == 200
    assert connection.body == b"forgiven"
    assert log[2:] == ["transaction saw ValueError", "db saw ValueError"]


async def test_one_that_swallows_the_error_hides_it_from_nobody():
    @request_scoped(until="response")
    async def swallows():
        await transaction()
        try:
            yield
        except ValueError:
            log.append("swallowed")

    @view
    async def raises(request):
        await swallows()
        raise ValueError

    assert (await get("/raises")).status == 500
    assert log[2:] == ["swallowed", "transaction saw ValueError", "db saw ValueError"]


async def test_a_rollback_that_fails_turns_even_a_404_into_a_500():
    @request_scoped(until="response")
    async def fails_to_roll_back():
        try:
            yield
        except Http404:
            raise ValueError from None

    @view
    async def not_found(request):
        await fails_to_roll_back()
        raise Http404

    assert (await get("/not_found")).status == 500


# The client goes, or the server cancels


@pytest.mark.parametrize("how", ["client", "server"])
async def test_it_sees_the_cancellation_of_the_view(how):
    @view
    async def hangs(request):
        await transaction()
        reached.set()
        await asyncio.Event().wait()

    connection = Connection(ScopedASGIHandler(), "/hangs")
    await end_early(connection, how)
    assert connection.sent == []
    assert log[2:] == ["transaction saw CancelledError", "db saw CancelledError"]


async def end_early(connection, how):
    task = connection.start()
    await reached.wait()
    if how == "client":
        connection.disconnect()
        await task
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("how", ["client", "server"])
@pytest.mark.parametrize("where", ["view", "child"])
async def test_a_cancellation_while_it_is_torn_down_ends_the_others_and_sends_nothing(how, where):
    closed = []

    @view
    async def waits(request):
        await transaction()
        await (lingering() if where == "view" else asyncio.create_task(lingering()))
        response = HttpResponse("never")
        response._resource_closers.append(lambda: closed.append("closed"))
        return response

    connection = Connection(ScopedASGIHandler(), "/waits")
    if where == "child":  # it ends in its own task, whoever cancels the request
        asyncio.get_running_loop().call_later(0.3, release.set)
    await end_early(connection, how)
    assert connection.sent == []
    assert log[3:] == [
        "lingering saw CancelledError" if where == "view" else "lingering torn down",
        "transaction torn down",
        "db saw CancelledError",
    ]
    assert closed == ["closed"]


async def test_a_cancellation_at_any_step_tears_all_down_once_and_gives_no_false_200():
    @view
    async def steps(request):
        await transaction()
        await asyncio.create_task(lingering())
        return HttpResponse("ok")

    release.set()
    for turns in range(1, 500):
        log.clear()
        connection = Connection(ScopedASGIHandler(), "/steps")
        task = connection.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        done = task.done()
        task.cancel()
        await asyncio.wait([task])
        for name in ("db", "transaction", "lingering"):
            ends = [entry for entry in log if entry.startswith(f"{name} ")]
            assert len(ends) in (0, 2), (turns, log)
        if connection.sent:
            assert "transaction torn down" in log
            assert "lingering torn down" in log
        if done:
            break
    else:
        pytest.fail("the request never ended by itself")
    assert turns > 5


# Sync code


async def test_a_sync_view_uses_async_ones_with_async_to_sync():
    @view
    def in_sync(request):
        assert async_to_sync(transaction)() == async_to_sync(transaction)()
        assert transaction.get_nowait() == "transaction"
        return HttpResponse("sync")

    await get("/sync/in_sync", before_send=sends)
    assert log[1:4] == ["transaction set up", "transaction torn down", "sent 200"]


async def test_a_sync_ones_generator_is_torn_down_in_the_thread_that_set_it_up():
    threads = []

    @request_scoped(until="response")
    def in_thread():
        threads.append(threading.get_ident())
        yield
        threads.append(threading.get_ident())
        log.append("torn down")

    @view
    def in_sync(request):
        in_thread()
        return HttpResponse("sync")

    await get("/sync/in_sync", before_send=sends)
    assert log == ["torn down", "sent 200", "sent sync"]
    assert threads[0] == threads[1] != threading.get_ident()


@pytest.mark.usefixtures("_sync_middleware")
@pytest.mark.parametrize("where", ["/uses", "/sync/uses_in_sync"])
async def test_sync_middleware_around_an_async_or_sync_view(where):
    @view
    def uses_in_sync(request):
        async_to_sync(transaction)()
        return HttpResponse("used")

    def use(get_response, request):
        response = get_response(request)
        assert transaction.get_nowait() == "transaction"
        log.append("middleware")
        return response

    around.append(use)
    await get(where, before_send=sends)
    assert log[1:5] == ["transaction set up", "middleware", "transaction torn down", "sent 200"]


@pytest.mark.usefixtures("_sync_middleware")
async def test_sync_middleware_that_raises():
    def fails(get_response, request):
        get_response(request)
        raise ValueError

    around.append(fails)
    assert (await get("/uses")).status == 500
    assert log[2:] == ["transaction saw ValueError", "db saw ValueError"]


# Who asks too late, too early, or elsewhere


async def test_a_task_that_outlives_the_response_is_told_so():
    later = asyncio.Event()
    strays = []

    @view
    async def leaves(request):
        async def stray():
            await later.wait()
            await transaction()

        strays.append(asyncio.create_task(stray()))
        return HttpResponse()

    await get("/leaves")
    later.set()
    with pytest.raises(ScopeClosedError, match="the request GET /leaves until its response"):
        await strays[0]
    assert log == []


@pytest.mark.parametrize("where", ["/plain", "/uses", "/raises", "/400"])
async def test_receivers_of_request_finished_are_told_that_it_is_over(connected, where):
    refused = []

    async def ask(**kwargs):
        with pytest.raises(ScopeClosedError):
            await transaction()
        refused.append(await db())

    @view
    async def plain(request):
        return HttpResponse()

    @view
    async def raises(request):
        await transaction()
        raise ValueError

    connected(request_finished, ask)
    query = b"\xff" if where == "/400" else b""  # malformed, so it never gets to a view
    await get(where, query_string=query)
    assert refused == ["db"]


async def test_receivers_of_request_finished_find_it_torn_down_when_the_view_was_cancelled(
    connected,
):
    async def ask(**kwargs):
        log.append("receiver")
        with pytest.raises(ScopeClosedError):
            await transaction()

    @view
    async def hangs(request):
        await transaction()
        reached.set()
        await asyncio.Event().wait()

    connected(request_finished, ask)
    await end_early(Connection(ScopedASGIHandler(), "/hangs"), "client")
    assert log[2:4] == ["transaction saw CancelledError", "receiver"]


async def test_a_receiver_of_request_started_may_use_it_and_a_400_ends_it_before_its_first_byte(
    connected,
):
    async def ask(**kwargs):
        await transaction()

    connected(request_started, ask)
    await get("/uses", query_string=b"\xff", before_send=sends)
    assert log[1:4] == ["transaction set up", "transaction torn down", "sent 400"]


async def test_a_teardown_that_fails_after_the_view_was_cancelled_is_logged(caplog):
    @request_scoped(until="response")
    async def fails():
        try:
            yield
        finally:
            raise ValueError("in the rollback")

    @view
    async def hangs(request):
        await db()
        await fails()
        reached.set()
        await asyncio.Event().wait()

    await end_early(Connection(ScopedASGIHandler(), "/hangs"), "client")
    assert "in the rollback" in caplog.text
    assert log[-1] == "db saw CancelledError"


async def test_a_request_scoped_resource_cannot_have_it():
    @request_scoped
    async def longer():
        await transaction()
        yield

    @request_scoped
    def longer_sync():
        tenant()
        yield

    async with request_scope():
        with pytest.raises(LifetimeError) as caught:
            await longer()
        with pytest.raises(LifetimeError):
            await asyncio.create_task(longer())
        with pytest.raises(LifetimeError):
            longer_sync()
    assert "longer" in str(caught.value)
    assert "whose lifetime is the request's" in str(caught.value)
    assert "transaction" in str(caught.value)
    assert "whose lifetime is the response's" in str(caught.value)
    assert log == []


async def test_a_lifespan_scoped_resource_cannot_have_it():
    @lifespan_scoped
    async def longest():
        await transaction()
        yield

    async with lifespan_scope(), request_scope():
        with pytest.raises(LifetimeError, match="the lifespan's"):
            await longest()
    assert log == []


async def test_it_can_have_any_other():
    @lifespan_scoped
    async def pool():
        return "pool"

    @request_scoped(until="response")
    async def mixed():
        return [await pool(), await db(), await transaction(), tenant()]

    async with lifespan_scope(), request_scope():
        assert await mixed() == ["pool", "db", "transaction", "tenant"]


async def test_a_request_inside_a_request_has_a_response_of_its_own():
    @view
    async def outer(request):
        await transaction()
        log.clear()
        inner = await get("/breaks")
        assert inner.status == 500
        assert await transaction() == "transaction"
        log.append("inner ended")
        return HttpResponse("outer")

    assert (await get("/outer")).body == b"outer"
    assert log == [
        *("db set up", "transaction set up", "transaction torn down", "db saw TeardownError"),
        *("inner ended", "transaction torn down", "db torn down"),
    ]


async def test_in_a_block_it_closes_first_at_the_end():
    async with request_scope():
        tenant()
        await db()
        await transaction()
        log.clear()
    assert log == ["transaction torn down", "tenant torn down", "db torn down"]


async def test_in_a_block_it_sees_the_blocks_error_and_reports_its_own():
    with pytest.raises(ValueError, match="the block's"):
        async with request_scope():
            await transaction()
            raise ValueError("the block's")
    assert log[2:] == ["transaction saw ValueError", "db saw ValueError"]
    with pytest.raises(TeardownError) as caught:
        async with request_scope():
            await broken()
    assert [str(error) for error in caught.value.exceptions] == ["deferred"]


def test_in_a_sync_block_too():
    with request_scope():
        tenant()
    assert log == ["tenant set up", "tenant torn down"]


async def test_a_block_in_a_view_has_one_of_its_own():
    @view
    async def blocks(request):
        await transaction()
        async with request_scope():
            await transaction()
        log.append("block ended")
        return HttpResponse()

    await get("/blocks")
    assert log.index("block ended") == 6
    assert log.count("transaction torn down") == 2


REFUSED = r"until=\"response\".*get_asgi_application\(\) of scoped.asgi.*get_wsgi_application\(\)"


def test_under_djangos_own_wsgi_handler_it_is_refused_in_words_that_say_why():
    caught = []

    @view
    def asks(request):
        with pytest.raises(NoScopeError, match=REFUSED) as error:
            tenant()
        caught.append(error.value)
        with pytest.raises(NoScopeError):  # the second time too
            tenant()
        return HttpResponse("asked")

    assert call(WSGIHandler(), "/sync/asks") == ("200 OK", b"asked")
    assert "no request scope is open" not in str(caught[0])
    assert Client().get("/sync/asks").content == b"asked"
    assert log == []


@pytest.mark.only_if(django.VERSION >= (6, 1), reason="no scope at all before")
async def test_under_djangos_own_asgi_handler_it_is_refused_in_words_that_say_why():
    @view
    async def asks(request):
        with pytest.raises(NoScopeError, match=REFUSED):
            await transaction()
        return HttpResponse("asked")

    connection = Connection(ASGIHandler(), "/asks")
    await connection.run()
    assert connection.body == b"asked"
    assert (await AsyncClient().get("/asks")).content == b"asked"
    assert log == []


def test_another_until_is_no_lifetime():
    with pytest.raises(ValueError, match="'response'"):
        request_scoped(until="view")  # type: ignore[call-overload]


async def test_nothing_is_kept_of_it_after_the_end():
    import weakref

    class Value:
        pass

    references = []

    @request_scoped(until="response")
    async def value():
        made = Value()
        references.append(weakref.ref(made))
        yield made

    @view
    async def uses_value(request):
        await value()
        references.append(weakref.ref(request))
        references.append(weakref.ref(current_scope()))
        return HttpResponse()

    gc.disable()  # so that it is no cycle that is kept
    try:
        await get("/uses_value")
        assert [reference() for reference in references] == [None, None, None]
    finally:
        gc.enable()


# A real transaction


@lifespan_scoped
async def pool():
    async with asyncpg.create_pool(*_url, min_size=1, max_size=2) as pool:
        yield pool


_url: list[str] = []


@request_scoped
async def connection():
    async with (await pool()).acquire(timeout=5) as connection:
        yield connection


@request_scoped(until="response")
async def committed():
    """As a project would write it."""
    it = await connection()
    async with it.transaction():
        yield it


@pytest.fixture
async def rows(postgres_url):
    """What is in the table, as another connection sees it. At COMMIT, no two may be the same."""
    _url[:] = [postgres_url]
    other = await asyncpg.connect(postgres_url)
    await other.execute(
        "DROP TABLE IF EXISTS boundary;"
        "CREATE TABLE boundary (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
    )

    async def rows():
        return [row["n"] for row in await other.fetch("SELECT n FROM boundary ORDER BY n")]

    async with lifespan_scope():
        yield rows
    await other.execute("DROP TABLE boundary")
    await other.close()


async def insert(*numbers):
    for number in numbers:
        await (await committed()).execute("INSERT INTO boundary VALUES ($1)", number)


async def test_what_the_client_is_told_is_committed_is(rows):
    seen = []

    async def look(number, message):
        seen.append(await rows())

    @view
    async def inserts(request):
        await insert(1, 2)
        assert await rows() == []
        return HttpResponse("inserted")

    assert (await get("/inserts", before_send=look)).body == b"inserted"
    assert seen == [[1, 2], [1, 2]]


@pytest.mark.parametrize("where", ["/twice", "/twice_in_child", "/sync/twice_in_sync"])
async def test_a_commit_that_fails_gives_the_client_a_500_and_no_row(rows, caplog, where):
    @view
    async def twice(request):
        await insert(1, 1)
        return HttpResponse("inserted")

    @view
    async def twice_in_child(request):
        await asyncio.create_task(insert(1, 1))
        return HttpResponse("inserted")

    @view
    def twice_in_sync(request):
        async_to_sync(insert)(1, 1)
        return HttpResponse("inserted")

    found = await get(where)
    assert found.status == 500
    assert b"inserted" not in found.body
    assert "UniqueViolationError" in caplog.text
    assert await rows() == []
    assert (await pool()).get_idle_size() == (await pool()).get_size()


async def test_a_view_that_raises_404_rolls_back(rows):
    @view
    async def not_found(request):
        await insert(1)
        raise Http404

    assert (await get("/not_found")).status == 404
    assert await rows() == []


async def test_a_client_that_goes_away_in_the_view_rolls_back(rows):
    @view
    async def hangs(request):
        await insert(1)
        reached.set()
        await asyncio.Event().wait()

    await end_early(Connection(ScopedASGIHandler(), "/hangs"), "client")
    assert await rows() == []


@pytest.mark.usefixtures("_middleware")
async def test_middleware_that_raises_rolls_back(rows):
    async def fails(get_response, request):
        await get_response(request)
        raise ValueError

    @view
    async def inserts(request):
        await insert(1)
        return HttpResponse()

    around.append(fails)
    assert (await get("/inserts")).status == 500
    assert await rows() == []


@pytest.mark.parametrize("how", ["client", "server"])
async def test_a_commit_in_flight_when_the_request_is_cancelled_is_done_or_undone(rows, how):
    lock = await asyncpg.connect(_url[0])

    @view
    async def inserts(request):
        await insert(1)
        # Its COMMIT is to wait, for a while.
        await (await committed()).execute(
            "CREATE FUNCTION pg_temp.wait() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_sleep(5); RETURN NULL; END'"
        )
        await (await committed()).execute(
            "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON boundary "
            "INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pg_temp.wait()"
        )
        await insert(2)
        return HttpResponse("never")

    connection = Connection(ScopedASGIHandler(), "/inserts")
    task = connection.start()
    while not await lock.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event='PgSleep'"
    ):
        await asyncio.sleep(0.01)
    if how == "client":
        connection.disconnect()
    else:
        task.cancel()
    await asyncio.wait([task])
    assert connection.sent == []
    assert await rows() == []
    assert (await pool()).get_idle_size() == (await pool()).get_size()
    await lock.close()
