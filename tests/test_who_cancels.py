"""
Promise 19: who cancels is known. Client and server end the request. What a factory's own
timeout or task group cancels is that factory's failure; a view that middleware cancels
and answers for has failed, and so has a request whose middleware raises.
"""

import asyncio
import logging
import sys
import time

import anyio
import pytest
from asgiref.sync import (
    async_to_sync,
    iscoroutinefunction,
    markcoroutinefunction,
    sync_to_async,
)
from django.core.exceptions import BadRequest, PermissionDenied, SuspiciousOperation
from django.core.signals import got_request_exception
from django.http import Http404, HttpResponse, HttpResponseForbidden, StreamingHttpResponse
from django.test import override_settings
from django.utils.decorators import sync_and_async_middleware

from scoped import (
    TeardownError,
    current_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
    spawn,
)
from scoped.asgi import ScopedASGIHandler
from scoped.core.lifespan import eager
from scoped.testing import AsyncClient, Client
from scoped.wsgi import ScopedWSGIHandler
from tests.connection import Connection
from tests.views import Views
from tests.wsgi_server import call

log: list[str] = []
view = Views()
urlpatterns = view.urlpatterns


@pytest.fixture(autouse=True)
def _fresh():
    log.clear()
    with override_settings(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"]):
        yield


@pytest.fixture
def told():
    """What ``got_request_exception`` tells of, as to an error tracker."""
    errors = []

    def receiver(request, **kwargs):
        errors.append(sys.exc_info()[1])

    got_request_exception.connect(receiver)
    yield errors
    got_request_exception.disconnect(receiver)


async def get(where):
    connection = Connection(ScopedASGIHandler(), where)
    await connection.run()
    return connection


def outcome(name):
    """What a transaction around a `yield` does."""
    return _Outcome(name)


class _Outcome:
    def __init__(self, name):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        log.append(
            f"{self.name} rolled back: {kind.__name__}" if kind else f"{self.name} committed"
        )


@request_scoped
async def plain():
    with outcome("plain"):
        yield


@request_scoped(until="response")
async def transaction():
    with outcome("transaction"):
        yield


@request_scoped
def plain_sync():
    with outcome("plain"):
        yield


@request_scoped(until="response")
def transaction_sync():
    with outcome("transaction"):
        yield


ROLLED_BACK = ["transaction rolled back: {0}", "plain rolled back: {0}"]
COMMITTED = ["transaction committed", "plain committed"]


def rolled_back(error):
    return [line.format(error) for line in ROLLED_BACK]


# A factory's own timeout, or task group


@request_scoped
async def deadline():
    async with asyncio.timeout(0.01):
        yield


@request_scoped
async def anyio_deadline():
    with anyio.fail_after(0.01):  # which cancels again and again, until it is left
        yield


@request_scoped
async def group():
    async with asyncio.TaskGroup() as group:
        yield group


@request_scoped
async def anyio_group():
    async with anyio.create_task_group() as group:
        yield group


async def fails():
    raise ValueError("the child's")


async def use(name):
    """Set up what will cancel this task, which waits for it."""
    if name == "deadline":
        await deadline()
    elif name == "anyio deadline":
        await anyio_deadline()
    elif name == "group":
        (await group()).create_task(fails())
    else:
        (await anyio_group()).start_soon(fails)
    await asyncio.Event().wait()


OWN = pytest.mark.parametrize(
    ("name", "error"),
    [
        ("deadline", TimeoutError),
        ("anyio deadline", TimeoutError),
        ("group", ExceptionGroup),
        ("anyio group", ExceptionGroup),
    ],
)


@OWN
async def test_what_a_factory_cancels_in_the_view_is_its_failure_and_djangos_500(name, error, told):
    @view
    async def cancelled(request):
        await plain()
        await transaction()
        await use(name)

    connection = await get("/cancelled")
    assert (connection.status, connection.complete) == (500, True)
    assert [type(one) for one in told] == [error]
    assert log == rolled_back("CancelledError")


@OWN
async def test_what_a_factory_cancels_in_the_stream_is_the_failure_of_the_stream(name, error):
    @view
    async def streams(request):
        await plain()

        async def body():
            yield "first"
            try:
                await use(name)
            finally:
                log.append("stream closed")

        return StreamingHttpResponse(body())

    connection = Connection(ScopedASGIHandler(), "/streams")
    with pytest.raises(error):
        await connection.run()
    assert (connection.status, connection.body) == (200, b"first")
    assert not connection.complete
    assert log == ["stream closed", "plain rolled back: CancelledError"]


async def test_a_task_that_waited_for_something_cancelled_is_told_of_with_djangos_500(told):
    @view
    async def waits(request):
        await transaction()
        await plain()
        other = asyncio.create_task(asyncio.Event().wait())
        other.cancel()
        await other

    assert (await get("/waits")).status == 500
    [error] = told
    assert "neither by its client nor by the server" in str(error)
    assert isinstance(error.__cause__, asyncio.CancelledError)
    assert log == rolled_back("CancelledError")


def test_so_is_sync_code_that_waits_for_the_request(told):
    """In whose thread what is sync runs then."""

    @view
    async def awaits_what_is_cancelled(request):
        await plain()
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    connection = async_to_sync(get)("/awaits_what_is_cancelled")
    assert connection.status == 500
    assert log == ["plain rolled back: CancelledError"]
    assert len(told) == 1


async def test_under_the_client_the_test_gets_the_error_itself():
    @view
    async def cancelled(request):
        await plain()
        await use("deadline")

    with pytest.raises(TimeoutError):
        await AsyncClient().get("/cancelled")
    assert log == ["plain rolled back: CancelledError"]


async def test_the_page_of_such_a_failure_may_take_as_long_as_any(told):
    """The timeout has been left by then, and cancels nothing more."""

    @view
    async def cancelled(request):
        await anyio_deadline()
        await asyncio.Event().wait()

    for _ in range(3):
        assert (await get("/cancelled")).status == 500
    assert [type(error) for error in told] == [TimeoutError] * 3


async def test_a_timeout_that_fires_in_the_teardown_until_the_response_is_a_500(told):
    @request_scoped(until="response")
    async def slow_commit():
        yield
        await asyncio.Event().wait()

    @view
    async def commits(request):
        await deadline()
        await slow_commit()
        return HttpResponse("never")

    connection = await get("/commits")
    assert connection.status == 500
    assert connection.body != b"never"
    assert [type(error) for error in told] == [TimeoutError]


# The same where nobody serves: in a block, a decorated function, a background task


async def in_a_block(name):
    async with request_scope():
        await plain()
        await use(name)


@request_scope()
async def in_a_function(name):
    await plain()
    await use(name)


@request_scope()
async def in_one_that_waits_at_its_end(name):
    """Where anyio cancels once more."""

    @request_scoped
    async def slow():
        try:
            yield
        finally:
            await asyncio.sleep(0)

    await plain()
    if name.startswith("anyio"):
        await anyio_deadline()
    else:
        await deadline()
    await slow()
    await asyncio.Event().wait()


@OWN
@pytest.mark.parametrize("run", [in_a_block, in_a_function])
async def test_what_a_factory_cancels_leaves_a_scope_as_its_error(run, name, error, caplog):
    """A worker's `except Exception` sees it, and the worker lives: nobody has cancelled that."""
    for _ in range(2):
        with pytest.raises(TeardownError) as caught:
            await run(name)
        assert [type(one) for one in caught.value.exceptions] == [error]
    assert asyncio.current_task().cancelling() == 0
    assert log == ["plain rolled back: CancelledError"] * 2
    assert caplog.records == []


@pytest.mark.parametrize("name", ["deadline", "anyio deadline"])
async def test_so_does_one_that_cancels_what_is_torn_down_meanwhile(name):
    with pytest.raises((TeardownError, RuntimeError)):
        await in_one_that_waits_at_its_end(name)
    assert asyncio.current_task().cancelling() == 0
    assert log == ["plain rolled back: CancelledError"]


async def test_a_sync_block_too():
    @request_scoped
    def bound():
        with anyio.fail_after(0.01):
            yield

    with pytest.raises(TeardownError) as caught:
        with request_scope():
            plain_sync()
            bound()
            await asyncio.Event().wait()
    assert [type(one) for one in caught.value.exceptions] == [TimeoutError]
    assert log == ["plain rolled back: CancelledError"]


@OWN
async def test_what_a_factory_cancels_in_a_background_task_is_logged_as_ever(name, error, caplog):
    async def work():
        await plain()
        await use(name)

    await spawn(work(), name="the mail")
    assert log == ["plain rolled back: CancelledError"]
    [record] = [record for record in caplog.records if record.name == "scoped"]
    assert record.getMessage().startswith("The background task the mail: ")
    assert [type(one) for one in record.exc_info[1].exceptions] == [error]


@request_scoped
async def quiet():
    with anyio.move_on_after(0.01):
        yield


async def cut_off_quietly():
    await plain()
    await quiet()
    await asyncio.Event().wait()


async def test_one_that_says_nothing_of_it_has_it_said(caplog):
    with pytest.raises(RuntimeError, match="the request scope was cut off by one of its") as caught:
        async with request_scope():
            await cut_off_quietly()
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    await spawn(cut_off_quietly(), name="the mail")
    [record] = [record for record in caplog.records if record.name == "scoped"]
    assert "The background task the mail failed: RuntimeError" in record.getMessage()
    assert log == ["plain rolled back: CancelledError"] * 2


@request_scoped
async def fragile():
    try:
        yield
    finally:
        raise OSError("broken")


@pytest.mark.parametrize("own", ["none", "deadline", "anyio deadline"])
@pytest.mark.parametrize("by", ["task", "timeout", "anyio"])
async def test_a_cancellation_from_outside_stays_bare_whatever_a_factory_cancels(own, by, caplog):
    """Or the timeout around the block would not know it for its own."""
    reached = asyncio.Event()

    async def work():
        async with request_scope():
            await fragile()
            if own == "deadline":
                await deadline()
            elif own == "anyio deadline":
                await anyio_deadline()
            reached.set()
            time.sleep(0.02)  # noqa: ASYNC251 (so that both cancel in one turn of the event loop)
            await asyncio.Event().wait()

    if by == "task":
        task = asyncio.create_task(work())
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
    elif by == "timeout":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await work()
    else:
        with anyio.move_on_after(0) as bound:
            await work()
        assert bound.cancelled_caught
    assert asyncio.current_task().cancelling() == 0
    messages = [record.getMessage() for record in caplog.records if record.name == "scoped"]
    assert [message for message in messages if "1 resource(s) of the request scope" in message]


async def test_what_has_awaited_something_cancelled_ends_bare_where_no_teardown_has_more_to_say():
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    with pytest.raises(TeardownError):
        async with request_scope():
            await fragile()
            await future
    with pytest.raises(asyncio.CancelledError):
        async with request_scope():
            await plain()
            await future


@pytest.mark.parametrize("how", ["client", "server"])
async def test_client_and_server_end_the_request_with_no_page(how, told):
    reached = asyncio.Event()

    @view
    async def waits(request):
        await transaction()
        await plain()
        reached.set()
        await asyncio.Event().wait()

    connection = Connection(ScopedASGIHandler(), "/waits")
    task = connection.start()
    await reached.wait()
    if how == "client":
        connection.disconnect()
        await task
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (connection.sent, told) == ([], [])
    assert log == ["transaction rolled back: CancelledError", "plain rolled back: CancelledError"]


def test_an_event_loop_that_ends_cancels_all_tasks_and_makes_no_page(told):
    """The request's own task may hear of it before the server's does."""
    sent, tasks, reached = [], [], None

    @view
    async def waits(request):
        await plain()
        asyncio.get_running_loop().call_soon(reached.set)
        await asyncio.Event().wait()

    async def main():
        nonlocal reached
        reached = asyncio.Event()
        connection = Connection(ScopedASGIHandler(), "/waits")
        sent.append(connection.sent)
        tasks.append(connection.start())
        await reached.wait()

    asyncio.run(main())
    assert tasks[0].cancelled()
    assert (sent, told) == ([[]], [])
    assert log == ["plain rolled back: CancelledError"]


# A view that middleware cancels, and answers for


class Deadline:
    """Has enough of the view, in one way or the other, as soon as that waits."""

    async_capable, sync_capable = True, False

    def __init__(self, get_response):
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request):
        waits.clear()
        loop = asyncio.get_running_loop()
        waiting = asyncio.create_task(waits.wait())
        try:
            if request.GET["by"] == "timeout":
                async with asyncio.timeout(None) as bound:
                    waiting.add_done_callback(lambda _: bound.reschedule(loop.time()))
                    return await self.get_response(request)
            if request.GET["by"] == "wait_for":
                return await asyncio.wait_for(self.get_response(request), 0.02)
            if request.GET["by"] == "anyio":
                with anyio.fail_after(30) as bound:
                    waiting.add_done_callback(
                        lambda _: setattr(bound, "deadline", anyio.current_time())
                    )
                    return await self.get_response(request)
            child = asyncio.create_task(self.get_response(request))
            await waiting
            child.cancel()
            return await child
        except (TimeoutError, asyncio.CancelledError):
            return HttpResponse("too slow", status=504)


waits: asyncio.Event


@pytest.fixture
async def _deadline():
    global waits
    waits = asyncio.Event()
    with override_settings(MIDDLEWARE=[f"{__name__}.Deadline"]):
        yield


@pytest.mark.usefixtures("_deadline")
@pytest.mark.parametrize("by", ["timeout", "wait_for", "anyio", "task"])
async def test_a_view_that_middleware_cancels_and_answers_for_has_failed(by):
    @view
    async def debits(request):
        await plain()
        await transaction()
        waits.set()
        await asyncio.Event().wait()

    connection = Connection(ScopedASGIHandler(), "/debits", query_string=f"by={by}".encode())
    await connection.run()
    assert (connection.status, connection.body) == (504, b"too slow")
    assert log == rolled_back("CancelledError")


@pytest.mark.usefixtures("_deadline")
@pytest.mark.parametrize("by", ["timeout", "anyio", "task"])
async def test_a_sync_view_too_and_what_it_uses_is_torn_down_when_it_has_ended(by):
    loop = asyncio.get_running_loop()

    @view
    def debits(request):
        async_to_sync(plain)()
        async_to_sync(transaction)()
        loop.call_soon_threadsafe(waits.set)
        time.sleep(0.1)  # nothing reaches it
        log.append("view ended")
        return HttpResponse("late")

    connection = Connection(ScopedASGIHandler(), "/sync/debits", query_string=f"by={by}".encode())
    await connection.run()
    assert (connection.status, connection.body) == (504, b"too slow")
    assert log == ["view ended", *rolled_back("CancelledError")]


# What middleware raises, and what it returns


ERRORS = {
    "denied": (PermissionDenied, 403),
    "missing": (Http404, 404),
    "suspicious": (SuspiciousOperation, 400),
    "bad": (BadRequest, 400),
    "broken": (ValueError, 500),
}


def refuse(request, where):
    if what := request.GET.get(where):
        raise ERRORS[what][0]("no")


def write():
    """With both, as an audit does."""
    plain_sync()
    transaction_sync()


@sync_and_async_middleware
def before(get_response):
    if iscoroutinefunction(get_response):

        async def middleware(request):
            if "before" in request.GET:
                await plain()
                await transaction()
            refuse(request, "before")
            return await get_response(request)

    else:

        def middleware(request):
            if "before" in request.GET:
                write()
            refuse(request, "before")
            return get_response(request)

    return middleware


@sync_and_async_middleware
def after(get_response):
    if iscoroutinefunction(get_response):

        async def middleware(request):
            response = await get_response(request)
            refuse(request, "after")
            return HttpResponseForbidden() if "returns" in request.GET else response

    else:

        def middleware(request):
            response = get_response(request)
            refuse(request, "after")
            return HttpResponseForbidden() if "returns" in request.GET else response

    return middleware


class Around:
    async_capable = sync_capable = True

    def __init__(self, get_response):
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request):
        return self.get_response(request)

    def process_view(self, request, view, args, kwargs):
        if "process_view" in request.GET:
            write()
        refuse(request, "process_view")

    def process_template_response(self, request, response):
        refuse(request, "process_template_response")
        return response


class Page(HttpResponse):
    def render(self):
        return self


@view
async def writes(request):
    await plain()
    await transaction()
    return Page()


@view
def writes_sync(request):
    write()
    return Page()


async def over_asgi(query):
    connection = Connection(ScopedASGIHandler(), "/writes", query_string=query.encode())
    await connection.run()
    return connection.status


async def over_wsgi(query):
    status, _ = call(ScopedWSGIHandler(), "/sync/writes_sync", QUERY_STRING=query)
    return int(status.split()[0])


async def by_the_async_client(query):
    client = AsyncClient(raise_request_exception=False)
    return (await client.get(f"/writes?{query}")).status_code


async def by_the_sync_client(query):
    client = Client(raise_request_exception=False)
    return client.get(f"/sync/writes_sync?{query}").status_code


WAYS = {
    "ASGI": over_asgi,
    "WSGI": over_wsgi,
    "AsyncClient": by_the_async_client,
    "Client": by_the_sync_client,
}


@pytest.fixture
def _middleware(caplog):
    caplog.set_level(logging.CRITICAL, "django.request")
    names = ["before", "after", "Around"]
    with override_settings(MIDDLEWARE=[f"{__name__}.{name}" for name in names]):
        yield


@pytest.mark.usefixtures("_middleware")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ERRORS)
@pytest.mark.parametrize("where", ["before", "process_view", "process_template_response", "after"])
async def test_what_middleware_raises_is_a_failure(way, what, where):
    error, status = ERRORS[what]
    assert await WAYS[way](f"{where}={what}") == status
    assert sorted(log) == sorted(rolled_back(error.__name__))


@pytest.mark.usefixtures("_middleware")
@pytest.mark.parametrize("way", WAYS)
async def test_what_middleware_returns_commits_be_it_a_403(way):
    assert await WAYS[way]("returns=1") == 403
    assert log == COMMITTED


async def test_where_nothing_was_raised_the_signal_that_something_was_tells_of_no_failure():
    """Some send it by hand, to have an error tracker told."""

    @view
    async def tells(request):
        await plain()
        got_request_exception.send(sender=None, request=request)
        return HttpResponse("fine")

    assert (await get("/tells")).status == 200
    assert log == ["plain committed"]


@pytest.mark.usefixtures("_middleware")
async def test_a_failure_that_is_noted_first_counts():
    """As where a framework makes a response of it, and the middleware raises after that."""

    @view
    async def notes(request):
        await transaction()
        current_scope().note_failure(KeyError())
        return HttpResponse()

    connection = Connection(ScopedASGIHandler(), "/notes", query_string=b"after=denied")
    await connection.run()
    assert connection.status == 403
    assert log == ["transaction rolled back: KeyError"]


# Nobody


@pytest.mark.parametrize("where", ["view", "thread"])
async def test_a_teardown_of_sync_code_that_nobody_has_cancelled_is_told_of(where, caplog):
    async def close():
        connecting = asyncio.get_running_loop().create_future()
        connecting.cancel()
        await connecting

    @request_scoped
    def client():
        yield
        if where == "thread":
            async_to_sync(close)()
        raise asyncio.CancelledError

    @view
    async def uses(request):
        await plain()
        await sync_to_async(client)() if where == "thread" else client()
        return HttpResponse()

    assert (await get("/uses")).status == 200
    assert log == ["plain committed"]
    [record] = caplog.records
    [error] = record.exc_info[1].exceptions
    assert isinstance(error.__cause__, asyncio.CancelledError)
    assert any("client" in note for note in error.__notes__)


@pytest.mark.parametrize("by_server", [True, False])
async def test_a_start_up_that_nobody_has_cancelled_has_failed(by_server, caplog):
    """Promise 16: a server takes an application that ends here for one without a lifespan."""
    sent, reached = [], asyncio.Event()

    @lifespan_scoped(eager=True)
    async def pool():
        connecting = asyncio.get_running_loop().create_future()
        reached.set()
        if not by_server:
            connecting.cancel()
        await connecting

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        sent.append(message["type"])

    server = asyncio.create_task(ScopedASGIHandler()({"type": "lifespan"}, receive, send))
    try:
        await reached.wait()
        if by_server:
            server.cancel()
        await asyncio.wait([server])
    finally:
        eager.remove(pool)
    assert server.cancelled() is by_server
    assert sent == ([] if by_server else ["lifespan.startup.failed"])
