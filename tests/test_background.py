"""``spawn()``: a background task with a request scope of its own, drained at shutdown."""

import asyncio
import contextvars
import gc
import logging
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpRequest, HttpResponse
from django.test import override_settings

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
from scoped.testing import assert_no_leaks
from tests.connection import Connection
from tests.views import Views

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
