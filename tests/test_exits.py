"""
Promise 6: torn down exactly once, however the request ends; and
``request_finished`` comes exactly once, in the request's Context, seeing what
the view set there. Every way in which a request can end, against our handler.
"""

import asyncio
import contextvars
import gc
import tempfile
import threading

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import PermissionDenied
from django.core.signals import request_finished, request_started
from django.http import FileResponse, Http404, HttpResponse, StreamingHttpResponse
from django.test import override_settings
from django.urls import path

from scoped import request_scoped
from scoped.asgi import ScopedASGIHandler
from tests.connection import Connection

marker = contextvars.ContextVar("marker", default="unset")
log: list[str] = []
reached: asyncio.Event
release: asyncio.Event


@request_scoped
async def db():
    log.append("set up")
    try:
        yield "db"
    except BaseException as error:
        log.append(type(error).__name__)
        raise
    finally:
        await asyncio.sleep(0)
        log.append("torn down")


async def used(request):
    marker.set("set in the view")
    return HttpResponse(await db())


def sync_view(request):
    marker.set("set in the view")
    return HttpResponse(async_to_sync(db)())


async def in_children(request):
    marker.set("set in the view")
    values = await asyncio.gather(db(), db(), asyncio.create_task(db()))
    return HttpResponse(" ".join(values))


async def raises(request):
    await used(request)
    raise ValueError("the view's")


async def not_found(request):
    await used(request)
    raise Http404


async def forbidden(request):
    await used(request)
    raise PermissionDenied


async def no_content(request):
    await used(request)
    return HttpResponse(status=int(request.GET["status"]))


async def file(request):
    await used(request)
    handle = tempfile.TemporaryFile()  # noqa: SIM115 (the response closes it)
    handle.write(b"x" * 200_000)
    handle.seek(0)
    return FileResponse(handle)


async def hangs(request):
    await used(request)
    reached.set()
    await asyncio.Event().wait()


def sync_hangs(request):
    sync_view(request)

    async def hang():
        reached.set()
        await asyncio.Event().wait()

    async_to_sync(hang)()


def blocks(request):
    """A sync view that no cancellation reaches."""
    sync_view(request)
    loop_reached()
    blocker.wait(5)
    log.append("view ended")
    return HttpResponse("late")


blocker = threading.Event()


def loop_reached():
    async_to_sync(_set_reached)()


async def _set_reached():
    reached.set()


async def swallows(request):
    await used(request)
    reached.set()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return HttpResponse("all the same")


def stream_of(*steps):
    async def view(request):
        async def body():
            marker.set("set in the stream")
            try:
                yield await db()
                for step in steps:
                    if step == "raise":
                        raise KeyError("the stream's")
                    if step == "hang":
                        reached.set()
                        await asyncio.Event().wait()
                    yield step
            finally:
                log.append("stream closed")

        return StreamingHttpResponse(body())

    return view


async def endless(request):
    async def body():
        try:
            await db()
            while True:
                yield b"x"
        finally:
            log.append("stream closed")

    return StreamingHttpResponse(body())


async def fails_in_set_up(request):
    await broken()


@request_scoped
async def broken():
    await db()
    reached.set()
    await asyncio.Event().wait()
    yield


async def slow_teardown(request):
    await lingering()
    return HttpResponse("ok")


@request_scoped
async def lingering():
    await db()
    yield
    reached.set()
    await release.wait()
    log.append("lingered")


urlpatterns = [
    path("used", used),
    path("sync", sync_view),
    path("children", in_children),
    path("raises", raises),
    path("404", not_found),
    path("403", forbidden),
    path("status", no_content),
    path("file", file),
    path("hangs", hangs),
    path("sync-hangs", sync_hangs),
    path("blocks", blocks),
    path("swallows", swallows),
    path("stream", stream_of("a", "b")),
    path("stream-raises", stream_of("a", "raise")),
    path("stream-hangs", stream_of("a", "hang")),
    path("set-up-hangs", fails_in_set_up),
    path("endless", endless),
    path("slow-teardown", slow_teardown),
]


@pytest.fixture(autouse=True)
async def _fresh():
    global reached, release
    reached, release = asyncio.Event(), asyncio.Event()
    blocker.clear()
    log.clear()
    yield
    blocker.set()
    gc.collect()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
def handler():
    with override_settings(ROOT_URLCONF=__name__):
        yield ScopedASGIHandler()


@pytest.fixture
def finished():
    """What an async ``request_finished`` receiver saw, each time that it ran."""
    seen: list[str] = []

    async def receiver(**kwargs):
        seen.append(marker.get())

    request_finished.connect(receiver)
    yield seen
    request_finished.disconnect(receiver)


@pytest.fixture
def early_use():
    """The resource is used before the view: by an async ``request_started`` receiver."""

    async def receiver(**kwargs):
        await db()

    request_started.connect(receiver)
    yield
    request_started.disconnect(receiver)


def torn_down_once(failure: str | None = None):
    """The log, but for what else a test logs."""
    steps = [entry for entry in log if entry in ("set up", "torn down") or entry == failure]
    return steps == ["set up", *([failure] if failure else []), "torn down"]


# It ends well, or fails


# Django's own, of a FileResponse under ASGI.
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators")
@pytest.mark.parametrize(
    ("where", "status", "failure"),
    [
        ("/used", 200, None),
        ("/sync", 200, None),
        ("/children", 200, None),
        ("/raises", 500, "ValueError"),
        ("/404", 404, "Http404"),
        ("/403", 403, "PermissionDenied"),
        ("/file", 200, None),
    ],
)
async def test_a_view_that_returns_or_raises(handler, finished, where, status, failure):
    connection = Connection(handler, where)
    await connection.run()
    assert connection.status == status
    assert connection.complete
    assert torn_down_once(failure), log
    assert finished == ["set in the view"]


@pytest.mark.parametrize("status", ["204", "304"])
async def test_a_response_without_a_body(handler, finished, status):
    connection = Connection(handler, "/status", query_string=b"status=" + status.encode())
    await connection.run()
    assert connection.status == int(status)
    assert torn_down_once()
    assert finished == ["set in the view"]


async def test_head(handler, finished):
    await Connection(handler, "/used", method="HEAD").run()
    assert torn_down_once()
    assert finished == ["set in the view"]


@pytest.mark.usefixtures("early_use")
async def test_an_url_that_leads_nowhere(handler, finished):
    connection = Connection(handler, "/nowhere")
    await connection.run()
    assert connection.status == 404
    assert torn_down_once()
    assert len(finished) == 1


@pytest.mark.usefixtures("early_use")
async def test_a_request_that_is_malformed(handler, finished):
    connection = Connection(handler, "/used", query_string=b"\xff")
    await connection.run()
    assert connection.status == 400
    assert torn_down_once()
    assert len(finished) == 1


@pytest.mark.usefixtures("early_use")
async def test_a_malformed_request_whose_answer_cannot_be_sent(handler, finished):
    async def gone(number, message):
        raise OSError("client gone")

    with pytest.raises(OSError, match="client gone"):
        await Connection(handler, "/used", query_string=b"\xff", before_send=gone).run()
    assert torn_down_once("OSError")
    assert len(finished) == 1


async def test_a_receiver_of_request_started_that_raises(handler, finished):
    async def opens(**kwargs):
        await db()

    async def fails(**kwargs):
        raise ValueError("a receiver's")

    request_started.connect(opens)
    request_started.connect(fails)
    try:
        with pytest.raises(ValueError, match="a receiver's"):
            await Connection(handler, "/used").run()
    finally:
        request_started.disconnect(opens)
        request_started.disconnect(fails)
    assert torn_down_once("ValueError")
    assert len(finished) == 1


# It streams


async def test_a_stream_to_its_end(handler, finished):
    connection = Connection(handler, "/stream")
    await connection.run()
    assert connection.body == b"dbab"
    assert log == ["set up", "stream closed", "torn down"]
    assert finished == ["set in the stream"]


async def test_a_stream_that_raises(handler, finished):
    with pytest.raises(KeyError, match="the stream's"):
        await Connection(handler, "/stream-raises").run()
    assert log == ["set up", "stream closed", "KeyError", "torn down"]
    assert finished == ["set in the stream"]


@pytest.mark.parametrize("failing", range(4))
async def test_send_raises_oserror_at_any_message(handler, finished, failing):
    async def gone(number, message):
        if number == failing:
            raise OSError("client gone")

    connection = Connection(handler, "/stream", before_send=gone)
    with pytest.raises(OSError, match="client gone"):
        await connection.run()
    if failing:  # else nobody has iterated the stream, so nobody has used the resource
        assert log == ["set up", "stream closed", "OSError", "torn down"]
    else:
        assert log == []
    assert len(finished) == 1


async def test_the_client_goes_while_the_stream_hangs(handler, finished):
    connection = Connection(handler, "/stream-hangs")
    task = connection.start()
    await reached.wait()
    connection.disconnect()
    await task
    assert log == ["set up", "stream closed", "CancelledError", "torn down"]
    assert finished == ["set in the stream"]


async def test_the_client_goes_while_a_chunk_is_being_sent(handler, finished):
    async def stuck(number, message):
        if number == 2:
            reached.set()
            await asyncio.Event().wait()

    connection = Connection(handler, "/stream", before_send=stuck)
    task = connection.start()
    await reached.wait()
    connection.disconnect()
    await task
    assert log == ["set up", "stream closed", "CancelledError", "torn down"]
    assert finished == ["set in the stream"]


async def test_the_client_goes_while_a_stream_that_awaits_nothing_runs_on(handler, finished):
    connection = Connection(handler, "/endless")
    task = connection.start()
    while len(connection.sent) < 100:  # gets its turn, though nothing there ever suspends
        await asyncio.sleep(0)
    connection.disconnect()
    await task
    assert log == ["set up", "stream closed", "CancelledError", "torn down"]
    assert len(finished) == 1


async def test_a_stream_that_nobody_iterates(handler, finished):
    async def gone(number, message):
        reached.set()
        await asyncio.Event().wait()

    connection = Connection(handler, "/stream", before_send=gone)
    task = connection.start()
    await reached.wait()
    connection.disconnect()
    await task
    assert log == []
    assert len(finished) == 1


# The client goes, or the server cancels


@pytest.mark.parametrize("where", ["/hangs", "/sync-hangs"])
async def test_the_client_goes_while_the_view_runs(handler, finished, where):
    connection = Connection(handler, where)
    task = connection.start()
    await reached.wait()
    connection.disconnect()
    await task  # a normal return
    assert connection.sent == []
    assert torn_down_once("CancelledError"), log
    assert finished == ["set in the view"] if where == "/hangs" else len(finished) == 1


@pytest.mark.parametrize("where", ["/hangs", "/sync-hangs", "/stream-hangs", "/set-up-hangs"])
async def test_the_server_cancels(handler, finished, where):
    task = Connection(handler, where).start()
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert torn_down_once("CancelledError"), log
    assert len(finished) == 1


async def test_the_server_cancels_during_teardown(handler, finished):
    connection = Connection(handler, "/slow-teardown")
    task = connection.start()
    await reached.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connection.complete
    assert log == ["set up", "lingered", "torn down"]
    assert len(finished) == 1


async def test_the_server_cancels_again_and_again(handler, finished):
    task = Connection(handler, "/hangs").start()
    await reached.wait()
    while not task.done():  # at every await, as an anyio cancel scope does
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
    assert torn_down_once("CancelledError"), log
    assert finished == ["set in the view"]


async def test_the_server_cancels_before_the_request_has_begun(handler, finished):
    connection = Connection(handler, "/used")
    task = connection.start()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log.count("set up") == log.count("torn down")


async def test_a_cancellation_at_any_step_of_a_whole_request(handler):
    """The server cancels after 0, 1, 2, ... turns of the event loop, until the request is over."""
    started: list[str] = []
    ended: list[str] = []

    async def start(**kwargs):
        await asyncio.sleep(0)
        started.append("started")

    async def end(**kwargs):
        await asyncio.sleep(0)
        ended.append("finished")

    request_started.connect(start)
    request_finished.connect(end)
    try:
        for turns in range(1, 500):
            log.clear()
            connection = Connection(handler, "/stream")
            task = connection.start()
            for _ in range(turns):
                await asyncio.sleep(0)
            done = task.done()
            task.cancel()
            await asyncio.wait([task])
            assert log.count("set up") == log.count("torn down") <= 1, (turns, log)
            if done:
                break
        else:
            pytest.fail("the request never ended by itself")
    finally:
        request_started.disconnect(start)
        request_finished.disconnect(end)
    assert turns > 5
    # A cancellation in request_started may come before this receiver, never after its end.
    assert len(started) <= len(ended) <= turns


async def test_a_late_response_after_a_swallowed_cancellation_is_still_sent(handler, finished):
    connection = Connection(handler, "/swallows")
    task = connection.start()
    await reached.wait()
    connection.disconnect()
    await task
    assert connection.body == b"all the same"
    assert torn_down_once()
    assert finished == ["set in the view"]


async def test_a_sync_view_whose_client_has_gone_keeps_its_resources_until_it_ends(
    handler, finished
):
    connection = Connection(handler, "/blocks")
    task = connection.start()
    await reached.wait()
    connection.disconnect()
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert log == ["set up"]
    blocker.set()
    await task
    assert log[:2] == ["set up", "view ended"]
    assert log[-1] == "torn down"
    assert len(finished) == 1


async def test_receive_that_turns_a_cancellation_into_a_disconnect(handler, finished):
    class Server(Connection):
        async def receive(self):
            try:
                return await super().receive()
            except asyncio.CancelledError:
                return {"type": "http.disconnect"}

    connection = Server(handler, "/used")
    await connection.run()
    assert connection.complete
    assert torn_down_once()
    assert finished == ["set in the view"]


async def test_a_disconnect_that_reports_a_complete_response_is_no_failure(handler, finished):
    """As hypercorn does, from inside the last send()."""

    async def complete(number, message):
        if number == 1:
            connection.disconnect()
            for _ in range(10):
                await asyncio.sleep(0)

    connection = Connection(handler, "/used", before_send=complete)
    await connection.run()
    assert torn_down_once()
    assert "CancelledError" not in log


async def test_a_message_after_the_body_is_an_error(handler, finished):
    connection = Connection(handler, "/hangs")
    task = connection.start()
    await reached.wait()
    connection.messages.put_nowait({"type": "http.request"})
    with pytest.raises(AssertionError, match="Invalid ASGI message after request body"):
        await task
    assert torn_down_once("CancelledError"), log
    assert len(finished) == 1


async def test_a_message_that_comes_when_it_has_ended_is_none_of_its_affair(handler, finished):
    class Server(Connection):
        async def receive(self):
            try:
                return await super().receive()
            except asyncio.CancelledError:
                return {"type": "http.request"}

    async def suspends(number, message):
        await asyncio.sleep(0)  # so that it is listened for

    connection = Server(handler, "/used", before_send=suspends)
    await connection.run()
    assert connection.complete
    assert torn_down_once()
    assert finished == ["set in the view"]


async def test_a_receiver_that_is_cancelled_after_the_client_has_gone(handler, finished):
    """The server, which has said so itself, is told of no cancellation that is not its own."""

    async def cancelled(**kwargs):
        raise asyncio.CancelledError

    request_finished.connect(cancelled)
    try:
        connection = Connection(handler, "/hangs")
        task = connection.start()
        await reached.wait()
        connection.disconnect()
        await task
    finally:
        request_finished.disconnect(cancelled)
    assert torn_down_once("CancelledError"), log
    assert len(finished) == 1


def test_sync_code_that_waits_for_a_request_whose_client_goes(handler, finished):
    async def run():
        global reached
        reached = asyncio.Event()
        connection = Connection(handler, "/sync-hangs")
        task = connection.start()
        await reached.wait()
        connection.disconnect()
        await task
        assert connection.sent == []

    async_to_sync(run)()
    assert torn_down_once("CancelledError"), log
    assert finished == ["set in the view"]


async def test_no_signal_when_the_client_goes_while_the_body_is_read(handler, finished):
    connection = Connection(handler, "/used", body=[b"half"])
    connection.messages = asyncio.Queue()
    connection.messages.put_nowait({"type": "http.request", "body": b"half", "more_body": True})
    connection.disconnect()
    await connection.run()
    assert finished == []
    assert connection.sent == []


async def test_the_event_loop_shuts_down_under_an_open_request(handler):
    """``asyncio.run`` cancels every task at once, the child's and the keepers' too."""

    def run():
        async def main():
            global reached
            reached = asyncio.Event()
            connection = Connection(handler, "/sync-hangs")
            connection.start()
            await reached.wait()

        asyncio.run(main())

    await sync_to_async(run, thread_sensitive=False)()
    assert torn_down_once("CancelledError"), log
