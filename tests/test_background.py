"""``spawn()``: a background task with a request scope of its own, drained at shutdown."""

import asyncio
import contextvars
import gc
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import PermissionDenied
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import override_settings
from django.utils.decorators import async_only_middleware

from scoped import (
    current_scope,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
    spawn,
)
from scoped.asgi import ScopedASGIHandler
from scoped.core.scope import Scope
from scoped.serving.threads import LentThread
from scoped.testing import AsyncClient, assert_no_leaks
from scoped.wsgi import ScopedWSGIHandler
from tests.connection import Connection
from tests.views import Views
from tests.wsgi_server import call

log: list[str] = []
marker: contextvars.ContextVar[str] = contextvars.ContextVar("marker", default="unset")
view = Views()
urlpatterns = view.urlpatterns


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    log.clear()
    with override_settings(ROOT_URLCONF=__name__):
        yield


async def get(where: str) -> None:
    connection = Connection(ScopedASGIHandler(), where)
    await connection.run()
    assert connection.status == 200


@lifespan_scoped
async def pool() -> AsyncIterator[str]:
    log.append("+pool")
    yield "pool"
    log.append("-pool")


@request_scoped
async def db() -> AsyncIterator[object]:
    await pool()
    log.append("+db")
    try:
        yield object()
    except BaseException as error:
        log.append(f"db saw {type(error).__name__}")
        raise
    finally:
        log.append("-db")


async def test_one_that_a_lifespans_factory_starts_is_waited_for_as_any_other() -> None:
    go_on = asyncio.Event()

    async def work() -> None:
        await go_on.wait()
        log.append("work")

    @lifespan_scoped
    async def worker() -> AsyncIterator[None]:
        async with request_scope():
            spawn(work())
        spawn(work())
        yield
        log.append("-worker")

    async with lifespan_scope():
        await worker()
        asyncio.get_running_loop().call_later(0.01, go_on.set)
    assert log == ["work", "work", "-worker"]


async def test_it_outlives_the_request_with_a_scope_of_its_own() -> None:
    go_on = asyncio.Event()
    seen = {}

    async def work() -> None:
        await go_on.wait()
        seen["background"] = await db()
        seen["name"] = str(current_scope())
        seen["marker"] = marker.get()

    @view
    async def spawns(request: HttpRequest) -> HttpResponse:
        marker.set("the request's")
        seen["request"] = await db()
        seen["task"] = spawn(work(), name="the mail")
        return HttpResponse()

    async with lifespan_scope():
        await get("/spawns")
        assert log == ["+pool", "+db", "-db"]
        go_on.set()
        await seen["task"]
        assert log == ["+pool", "+db", "-db", "+db", "-db"]
    assert seen["background"] is not seen["request"]
    assert seen["name"] == "the background task the mail"
    assert seen["marker"] == "the request's"


async def test_a_failure_is_logged_with_its_name_and_seen_by_factories(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        await db()
        raise ValueError("no mail")

    async with request_scope():
        await spawn(work(), name="the mail")
    assert "db saw ValueError" in log
    [record] = [record for record in caplog.records if record.name == "scoped"]
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "The background task the mail failed: ValueError('no mail')"
    assert record.exc_info is not None


async def test_a_teardown_that_fails_is_logged_with_its_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @request_scoped
    async def fragile() -> AsyncIterator[None]:
        yield
        raise OSError("broken")

    async def send_mail() -> None:
        await fragile()

    await spawn(send_mail())
    [record] = [record for record in caplog.records if record.name == "scoped"]
    assert "send_mail" in record.getMessage()
    assert "failed while they were torn down" in record.getMessage()


async def test_shutdown_waits_for_it() -> None:
    async def work() -> None:
        await db()
        await asyncio.sleep(0.05)
        log.append("worked")

    async with lifespan_scope():
        spawn(work())
    assert log == ["+pool", "+db", "worked", "-db", "-pool"]


async def test_shutdown_waits_for_one_that_has_not_begun() -> None:
    async def work() -> None:
        log.append("worked")

    async with lifespan_scope():
        spawn(work())
    assert log == ["worked"]


async def test_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Scope, "shutdown_timeout", 0.05)

    async def work() -> None:
        await db()
        await asyncio.sleep(30)

    async with lifespan_scope():
        task = spawn(work(), name="the endless one")
    assert task.cancelled()
    assert log == ["+pool", "+db", "db saw CancelledError", "-db", "-pool"]
    assert "the background task the endless one" in caplog.text


async def test_cancelled_before_its_first_step_it_leaves_nothing() -> None:
    async def work() -> None:
        log.append("never")

    with assert_no_leaks():
        async with lifespan_scope():
            task = spawn(work())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        gc.collect()
    assert log == []


async def test_its_sync_code_has_a_thread_of_its_own() -> None:
    threads = {}
    go_on = asyncio.Event()

    async def work() -> None:
        await go_on.wait()
        threads["background"] = await sync_to_async(threading.get_ident)()
        threads["again"] = await sync_to_async(threading.get_ident)()

    @view
    async def uses_a_thread(request: HttpRequest) -> HttpResponse:
        threads["request"] = await sync_to_async(threading.get_ident)()
        threads["task"] = spawn(work())
        go_on.set()
        while "again" not in threads:
            await asyncio.sleep(0.001)
        return HttpResponse()

    await get("/uses_a_thread")
    await threads["task"]
    assert threads["background"] == threads["again"] != threads["request"]


async def test_it_can_be_spawned_by_a_sync_view() -> None:
    tasks = []

    async def work() -> None:
        await db()
        assert await sync_to_async(threading.get_ident)()

    async def start() -> None:
        tasks.append(spawn(work()))

    @view
    def sync_view(request: HttpRequest) -> HttpResponse:
        async_to_sync(start)()
        return HttpResponse()

    async with lifespan_scope():
        await get("/sync/sync_view")
        await tasks[0]
    assert log == ["+pool", "+db", "-db", "-pool"]


def test_without_an_event_loop_it_says_so() -> None:
    async def work() -> None: ...

    with pytest.raises(RuntimeError, match=r"work where no event loop runs"):
        spawn(work())


@pytest.mark.parametrize("handler", [WSGIHandler, ScopedWSGIHandler])
@pytest.mark.parametrize("where", ["/spawns", "/sync/spawns_through_asgiref"])
def test_nor_in_one_that_ends_with_the_view(handler: Any, where: str) -> None:
    """Promise 26: under WSGI it would be cancelled, and nobody would hear of it."""

    async def work() -> None: ...

    async def start() -> None:
        with pytest.raises(RuntimeError, match="ends with the view"):
            spawn(work())
        log.append("refused")

    @view
    async def spawns(request: HttpRequest) -> HttpResponse:
        await start()
        return HttpResponse()

    @view
    def spawns_through_asgiref(request: HttpRequest) -> HttpResponse:
        async_to_sync(start)()
        return HttpResponse()

    assert call(handler(), where)[0] == "200 OK"
    assert log == ["refused"]


async def test_a_scope_that_sync_code_opens_in_a_request_changes_nothing() -> None:
    async def work() -> None:
        log.append("work")

    async def start() -> None:
        spawn(work())

    @request_scope()
    def service() -> None:
        async_to_sync(start)()

    @view
    def serves(request: HttpRequest) -> HttpResponse:
        service()
        return HttpResponse()

    async with lifespan_scope():
        await get("/sync/serves")
    assert log == ["work"]


@pytest.mark.parametrize("is_in_scope", [True, False])
def test_cut_off_with_the_event_loop_of_sync_code_it_is_told_of(
    is_in_scope: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 26."""

    async def work() -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        async with request_scope() if is_in_scope else nullcontext():
            spawn(work(), name="the mail")
            await asyncio.sleep(0)
            spawn(work(), name="another").cancel()  # by somebody who knows
            await asyncio.sleep(0.01)

    async_to_sync(main)()
    [record] = caplog.records
    assert "The background task the mail was cut off" in record.message


def test_its_sync_code_runs_in_the_thread_of_sync_code_that_waits_for_its_event_loop() -> None:
    """As a TestCase's: there is the connection with the test's transaction."""
    threads = []

    async def work() -> None:
        threads.append(await sync_to_async(threading.get_ident)())

    @view
    async def spawns(request: HttpRequest) -> HttpResponse:
        spawn(work())
        return HttpResponse()

    async def test() -> None:
        async with AsyncClient() as client:
            await client.get("/spawns")
            await spawn(work())

    async_to_sync(test)()
    assert threads == [threading.get_ident()] * 2


def test_what_waits_for_it_in_the_event_loop_of_sync_code_has_it() -> None:
    async def work() -> None:
        await asyncio.sleep(0.001)
        log.append("work")

    async def main() -> None:
        await spawn(work())
        async with lifespan_scope():
            spawn(work())

    with request_scope():
        async_to_sync(main)()
    assert log == ["work", "work"]


async def test_cancelled_by_nobody_it_has_failed_and_so_may_its_teardown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @request_scoped
    async def broken() -> AsyncIterator[None]:
        try:
            yield
        finally:
            raise ValueError("broken")

    async def work() -> None:
        await broken()
        raise asyncio.CancelledError

    await spawn(work())
    assert ["torn down" in record.message for record in caplog.records] == [True, False]
    assert "nobody has cancelled" in caplog.records[1].message


def test_in_an_event_loop_of_ones_own_it_runs_whatever_is_around_that() -> None:
    async def work() -> None:
        log.append("work")

    async def main() -> None:
        await spawn(work())

    with request_scope():
        asyncio.run(main())
    assert log == ["work"]


@pytest.mark.parametrize("is_cut_off", [True, False])
async def test_who_is_given_a_coroutine_that_is_somebody_elses_leaves_it_alone(
    caplog: pytest.LogCaptureFixture, is_cut_off: bool
) -> None:
    async def work() -> None:
        await asyncio.sleep(0.01)
        log.append("work")

    coroutine = work()
    first = spawn(coroutine)
    await asyncio.sleep(0)
    second = spawn(coroutine)
    if is_cut_off:
        second.cancel()
    await asyncio.wait([first, second])
    assert log == ["work"]
    assert not first.cancelled()
    assert ("being awaited already" in caplog.text) is not is_cut_off


async def test_cancelled_by_nobody_it_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    """Promise 26: it has awaited something that was cancelled, say."""

    async def work() -> None:
        connecting = asyncio.get_running_loop().create_future()
        connecting.cancel()
        await connecting

    await spawn(work(), name="the mail")
    [record] = caplog.records
    assert "The background task the mail failed" in record.message
    assert "nobody has cancelled" in record.message
    assert record.exc_info
    assert isinstance(record.exc_info[1].__cause__, asyncio.CancelledError)  # type: ignore[union-attr]


async def test_it_keeps_nothing_of_the_request_but_its_context() -> None:
    class Held: ...

    @request_scoped
    async def held() -> Held:
        return Held()

    go_on = asyncio.Event()

    async with request_scope():
        await held()
        task = spawn(go_on.wait())  # type: ignore[arg-type]
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Held]
    go_on.set()
    await task


# Promise 26: what it cannot do it says at once


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (pool, "pool"),
        ("mail", "'mail'"),
        (None, "None"),
        (lambda: None, "<lambda>"),
        ((each for each in "mail"), "<genexpr>"),
    ],
)
async def test_what_is_no_coroutine_is_refused_at_once(given: Any, named: str) -> None:
    with pytest.raises(TypeError, match=f"takes a coroutine, and was given .*{named}.* Call the"):
        spawn(given)


async def test_a_future_is_no_coroutine() -> None:
    future = asyncio.get_running_loop().create_future()
    with pytest.raises(TypeError, match="of type Future"):
        spawn(future)  # type: ignore[arg-type]


async def test_an_after_that_it_does_not_know_is_refused() -> None:
    async def work() -> None: ...

    with pytest.raises(
        ValueError, match=r'knows after="response" alone, and was given after=.commit'
    ):
        spawn(work(), after="commit")  # type: ignore[arg-type]


# Its sync code


@pytest.mark.parametrize("times", [1, 2])
async def test_it_is_not_torn_down_under_its_sync_code_however_often_it_is_cancelled(
    times: int, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    loop, reached = asyncio.get_running_loop(), asyncio.Event()

    @request_scoped
    async def marked() -> AsyncIterator[None]:
        task, token = asyncio.current_task(), marker.set("set by the factory")
        await db()
        try:
            yield
        finally:
            marker.reset(token)  # ValueError in another Context
            assert asyncio.current_task() is task

    def sync_work() -> None:
        loop.call_soon_threadsafe(reached.set)
        go_on.wait(30)
        log.append("sync code ended")

    async def work() -> None:
        await marked()
        await sync_to_async(sync_work)()

    async with lifespan_scope():
        task = spawn(work())
        await reached.wait()
        for _ in range(times):
            task.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
        assert log == ["+pool", "+db"]
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not caplog.records
    assert log == ["+pool", "+db", "sync code ended", "db saw CancelledError", "-db", "-pool"]


async def test_cancelled_when_its_work_is_done_it_still_waits_for_its_sync_code() -> None:
    """Promises 8 and 11: a child of it is at work there, and factories see the cancellation."""
    go_on = threading.Event()
    loop, reached = asyncio.get_running_loop(), asyncio.Event()
    children: list[asyncio.Future[None]] = []

    def sync_work() -> None:
        loop.call_soon_threadsafe(reached.set)
        go_on.wait(30)
        log.append("sync code ended")

    async def work() -> None:
        await db()
        children.append(asyncio.create_task(sync_to_async(sync_work)()))
        await reached.wait()
        log.append("work done")

    async with lifespan_scope():
        task = spawn(work())
        while "work done" not in log:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert log == ["+pool", "+db", "work done"]
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await children[0]
    assert log == [
        "+pool",
        "+db",
        "work done",
        "sync code ended",
        "db saw CancelledError",
        "-db",
        "-pool",
    ]


async def test_one_cancelled_before_its_first_step_ends_an_implied_lifespan_in_a_thread() -> None:
    """Its closing has a thread for sync code of its own: the spawner's may have ended."""

    @lifespan_scoped
    def connection() -> Iterator[None]:
        log.append("+connection")
        yield
        log.append("-connection")

    with LentThread():  # as in a request
        async with request_scope():
            await sync_to_async(connection)()

            async def work() -> None:
                log.append("never")

            task = spawn(work())
            task.cancel()
    async with asyncio.timeout(30):
        while "-connection" not in log:
            await asyncio.sleep(0.001)
    assert log == ["+connection", "-connection"]


# Given up at shutdown, and shielded


@pytest.mark.parametrize("when", ["at work", "before its first step", "before the response"])
async def test_shutdown_gives_it_up_wherever_it_is(when: str) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def work() -> None:
        reached.set()
        await asyncio.Event().wait()

    @view
    async def spawns(request: HttpRequest) -> HttpResponse:
        tasks.append(spawn(work(), after="response" if when == "before the response" else None))
        if when == "at work":
            await reached.wait()
        if when == "before the response":
            await go_on.wait()
        return HttpResponse()

    with override_settings(SCOPED={"SHUTDOWN_TIMEOUT": 0.02}):
        handler = ScopedASGIHandler()
        async with lifespan_scope():
            request = Connection(handler, "/spawns").start()
            while not tasks:
                await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await asyncio.wait(tasks)
    assert tasks[0].cancelled()
    go_on.set()
    await request


async def test_shielded_it_survives_who_waits_for_it() -> None:
    """As docs/background.md says."""
    reached, go_on = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def work() -> None:
        await go_on.wait()
        log.append("worked")

    @view
    async def waits(request: HttpRequest) -> HttpResponse:
        tasks.append(task := spawn(work()))
        reached.set()
        await asyncio.shield(task)
        return HttpResponse()

    connection = Connection(ScopedASGIHandler(), "/waits")
    request = connection.start()
    await reached.wait()
    connection.disconnect()
    await request
    go_on.set()
    await tasks[0]
    assert log == ["worked"]


# After the response


@request_scoped(until="response")
async def transaction() -> AsyncIterator[None]:
    yield
    await asyncio.sleep(0)  # a COMMIT's way to the server and back
    log.append("commit")


async def work_after() -> None:
    log.append("worked")


spawned: list[asyncio.Task[None]] = []


@pytest.fixture(autouse=True)
def _none_spawned() -> Iterator[None]:
    yield
    spawned.clear()


def after() -> None:
    spawned.append(spawn(work_after(), after="response", name="the mail"))


@pytest.mark.parametrize("from_where", ["view", "child task", "sync view", "middleware"])
async def test_after_the_response_it_begins_when_the_commit_is_done(from_where: str) -> None:
    async def start() -> None:
        after()

    @view
    async def commits(request: HttpRequest) -> HttpResponse:
        await transaction()
        if from_where == "view":
            after()
        elif from_where == "child task":
            await asyncio.create_task(start())
        for _ in range(5):
            await asyncio.sleep(0)
        log.append("view done")
        return HttpResponse()

    @view
    def commits_sync(request: HttpRequest) -> HttpResponse:
        async_to_sync(transaction)()
        async_to_sync(start)()
        log.append("view done")
        return HttpResponse()

    middleware = [f"{__name__}.SpawnsAfterwards"] if from_where == "middleware" else []
    with override_settings(MIDDLEWARE=middleware):
        await get("/sync/commits_sync" if from_where == "sync view" else "/commits")
    await spawned[0]
    assert log == ["view done", "commit", "worked"]


@async_only_middleware
def SpawnsAfterwards(get_response: Any) -> Any:  # noqa: N802 (it stands for a class)
    async def middleware(request: HttpRequest) -> Any:
        response = await get_response(request)
        after()
        return response

    return middleware


async def test_after_the_response_it_begins_before_the_first_byte_and_may_outlive_the_stream() -> (
    None
):
    @view
    async def streams(request: HttpRequest) -> StreamingHttpResponse:
        await transaction()
        after()

        async def body() -> AsyncIterator[str]:
            yield "x"
            await spawned[0]
            log.append("last byte")

        return StreamingHttpResponse(body())

    await get("/streams")
    assert log == ["commit", "worked", "last byte"]


async def test_in_the_stream_the_response_is_over_already() -> None:
    @view
    async def streams(request: HttpRequest) -> StreamingHttpResponse:
        async def body() -> AsyncIterator[str]:
            yield "x"
            after()
            await spawned[0]

        return StreamingHttpResponse(body())

    await get("/streams")
    assert log == ["worked"]


@pytest.mark.parametrize(
    "how", ["raises", "refuses", "commit fails", "noted", "client gone", "timeout", "cancelled"]
)
async def test_it_never_begins_if_the_request_fails(how: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "scoped")
    reached = asyncio.Event()

    @request_scoped(until="response")
    async def broken() -> AsyncIterator[None]:
        yield
        raise ValueError("the COMMIT fails")

    @request_scoped
    async def deadline() -> AsyncIterator[None]:
        async with asyncio.timeout(0.01):
            yield

    @view
    async def fails(request: HttpRequest) -> HttpResponse:
        after()
        if how == "raises":
            raise ValueError
        if how == "refuses":
            raise PermissionDenied
        if how == "commit fails":
            await broken()
        if how == "noted":
            current_scope().note_failure(ValueError())
        if how in ("client gone", "timeout", "cancelled"):
            reached.set()
            if how == "timeout":
                await deadline()
            await asyncio.Event().wait()
        return HttpResponse()

    connection = Connection(ScopedASGIHandler(), "/fails")
    request = connection.start()
    if how in ("client gone", "cancelled"):
        await reached.wait()
        connection.disconnect() if how == "client gone" else request.cancel()
    await asyncio.wait([request])
    with pytest.raises(asyncio.CancelledError):
        await spawned[0]
    assert log == []
    assert "the background task the mail never begins, for the request has failed" in caplog.text


async def test_one_that_is_cancelled_while_it_waits_never_begins() -> None:
    @view
    async def cancels(request: HttpRequest) -> HttpResponse:
        after()
        spawned[0].cancel()
        await asyncio.wait(spawned)
        return HttpResponse()

    await get("/cancels")
    assert spawned[0].cancelled()
    assert log == []


async def test_under_the_test_client_too() -> None:
    @view
    async def commits(request: HttpRequest) -> HttpResponse:
        await transaction()
        after()
        return HttpResponse()

    async with AsyncClient() as client:
        assert (await client.get("/commits")).status_code == 200
    assert log == ["commit", "worked"]


async def test_where_no_response_is_to_come_it_is_refused() -> None:
    refused = r'spawn\(after="response"\) was called for work_after where no response is to come'
    with pytest.raises(RuntimeError, match=refused):
        after()
    async with request_scope():
        with pytest.raises(RuntimeError, match=refused):
            after()

    async def in_the_background() -> None:
        with pytest.raises(RuntimeError, match=refused):
            after()
        log.append("refused")

    await spawn(in_the_background())
    assert log == ["refused"]


async def test_a_task_that_outlives_its_request_is_refused_too() -> None:
    go_on = asyncio.Event()
    strays: list[asyncio.Task[None]] = []

    async def stray() -> None:
        await go_on.wait()
        with pytest.raises(RuntimeError, match="where no response is to come"):
            after()
        log.append("refused")

    @view
    async def leaves(request: HttpRequest) -> HttpResponse:
        strays.append(asyncio.create_task(stray()))
        return HttpResponse()

    await get("/leaves")
    go_on.set()
    await strays[0]
    assert log == ["refused"]
