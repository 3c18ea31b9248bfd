"""Our handler beside Django's: signals, failures, middleware, isolation, lifespan."""

import asyncio
import contextvars
import dataclasses
import gc
import logging
import threading
import traceback
import weakref
from contextlib import suppress

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished, request_started
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import override_settings
from django.utils.decorators import sync_only_middleware

from scoped import (
    NoScopeError,
    ScopeClosedError,
    TeardownError,
    current_scope,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.asgi import ScopedASGIHandler, get_asgi_application
from scoped.core.current import scope_here
from scoped.serving.exchange import Exchange
from scoped.wsgi import ScopedWSGIHandler
from tests.connection import Connection
from tests.views import Views
from tests.wsgi_server import call

marker = contextvars.ContextVar("marker", default="unset")
log: list[str] = []
view = Views()


@request_scoped
async def db():
    log.append("db set up")
    try:
        yield object()
    except BaseException as error:
        log.append(f"db saw {type(error).__name__}")
        raise
    finally:
        log.append("db torn down")


@lifespan_scoped
async def pool():
    log.append("pool set up")
    yield object()
    log.append("pool torn down")


urlpatterns = view.urlpatterns


@view
async def plain(request):
    await db()
    return HttpResponse("plain")


@pytest.fixture(autouse=True)
def _fresh():
    log.clear()
    with override_settings(ROOT_URLCONF=__name__):
        yield


@pytest.fixture
def connected():
    """Connect a receiver for the length of a test."""
    pairs = []

    def connect(signal, receiver, **kwargs):
        signal.connect(receiver, **kwargs)
        pairs.append((signal, receiver))
        return receiver

    yield connect
    for signal, receiver in pairs:
        signal.disconnect(receiver)


async def get(where, application=None, **kwargs):
    connection = Connection(application or ScopedASGIHandler(), where, **kwargs)
    await connection.run()
    return connection


# Signals


async def test_receivers_run_as_in_django_with_the_handlers_class_as_sender(connected):
    class Handler(ScopedASGIHandler):
        pass

    senders = []

    async def note(sender, signal, **kwargs):
        senders.append((sender, "scope" in kwargs))

    connected(request_started, note)
    connected(request_finished, note)
    await get("/plain", Handler())
    assert senders == [(Handler, True), (Handler, False)]
    assert log == ["db set up", "db torn down"]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_what_listens_to_request_started_finds_the_scope_open(connected, kind):
    found = []

    def finds(**kwargs):
        found.append(current_scope())

    async def finds_async(**kwargs):
        finds()

    @view
    async def compares(request):
        return HttpResponse(str(found == [current_scope()] and found[0].is_open))

    # As the first of all, before any that was connected when Django started.
    connected(request_started, finds if kind == "sync" else finds_async)
    with request_started.lock:
        request_started.receivers.insert(0, request_started.receivers.pop())
    assert (await get("/compares")).body == b"True"


@pytest.mark.parametrize("how", ["the client goes", "a second body comes"])
@pytest.mark.parametrize("kind", ["sync", "async", "both"])
async def test_who_hears_of_a_requests_end_has_heard_of_its_start(connected, kind, how):
    """A client that leaves at once does not cut short what counts the requests under way."""
    heard, view_ran = [], []

    def hears(signal, **kwargs):
        heard.append(("sync", signal is request_started))

    async def hears_async(signal, **kwargs):
        for _ in range(5):
            await asyncio.sleep(0)
        heard.append(("async", signal is request_started))

    kinds = {"sync": [hears], "async": [hears_async], "both": [hears, hears_async]}[kind]
    for signal in (request_started, request_finished):
        for receiver in kinds:
            connected(signal, receiver)

    @view
    async def runs(request):
        view_ran.append(request)
        await asyncio.Event().wait()

    connection = Connection(ScopedASGIHandler(), "/runs")
    if how == "the client goes":
        connection.disconnect()
        await connection.run()
    else:
        connection.messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        with pytest.raises(AssertionError, match="Invalid ASGI message"):
            await connection.run()
    assert sorted(heard) == sorted(
        (name, at_start)
        for name in ("sync", "async")
        if kind in (name, "both")
        for at_start in (True, False)
    )
    assert view_ran == []
    assert connection.sent == []


async def test_the_server_cuts_short_also_what_hears_of_a_requests_start(connected):
    """As under Django."""
    begun = asyncio.Event()

    async def hangs(**kwargs):
        begun.set()
        await asyncio.Event().wait()

    connected(request_started, hangs)
    connection = Connection(ScopedASGIHandler(), "/plain")
    task = connection.start()
    await begun.wait()
    connection.disconnect()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connection.sent == []


@dataclasses.dataclass
class Counts:
    """Has no hash, as dataclasses have none that are compared and not frozen."""

    calls: int = 0

    def __call__(self, **kwargs):
        self.calls += 1


@pytest.mark.parametrize("signal", [request_started, request_finished])
async def test_a_receiver_need_not_be_hashable(connected, signal):
    counts = Counts()
    connected(signal, counts)
    assert (await get("/plain")).status == 200
    assert counts.calls == 1
    await sync_to_async(call)(ScopedWSGIHandler(), "/plain")
    assert counts.calls == 2


async def test_no_timer_of_its_end_keeps_a_request(connected):
    """What has been cancelled stays with the event loop, and its Context with that."""
    held = contextvars.ContextVar("held")
    requests = []

    @view
    async def holds(request):
        held.set(request)
        requests.append(weakref.ref(request))
        return HttpResponse()

    def hears(**kwargs): ...

    connected(request_finished, hears)  # in the request's thread, for so long at the most
    # Before those that come first the event loop forgets what was cancelled.
    first = asyncio.get_running_loop().call_later(1, print)
    for _ in range(5):
        await get("/holds")
    gc.collect()
    assert [request() for request in requests] == [None] * 5
    first.cancel()


async def test_a_receiver_that_is_gone_is_not_kept_by_the_handler(connected):
    handler = ScopedASGIHandler()

    def hears(**kwargs):
        log.append("heard")

    request_finished.connect(hears)
    await get("/plain", handler)
    gone = weakref.ref(hears)
    del hears
    gc.collect()
    assert gone() is None
    await get("/plain", handler)
    assert log.count("heard") == 1


async def test_a_handler_that_makes_itself_as_that_of_static_files_does_serves():
    class Handler(ScopedASGIHandler):
        def __init__(self):
            self.load_middleware(is_async=True)

    assert (await get("/plain", Handler())).body == b"plain"
    assert log == ["db set up", "db torn down"]


async def test_the_scope_closes_after_async_receivers_and_before_sync_ones(connected):
    async def use(**kwargs):
        log.append(f"async receiver, open: {current_scope().is_open}")
        await db()

    def tidy(**kwargs):
        log.append("sync receiver")

    connected(request_finished, use)
    connected(request_finished, tidy)
    await get("/plain")
    assert log == [
        "db set up",
        "async receiver, open: True",
        "db torn down",
        "sync receiver",
    ]


async def test_the_responses_closers_come_before_the_sync_receivers_in_the_requests_thread(
    connected,
):
    @view
    def in_thread(request):
        log.append(f"view {threading.get_ident()}")
        response = HttpResponse()
        response._resource_closers.append(lambda: log.append(f"closer {threading.get_ident()}"))
        return response

    def tidy(**kwargs):
        log.append(f"receiver {threading.get_ident()}")

    connected(request_finished, tidy)
    await get("/sync/in_thread")
    steps, threads = zip(*(entry.split() for entry in log), strict=True)
    assert steps == ("view", "closer", "receiver")
    assert set(threads) != {str(threading.get_ident())}
    assert len(set(threads)) == 1


async def test_a_closer_that_raises_keeps_no_other_from_its_work():
    """Promise 18: nobody is told, as with Django's own ``HttpResponseBase.close()``."""

    @view
    def closers_that_raise(request):
        def fails():
            log.append("one that raises")
            raise OSError("the closer")

        response = HttpResponse()
        response._resource_closers += [fails, lambda: log.append("the next")]
        return response

    assert (await get("/sync/closers_that_raise")).status == 200
    assert log == ["one that raises", "the next"]


@pytest.mark.parametrize("how", ["in a subclass", "on the instance"])
async def test_a_response_that_overrides_close_is_closed_once(connected, how):
    finished = []

    async def note(**kwargs):
        finished.append(marker.get())

    class Response(HttpResponse):
        def close(self):
            log.append("closing")
            super().close()

    @view
    async def closes(request):
        marker.set("view")
        await db()
        if how == "in a subclass":
            return Response()
        response = HttpResponse()
        original = response.close

        def close():
            log.append("closing")
            original()

        response.close = close
        return response

    connected(request_finished, note)
    await get("/closes")
    assert log == ["db set up", "db torn down", "closing"]
    assert finished == ["view"]


# Promise 9: nobody else can stop it


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("first", [True, False])
async def test_another_receiver_that_raises_changes_nothing(connected, kind, first, caplog):
    def fails(**kwargs):
        raise ValueError("a receiver's")

    async def fails_async(**kwargs):
        raise ValueError("a receiver's")

    async def ran(**kwargs):
        log.append("another ran")

    receiver = fails if kind == "sync" else fails_async
    connected(request_finished, receiver)
    connected(request_finished, ran)
    if first:
        with request_finished.lock:
            request_finished.receivers.insert(0, request_finished.receivers.pop(-2))
    with pytest.raises(ValueError, match="a receiver's"):
        await get("/plain")
    assert log == ["db set up", "another ran", "db torn down"]


async def test_a_receiver_that_is_cancelled_changes_nothing(connected):
    async def cancelled(**kwargs):
        raise asyncio.CancelledError

    connected(request_finished, cancelled)
    with pytest.raises(asyncio.CancelledError):
        await get("/plain")
    assert log == ["db set up", "db torn down"]


# Promise 11: the factory sees the failure, even one that a middleware handles


class Handles:
    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        return self.get_response(request)

    def process_exception(self, request, exception):
        return HttpResponse("handled")


@sync_only_middleware
def fails_after(get_response):
    def middleware(request):
        get_response(request)
        raise RuntimeError("the middleware's")

    return middleware


async def test_the_views_exception_is_seen_though_a_middleware_handles_it():
    @view
    async def fails(request):
        await db()
        raise KeyError

    with override_settings(MIDDLEWARE=[f"{__name__}.Handles"]):
        connection = await get("/fails")
    assert connection.body == b"handled"
    assert log == ["db set up", "db saw KeyError", "db torn down"]


async def test_an_exception_of_a_middleware_is_seen():
    with override_settings(MIDDLEWARE=[f"{__name__}.fails_after"]):
        connection = await get("/plain")
    assert connection.status == 500
    assert log == ["db set up", "db saw RuntimeError", "db torn down"]


async def test_a_factory_that_swallows_the_exception_hides_it_from_nobody(caplog):
    @request_scoped
    async def swallows():
        await db()
        try:
            yield
        except KeyError:
            log.append("swallowed")

    @view
    async def fails_above(request):
        await swallows()
        raise KeyError("the view's")

    connection = await get("/fails_above")
    assert connection.status == 500
    assert log == ["db set up", "swallowed", "db saw KeyError", "db torn down"]
    assert "the view's" in caplog.text


async def test_a_teardown_that_fails_is_logged_and_the_response_is_sent(caplog):
    @request_scoped
    async def fragile():
        await db()
        yield
        raise OSError("broken pipe")

    @view
    async def uses_fragile(request):
        await fragile()
        return HttpResponse("sent")

    connection = await get("/uses_fragile")
    assert connection.body == b"sent"
    assert connection.complete
    assert log == ["db set up", "db torn down"]
    [record] = [record for record in caplog.records if record.name == "scoped"]
    assert record.levelno == logging.ERROR
    assert "the request GET /uses_fragile" in record.getMessage()
    assert "broken pipe" in caplog.text
    assert "fragile" in "".join(record.exc_info[1].exceptions[0].__notes__)


# Promise 12: alive to the last byte


async def test_a_stream_uses_what_the_view_set_up_until_its_last_byte():
    @view
    async def streams(request):
        first = await db()

        async def body():
            for _ in range(3):
                assert await db() is first
                log.append("chunk")
                yield b"x"

        return StreamingHttpResponse(body())

    assert (await get("/streams")).body == b"xxx"
    assert log == ["db set up", "chunk", "chunk", "chunk", "db torn down"]


# Promise 13


async def test_a_stream_that_swallows_its_cancellation_ends_when_it_goes_on_to_send():
    @view
    async def stubborn(request):
        async def body():
            await db()
            while True:
                with suppress(asyncio.CancelledError):  # as wait_for() of Python 3.11 may
                    await asyncio.sleep(0.001)
                yield b"x"

        return StreamingHttpResponse(body())

    connection = Connection(ScopedASGIHandler(), "/stubborn")
    task = connection.start()
    while len(connection.sent) < 3:
        await asyncio.sleep(0.001)
    connection.disconnect()
    async with asyncio.timeout(5):
        await task
    assert log == ["db set up", "db saw CancelledError", "db torn down"]


async def test_a_task_that_outlives_its_request_is_told_so():
    late = asyncio.Event()
    outcome = asyncio.get_running_loop().create_future()

    async def straggler():
        await late.wait()
        try:
            await db()
        except Exception as error:
            outcome.set_result(error)

    @view
    async def leaves_a_task(request):
        await db()
        request.session_task = asyncio.create_task(straggler())
        return HttpResponse()

    await get("/leaves_a_task")
    late.set()
    error = await outcome
    assert isinstance(error, ScopeClosedError)
    assert "tests.test_handler.db (" in str(error)
    assert "the request GET /leaves_a_task" in str(error)
    assert log == ["db set up", "db torn down"]


# Promise 15: isolation


async def test_a_request_in_the_context_of_a_scope_has_its_own_and_leaves_that_current():
    async with request_scope() as outer:
        mine = await db()

        @view
        async def compares(request):
            assert current_scope() is not outer
            return HttpResponse(str(await db() is mine))

        # In this very task, as servers do that carry one Context from request to request.
        assert (await get("/compares")).body == b"False"
        assert current_scope() is outer
        assert await db() is mine
    assert log == ["db set up", "db set up", "db torn down", "db torn down"]


async def test_a_request_made_inside_a_request_has_its_own_resources():
    handler = ScopedASGIHandler()

    @view
    async def outer_view(request):
        before = await db()
        inner = await get("/plain", handler)
        assert await db() is before
        return HttpResponse(inner.body)

    assert (await get("/outer_view", handler)).body == b"plain"
    assert log == ["db set up", "db set up", "db torn down", "db torn down"]


async def test_requests_each_begun_in_the_context_of_the_last_make_no_chain():
    """As servers do that pipeline, from inside send(); and somebody keeps the last Context."""
    handler = ScopedASGIHandler()
    scopes, tasks, kept = [], [], []

    @view
    async def notes_its_scope(request):
        scopes.append(weakref.ref(current_scope()))
        return HttpResponse()

    async def begin_the_next(number, message):
        if number == 1 and len(tasks) < 10:
            tasks.append(Connection(handler, path, before_send=begin_the_next).start())
            while len(scopes) < len(tasks):
                await asyncio.sleep(0)
        elif len(tasks) == 10:
            kept.append(contextvars.copy_context())

    path = "/notes_its_scope"
    tasks.append(Connection(handler, path, before_send=begin_the_next).start())
    for task in tasks:  # grows meanwhile
        await task
    tasks.clear()
    del task
    gc.collect()
    assert len(scopes) == 10
    assert sum(scope() is not None for scope in scopes) <= 1  # that of the Context that is kept


async def test_requests_side_by_side_never_share():
    seen = []
    both = asyncio.Barrier(20)

    @view
    async def meets(request):
        seen.append(await db())
        await both.wait()
        assert await db() in seen
        return HttpResponse()

    first, second = ScopedASGIHandler(), ScopedASGIHandler()  # two handlers in one process
    await asyncio.gather(*(get("/meets", handler) for handler in [first, second] * 10))
    assert len(set(map(id, seen))) == 20
    assert log.count("db torn down") == 20


async def test_the_servers_context_stays_clean():
    before = dict(contextvars.copy_context())
    await get("/plain")
    after = dict(contextvars.copy_context())
    assert after == before
    assert scope_here() is None


# Trap 12, 23: threads and sync middleware


@sync_only_middleware
def sync_middleware(get_response):
    def middleware(request):
        async_to_sync(db)()
        return get_response(request)

    return middleware


async def test_sync_middleware_view_and_threads_share_one_scope():
    values = []

    def in_thread():
        values.append(async_to_sync(db)())

    @view
    async def hops(request):
        values.append(await db())
        await sync_to_async(in_thread)()
        await sync_to_async(in_thread, thread_sensitive=False)()
        async with asyncio.TaskGroup() as group:
            async with asyncio.TaskGroup() as nested:
                values.append(await nested.create_task(db()))
            values.append(await group.create_task(db()))
        return HttpResponse()

    with override_settings(MIDDLEWARE=[f"{__name__}.sync_middleware"]):
        assert (await get("/hops")).status == 200
    assert len(values) == 5
    assert len(set(map(id, values))) == 1
    assert log == ["db set up", "db torn down"]


async def test_what_a_child_first_uses_its_parent_and_siblings_see():
    @view
    async def first_use_below(request):
        async def child():
            async with asyncio.TaskGroup() as group:
                return await group.create_task(db())

        first = await asyncio.create_task(child())
        assert await asyncio.create_task(child()) is first
        assert await sync_to_async(async_to_sync(db))() is first
        assert await db() is first
        return HttpResponse()

    assert (await get("/first_use_below")).status == 200
    assert log == ["db set up", "db torn down"]


async def test_a_disconnect_across_a_sync_middleware_does_not_deadlock():
    reached = asyncio.Event()

    @view
    async def hangs(request):
        await db()
        reached.set()
        await asyncio.Event().wait()

    with override_settings(MIDDLEWARE=[f"{__name__}.sync_middleware"]):
        connection = Connection(ScopedASGIHandler(), "/hangs")
        task = connection.start()
        await reached.wait()
        connection.disconnect()
        await asyncio.wait_for(task, 10)
    assert log == ["db set up", "db saw CancelledError", "db torn down"]


# Sync resources


@request_scoped
def tenant():
    log.append(f"tenant set up {threading.get_ident()}")
    yield "tenant"
    log.append(f"tenant torn down {threading.get_ident()}")


async def test_a_sync_generator_is_torn_down_in_the_thread_of_the_sync_view():
    @view
    def uses_tenant(request):
        log.append(f"view {threading.get_ident()}")
        return HttpResponse(tenant())

    assert (await get("/sync/uses_tenant")).body == b"tenant"
    assert [entry.rpartition(" ")[0] for entry in log] == [
        "view",
        "tenant set up",
        "tenant torn down",
    ]
    assert len({entry.split()[-1] for entry in log}) == 1


# Trap 26, promise 16: lifespan


async def lifespan_of(application):
    communicator = ApplicationCommunicator(application, {"type": "lifespan"})
    await communicator.send_input({"type": "lifespan.startup"})
    return communicator, await communicator.receive_output()


async def test_lifespan_resources_are_shared_by_requests_and_torn_down_at_shutdown():
    handler = ScopedASGIHandler()
    seen = []

    @view
    async def uses_pool(request):
        seen.append(await pool())
        return HttpResponse()

    communicator, answer = await lifespan_of(handler)
    assert answer == {"type": "lifespan.startup.complete"}
    await get("/uses_pool", handler)
    await get("/uses_pool", handler)
    assert seen[0] is seen[1]
    assert log == ["pool set up"]
    await communicator.send_input({"type": "lifespan.shutdown"})
    assert await communicator.receive_output() == {"type": "lifespan.shutdown.complete"}
    await communicator.wait()
    assert log == ["pool set up", "pool torn down"]


async def test_two_handlers_in_one_server_share_the_lifespan():
    first, _ = await lifespan_of(ScopedASGIHandler())
    second, _ = await lifespan_of(ScopedASGIHandler())

    @view
    async def pool_of_two(request):
        await pool()
        return HttpResponse()

    await get("/pool_of_two")
    for communicator, expected in [
        (first, ["pool set up"]),
        (second, ["pool set up", "pool torn down"]),
    ]:
        await communicator.send_input({"type": "lifespan.shutdown"})
        await communicator.receive_output()
        await communicator.wait()
        assert log == expected


async def test_mounted_in_another_application_that_keeps_lifespan_to_itself():
    """The pool then lives as long as the event loop, not as long as a request."""
    handler = ScopedASGIHandler()

    async def outer(scope, receive, send):
        await handler({**scope, "root_path": "/mounted"}, receive, send)

    @view
    async def pool_when_mounted(request):
        await pool()
        return HttpResponse()

    await get("/mounted/pool_when_mounted", outer)
    await get("/mounted/pool_when_mounted", outer)
    assert log == ["pool set up"]
    [janitor] = asyncio.all_tasks() - {asyncio.current_task(), *_keepers()}
    janitor.cancel()
    await asyncio.wait([janitor])
    assert log == ["pool set up", "pool torn down"]


def _keepers():
    return {task for task in asyncio.all_tasks() if "Keeper.run" in repr(task.get_coro())}


async def test_a_pool_made_in_a_request_copies_nothing_of_the_requests_context():
    seen = {}

    @lifespan_scoped
    async def background():
        async def worker():
            seen["marker"] = marker.get()
            seen["scope"] = scope_here()

        await asyncio.create_task(worker())
        yield

    @view
    async def opens_background(request):
        marker.set("the request's")
        await background()
        return HttpResponse()

    async with lifespan_scope() as lifespan:
        await get("/opens_background")
        assert seen == {"marker": "unset", "scope": lifespan}


# Without our handler


def test_get_asgi_application_returns_our_handler():
    assert isinstance(get_asgi_application(), ScopedASGIHandler)
    assert issubclass(ScopedASGIHandler, ASGIHandler)


async def test_other_connections_are_refused_as_by_django():
    with pytest.raises(ValueError, match="Django can only handle ASGI/HTTP connections"):
        await ScopedASGIHandler()({"type": "websocket"}, None, None)


async def test_outside_any_scope_the_error_says_what_to_do():
    with pytest.raises(NoScopeError, match=r"async with request_scope\(\)"):
        await db()


async def test_the_record_of_a_teardown_that_failed_shows_no_request(caplog):
    """Whoever collects records, or reports errors with the locals of their frames, gets no more."""

    @request_scoped
    async def fragile():
        yield
        raise OSError("torn")

    @view
    async def uses(request):
        await fragile()
        return HttpResponse()

    assert (await get("/uses")).status == 200
    (record,) = caplog.records
    assert isinstance(record.exc_info[1], TeardownError)
    shown = [
        value
        for frame, _ in traceback.walk_tb(record.exc_info[2])
        for value in frame.f_locals.values()
    ]
    assert not [value for value in shown if isinstance(value, Exchange | HttpRequest)]
