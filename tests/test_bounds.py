"""
Promise 21: every wait has a bound. Nothing between the last byte and the end of the
request waits for ever, and ``request_finished`` comes once, with everything closed,
whatever a response does when it is closed.
"""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from asgiref.sync import SyncToAsync, ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core.signals import request_finished
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.test import override_settings

from scoped import request_scoped
from scoped.asgi import ScopedASGIHandler
from scoped.core.waits import hop, run_without_loop
from scoped.serving.bounds import in_thread, sync_code_ended
from scoped.serving.threads import LentThread
from scoped.testing import AsyncClient, Client
from scoped.wsgi import ScopedWSGIHandler
from tests.connection import Connection
from tests.views import Views
from tests.wsgi_server import call, environ

log: list[str] = []
view = Views()
urlpatterns = view.urlpatterns


@pytest.fixture(autouse=True)
def _fresh():
    log.clear()
    with override_settings(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"]):
        yield


@pytest.fixture
def impatient():
    with override_settings(SCOPED={"TEARDOWN_TIMEOUT": 0.05}):
        yield


@pytest.fixture
def connected():
    receivers = []

    def connect(receiver):
        request_finished.connect(receiver)
        receivers.append(receiver)

    yield connect
    for receiver in receivers:
        request_finished.disconnect(receiver)


@request_scoped
async def db():
    try:
        yield "db"
    finally:
        log.append("torn down")


@request_scoped
def tenant():
    try:
        yield "tenant"
    finally:
        log.append("torn down")


@view
async def plain(request):
    return HttpResponse(await db())


async def hang(name="hung"):
    try:
        await asyncio.Event().wait()
    finally:
        log.append(name)


async def settle():
    """Let every other task run until it waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "scoped"]


# What hangs


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("who", ["client", "server"])
async def test_the_end_of_a_stream_that_hangs(who, caplog):
    sending = asyncio.Event()

    @view
    async def streams(request):
        await db()

        async def body():
            try:
                while True:
                    yield "x"  # suspended here when the request is cancelled
            finally:
                await hang("stream")

        return StreamingHttpResponse(body())

    async def stuck(number, message):
        if number:
            sending.set()
            await asyncio.Event().wait()

    connection = Connection(ScopedASGIHandler(), "/streams", before_send=stuck)
    task = connection.start()
    await sending.wait()
    if who == "client":
        connection.disconnect()
        with pytest.raises(TimeoutError, match="The end of the streaming body of the request GET"):
            await task
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert log == ["stream", "torn down"]
    assert "still runs after 0.05 seconds: cancelling it" in caplog.text


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("swallows", [False, True])
async def test_an_async_receiver_that_hangs(swallows, connected, caplog):
    async def audit(**kwargs):
        try:
            await hang("audit")
        except asyncio.CancelledError:
            if swallows:
                await hang("audit again")
            raise

    async def another(**kwargs):
        log.append("another")

    connected(another)
    connected(audit)
    connection = Connection(ScopedASGIHandler(), "/plain")
    with pytest.raises(TimeoutError, match=r"The receiver .*audit of request_finished took longer"):
        await connection.run()
    assert connection.complete
    assert log == ["audit", *["audit again"] * swallows, "another", "torn down"]


@pytest.mark.usefixtures("impatient")
async def test_the_servers_cancellation_is_raised_when_what_hangs_has_had_its_time(connected):
    reached = asyncio.Event()

    async def audit(**kwargs):
        reached.set()
        await hang("audit")

    connected(audit)
    task = Connection(ScopedASGIHandler(), "/plain").start()
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["audit", "torn down"]


@pytest.fixture
def released():
    """What blocks threads until the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.usefixtures("impatient")
async def test_a_sync_receiver_that_hangs(connected, released):
    def audit(**kwargs):
        log.append("audit")
        released.wait(30)

    connected(audit)
    connection = Connection(ScopedASGIHandler(), "/plain")
    with pytest.raises(TimeoutError, match="A receiver of request_finished"):
        await connection.run()
    assert connection.complete
    assert log == ["torn down", "audit"]


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators")
@pytest.mark.usefixtures("impatient")
async def test_a_file_whose_close_hangs(released):
    class File:
        def __init__(self):
            self.parts = [b"", b"x"]

        def read(self, size):
            return self.parts.pop()

        def close(self):
            released.wait(30)

    @view
    async def file(request):
        await db()
        return FileResponse(File())

    connection = Connection(ScopedASGIHandler(), "/file")
    with pytest.raises(TimeoutError, match=r"the response's close\(\), of the request GET /file"):
        await connection.run()
    assert (connection.body, connection.complete) == (b"x", True)
    assert log == ["torn down"]


@pytest.mark.usefixtures("impatient")
async def test_a_sync_view_that_never_ends_after_its_client_has_gone(connected, released, caplog):
    """And the sync receivers come when the thread is free, if ever."""
    loop, reached, finished = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def audit(**kwargs):
        log.append("audit")
        loop.call_soon_threadsafe(finished.set)

    @view
    def blocks(request):
        async_to_sync(db)()
        loop.call_soon_threadsafe(reached.set)
        released.wait(30)

    connected(audit)
    connection = Connection(ScopedASGIHandler(), "/sync/blocks")
    task = connection.start()
    await reached.wait()
    connection.disconnect()
    await task
    assert log == ["torn down"]
    assert (
        "The sync code of the request GET /sync/blocks, which was cancelled, still runs after 0.05 "
        "seconds, and is waited for no more."
    ) in messages(caplog)
    released.set()
    async with asyncio.timeout(30):
        await finished.wait()
    assert log == ["torn down", "audit"]


@pytest.mark.usefixtures("impatient")
async def test_what_fails_when_nobody_waits_for_it_any_more_is_logged(released, caplog):
    """At work in its thread, or in the queue behind what hangs there."""
    loop, reached = asyncio.get_running_loop(), asyncio.Event()

    def failing(name):
        def close():
            if name == "at work":
                released.wait(30)
            raise OSError(name)

        response = HttpResponse()
        response.close = close
        return response

    @view
    async def closes_badly(request):
        await db()
        return failing("at work")

    @view
    def blocks_too(request):
        loop.call_soon_threadsafe(reached.set)
        released.wait(30)
        return failing("in the queue")

    async def late(name):
        async with asyncio.timeout(30):
            while not any("late: " in line and name in line for line in messages(caplog)):
                await asyncio.sleep(0.001)

    with pytest.raises(TimeoutError, match=r"the response's close\(\)"):
        await Connection(ScopedASGIHandler(), "/closes_badly").run()
    lent = LentThread()
    lent.submit(released.wait, 30)
    await in_thread(lent, failing("in the queue").close, "What is in the queue")
    released.set()
    await late("at work")
    await late("in the queue")
    lent.give_back()


async def test_a_timeout_of_the_work_s_own_is_no_bound_of_ours():
    @view
    async def times_out(request):
        def close():
            raise TimeoutError("the disk did not answer")

        response = HttpResponse()
        response.close = close
        return response

    with pytest.raises(TimeoutError, match="the disk did not answer"):
        await Connection(ScopedASGIHandler(), "/times_out").run()


async def test_cancelled_while_it_waits_for_sync_code_it_waits_on_and_then_says_so(released):
    lent = LentThread()
    running = lent.submit(released.wait, 30)
    waiting = asyncio.create_task(sync_code_ended(lent, "the request"))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    released.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await running
    lent.give_back()


@pytest.mark.parametrize("seconds", [None, 1])
async def test_work_in_a_thread_is_waited_for_though_the_task_that_gave_it_is_cancelled(
    seconds, released
):
    """As all tasks are when an event loop ends: with a bound it then ends at once."""
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    def work():
        loop.call_soon_threadsafe(begun.set)
        released.wait(30)
        log.append("worked")

    before = asyncio.all_tasks()
    hopping = asyncio.create_task(hop(work, seconds=seconds))
    await begun.wait()
    [giver] = asyncio.all_tasks() - before - {hopping}
    for _ in range(2):
        giver.cancel()
        await settle()
    assert not giver.done()
    if seconds is None:
        released.set()
        await hopping
    else:
        with pytest.raises(TimeoutError):
            await hopping
        giver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await giver
        released.set()
        await sync_to_async(lambda: None)()
    assert log == ["worked"]


async def test_a_thread_that_has_ended_does_no_work_and_that_is_said():
    ended = ThreadPoolExecutor(1)
    ended.shutdown()
    context = ThreadSensitiveContext()
    async with context:
        SyncToAsync.context_to_thread_executor[context] = ended
        with pytest.raises(RuntimeError, match="after shutdown"):
            await hop(lambda: log.append("worked"))
    assert log == []


def test_what_is_sync_and_yet_waits_is_a_fault_and_no_hang():
    with pytest.raises(AssertionError, match="suspended"):
        run_without_loop(asyncio.sleep(0))


def test_an_event_loop_ends_though_a_receiver_hangs_in_its_thread(connected, released, impatient):
    def audit(**kwargs):
        released.wait(30)

    async def main():
        with pytest.raises(TimeoutError):
            await Connection(ScopedASGIHandler(), "/plain").run()

    connected(audit)
    began = time.monotonic()
    asyncio.run(main())
    assert not released.is_set()
    assert time.monotonic() - began < 25  # else it has waited for the thread


# A cancellation at every turn


async def test_a_cancellation_at_every_turn_leaves_nothing_behind():
    """As an anyio cancel scope around the handler does while the request ends."""
    reached, go_on, children = asyncio.Event(), asyncio.Event(), []

    @request_scoped
    async def slow():
        try:
            yield
        finally:
            await go_on.wait()

    @view
    async def uses(request):
        await slow()
        children.append(asyncio.current_task())
        reached.set()
        await asyncio.Event().wait()

    task = Connection(ScopedASGIHandler(), "/uses").start()
    await reached.wait()
    for _ in range(500):
        task.cancel()
        await asyncio.sleep(0)
    [child] = children
    assert child is not task
    assert not child.done()
    assert len(child._callbacks) <= 2
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task


# A response's own close()


class Failing(HttpResponse):
    def close(self):
        log.append("own close")
        raise OSError("the disk is full")


class Forgetting(HttpResponse):
    def close(self):
        log.append("own close")  # and not super().close()


class FailingAfterwards(HttpResponse):
    def close(self):
        log.append("own close")
        super().close()
        raise OSError("the disk is full")


def on_the_instance():
    response = HttpResponse()
    response.close = lambda: log.append("own close")
    return response


RESPONSES = {
    "raises": Failing,
    "raises afterwards": FailingAfterwards,
    "calls nobody": Forgetting,
    "on the instance": on_the_instance,
}


@view
async def closes(request):
    await db()
    return prepared(request)


@view
def closes_sync(request):
    tenant()
    return prepared(request)


def prepared(request):
    response = RESPONSES[request.GET["how"]]()
    response._resource_closers.append(lambda: log.append("closer"))
    return response


def quote(how):
    return how.replace(" ", "%20")


async def over_asgi(how):
    query = f"how={quote(how)}".encode()
    connection = Connection(ScopedASGIHandler(), "/closes", query_string=query)
    await connection.run()


async def over_wsgi(how):
    call(ScopedWSGIHandler(), "/sync/closes_sync", QUERY_STRING=f"how={quote(how)}")


async def by_the_async_client(how):
    await AsyncClient().get("/closes", {"how": how})


async def by_the_sync_client(how):
    Client().get("/sync/closes_sync", {"how": how})


CLOSES = {
    "ASGI": over_asgi,
    "WSGI": over_wsgi,
    "AsyncClient": by_the_async_client,
    "Client": by_the_sync_client,
}


@pytest.mark.parametrize("way", CLOSES)
@pytest.mark.parametrize("how", RESPONSES)
async def test_all_is_closed_and_the_signal_comes_once_whatever_its_close_does(way, how, connected):
    def finished(**kwargs):
        log.append("finished")

    connected(finished)
    if how.startswith("raises"):
        with pytest.raises(OSError, match="the disk is full"):
            await CLOSES[way](how)
    else:
        await CLOSES[way](how)
    assert sorted(log) == ["closer", "finished", "own close", "torn down"]


# A response that is served twice


class Own(HttpResponse):
    def close(self):
        log.append("own close")
        super().close()


@pytest.mark.parametrize("kind", [HttpResponse, Own, Forgetting])
async def test_a_response_that_is_served_again_is_served_as_the_first_time(kind, connected):
    """As one that a module holds, or a middleware keeps in a dict."""
    kept = kind("kept")

    def finished(**kwargs):
        log.append("finished")

    @view
    async def health(request):
        await db()
        kept._resource_closers.append(lambda: log.append("closer"))
        return kept

    @view
    def health_sync(request):
        tenant()
        kept._resource_closers.append(lambda: log.append("closer"))
        return kept

    async def asgi():
        connection = Connection(ScopedASGIHandler(), "/health")
        await connection.run()
        return connection.body

    async def wsgi():
        return call(ScopedWSGIHandler(), "/sync/health_sync")[1]

    async def async_client():
        return (await AsyncClient().get("/health")).content

    async def client():
        return Client().get("/sync/health_sync").content

    connected(finished)
    await AsyncClient().head("/health")  # which empties the one that the test gets, not this
    ways = [asgi, wsgi, async_client, client]
    for way in [*ways, *reversed(ways)]:
        log.clear()
        assert await way() == b"kept"
        own = [] if kind is HttpResponse else ["own close"]
        assert sorted(log) == sorted(["closer", "finished", *own, "torn down"])


async def test_what_the_async_client_returns_has_all_that_a_test_looks_at():
    response = await AsyncClient().get("/plain")
    assert type(response) is HttpResponse
    assert (response.status_code, response.content, response.closed) == (200, b"db", True)
    assert response.asgi_request.path == "/plain"
    response.close()
    assert log == ["torn down"]


def test_a_file_that_the_server_sends_in_its_own_way_is_closed_with_its_response(tmp_path):
    """PEP 3333: by the wrapper's ``close()``, which it takes from the file."""
    path = tmp_path / "file"
    path.write_bytes(b"content")

    class Download(FileResponse):
        def close(self):
            log.append("own close")

    @view
    def download(request):
        tenant()
        return Download(path.open("rb"))

    def wrapper(file, size):
        return file

    file = ScopedWSGIHandler()(
        environ("/sync/download", **{"wsgi.file_wrapper": wrapper}), lambda *args: None
    )
    assert file.read() == b"content"
    assert log == []
    file.close()
    assert log == ["own close", "torn down"]
