"""Promise 16 and trap 20: what lives as long as the server, once per event loop."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from scoped import (
    AsyncResourceError,
    CircularResourceError,
    NoScopeError,
    ScopeClosedError,
    TeardownError,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.core import lifespan as lifespans
from scoped.core import scope as scopes
from scoped.core.lifespan import LifespanScope
from scoped.core.request import RequestScope, ServedScope
from scoped.serving.threads import LentThread
from tests.slowness import within

MARK: ContextVar[str] = ContextVar("MARK", default="unset")


async def settle() -> None:
    """Let every other task run until it waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)


async def holder_that_waits(
    request: Callable[[], Coroutine[Any, Any, None]],
) -> "tuple[asyncio.Task[None], asyncio.Task[None]]":
    """Who holds the lifespan no longer, and waits for a request in it; and that request."""
    served: list[asyncio.Task[None]] = []

    async def server() -> None:
        async with lifespan_scope():
            served.append(asyncio.create_task(request()))
            await settle()

    holder = asyncio.create_task(server())
    await settle()
    await settle()
    assert not holder.done()
    return holder, served[0]


def pool_of(log: list[str]) -> Any:
    @lifespan_scoped
    async def pool() -> AsyncIterator[str]:
        log.append("+pool")
        yield "pool"
        log.append("-pool")

    return pool


def request_that_uses_a_pool(
    log: list[str],
) -> tuple[Callable[[], Coroutine[Any, Any, None]], asyncio.Event]:
    """It ends when the event is set; that the pool has gone is logged."""

    @lifespan_scoped
    async def pool() -> AsyncIterator[str]:
        yield "pool"
        log.append("pool")

    go_on = asyncio.Event()

    async def request() -> None:
        async with request_scope():
            await pool()
            await go_on.wait()

    return request, go_on


async def hold() -> None:
    async with lifespan_scope():
        pass


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Eager resources are those of one test, and no test leaves a lifespan behind."""
    before, lifespans.eager[:] = list(lifespans.eager), []
    yield
    lifespans.eager[:] = before
    assert lifespans.lifespans == {}


class TestOnePerEventLoop:
    async def test_every_request_gets_the_same_and_it_ends_with_the_lifespan(
        self, log: list[str]
    ) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[object]:
            log.append("set up")
            yield object()
            log.append("torn down")

        async def request() -> object:
            async with request_scope():
                return (await asyncio.gather(pool(), pool()))[0]

        async with lifespan_scope():
            found = await asyncio.gather(*(request() for _ in range(5)))
            assert await pool() is found[0]
            assert log == ["set up"]
        assert len(set(found)) == 1
        assert log == ["set up", "torn down"]

    def test_two_event_loops_have_two(self, log: list[str]) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[object]:
            yield asyncio.get_running_loop()
            log.append("torn down")

        async def serve(meeting: threading.Barrier) -> tuple[object, object]:
            async with lifespan_scope(), request_scope():
                found = await pool()
                await asyncio.to_thread(meeting.wait, 5)
                assert await pool() is found
            return found, asyncio.get_running_loop()

        meeting = threading.Barrier(2)
        results: list[Any] = []
        threads = [
            threading.Thread(target=lambda: results.append(asyncio.run(serve(meeting))))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 2
        assert all(found is loop for found, loop in results)
        assert log == ["torn down", "torn down"]

    async def test_an_event_loop_started_inside_a_request_of_another_has_its_own(self) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[object]:
            yield asyncio.get_running_loop()

        async def elsewhere() -> bool:
            async with request_scope():
                return await pool() is asyncio.get_running_loop()

        async with lifespan_scope(), request_scope():
            assert await pool() is asyncio.get_running_loop()
            assert await asyncio.to_thread(lambda: asyncio.run(elsewhere()))

    def test_the_same_thread_with_a_second_event_loop_sees_no_dead_pool(self) -> None:
        @lifespan_scoped
        async def pool() -> object:
            return asyncio.get_running_loop()

        async def main() -> bool:
            async with request_scope():
                return await pool() is asyncio.get_running_loop()

        assert asyncio.run(main())
        assert asyncio.run(main())

    async def test_inside_another_one_it_is_the_same(self, log: list[str]) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield "pool"
            log.append("torn down")

        async with lifespan_scope() as outer:
            async with lifespan_scope() as inner:
                assert inner is outer
                await pool()
            assert log == []
            assert outer.is_open
        assert log == ["torn down"]

    async def test_without_one_it_ends_with_the_last_open_request(self, log: list[str]) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[object]:
            yield object()
            log.append("torn down")

        go_on = asyncio.Event()

        async def longer() -> object:
            async with request_scope():
                found = await pool()
                await go_on.wait()
                assert log == []
                return found

        task = asyncio.create_task(longer())
        await settle()
        async with request_scope():
            found = await pool()
        assert log == []
        go_on.set()
        assert await task is found
        assert log == ["torn down"]
        async with request_scope():
            assert await pool() is not found
        assert log == ["torn down", "torn down"]

    async def test_a_request_that_comes_while_an_implied_one_closes_has_a_new_one(
        self, log: list[str]
    ) -> None:
        closing, go_on = asyncio.Event(), asyncio.Event()

        @lifespan_scoped
        async def pool() -> AsyncIterator[object]:
            yield object()
            closing.set()
            await go_on.wait()
            log.append("torn down")

        async def request() -> object:
            async with request_scope():
                return await pool()

        first = asyncio.create_task(request())
        await closing.wait()
        second = asyncio.create_task(request())
        await settle()
        assert log == []
        go_on.set()
        assert await first is not await second
        assert log == ["torn down", "torn down"]

    async def test_a_request_that_comes_while_the_server_shuts_down_is_told_so(
        self, log: list[str]
    ) -> None:
        closing, go_on = asyncio.Event(), asyncio.Event()

        @lifespan_scoped
        async def pool() -> AsyncIterator[object]:
            yield object()
            closing.set()
            await go_on.wait()

        async def server() -> None:
            async with lifespan_scope():
                await pool()

        task = asyncio.create_task(server())
        await closing.wait()
        async with request_scope():
            with pytest.raises(ScopeClosedError, match="the lifespan"):
                await pool()
        go_on.set()
        await task

    async def test_outside_every_scope_there_is_none(self) -> None:
        @lifespan_scoped
        async def pool() -> str:
            return "pool"

        with pytest.raises(NoScopeError):
            await pool()

    async def test_a_task_that_outlives_its_request_may_still_use_it(self) -> None:
        @lifespan_scoped
        async def pool() -> object:
            return object()

        @lifespan_scoped
        async def other() -> str:
            return "other"

        go_on = asyncio.Event()

        async def outlive() -> object:
            await go_on.wait()
            assert await other() == "other"
            return await pool()

        async with lifespan_scope():
            async with request_scope():
                found = await pool()
                task = asyncio.create_task(outlive())
            go_on.set()
            assert await task is found
            go_on.clear()
            late = asyncio.create_task(outlive())
        go_on.set()
        with pytest.raises(ScopeClosedError, match="the lifespan"):
            await late


class TestContext:
    async def test_it_is_set_up_in_a_context_of_its_own(self) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield MARK.get()
            MARK.set("changed")

        @lifespan_scoped
        def settings() -> Iterator[str]:
            token = MARK.set(MARK.get())
            yield MARK.get()
            MARK.reset(token)

        MARK.set("server")
        async with lifespan_scope():
            MARK.set("request")
            async with request_scope():
                assert await pool() == "server"
                assert settings() == "server"
                assert await sync_to_async(settings)() == "server"
                assert MARK.get() == "request"
        assert MARK.get() == "request"

    async def test_implied_by_a_request_it_has_nothing_of_its_context(self) -> None:
        seen: list[str] = []

        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            async def work() -> None:
                seen.append(MARK.get())

            worker = asyncio.create_task(work())
            yield MARK.get()
            await worker

        @lifespan_scoped
        def settings() -> str:
            return MARK.get()

        MARK.set("request")
        async with request_scope():
            assert await pool() == "unset"
            assert settings() == "unset"
        assert seen == ["unset"]

    async def test_a_worker_of_the_pool_keeps_no_request_alive(self) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            worker = asyncio.create_task(asyncio.Event().wait())
            yield "pool"
            worker.cancel()

        async def request() -> "weakref.ref[RequestScope]":
            async with request_scope() as scope:
                await pool()
                return weakref.ref(scope)

        async with lifespan_scope():
            gone = await asyncio.create_task(request())
            await settle()
            gc.collect()
            assert gone() is None


class TestATeardownMayUseWhatIsThereYet:
    """What its factory has used is torn down after it, and so can be asked for again."""

    @pytest.fixture
    def settings(self, log: list[str]) -> Any:
        @lifespan_scoped
        def settings() -> Iterator[str]:
            yield "settings"
            log.append("settings")

        return settings

    @pytest.mark.parametrize("is_held", [True, False], ids=["held", "implied"])
    async def test_that_of_a_lifespans_resource(
        self, is_held: bool, settings: Any, log: list[str]
    ) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield settings()
            log.append(f"pool, with {settings()}")

        @lifespan_scoped
        async def client() -> AsyncIterator[str]:
            yield await pool()
            log.append(f"client, with {await pool()}")

        async def request() -> None:
            async with request_scope():
                await client()

        if is_held:
            async with lifespan_scope():
                await request()
        else:
            await request()
        assert log == ["client, with settings", "pool, with settings", "settings"]

    @pytest.mark.parametrize("is_held", [True, False], ids=["held", "implied"])
    def test_that_of_one_of_sync_code(self, is_held: bool, settings: Any, log: list[str]) -> None:
        @lifespan_scoped
        def pool() -> Iterator[str]:
            yield settings()
            log.append(f"pool, with {settings()}")

        def request() -> None:
            with request_scope():
                pool()

        if is_held:
            with lifespan_scope():
                request()
        else:
            request()
        assert log == ["pool, with settings", "settings"]

    @pytest.mark.parametrize("is_held", [True, False], ids=["held", "implied"])
    async def test_that_of_a_requests_resource_in_a_thread(
        self, is_held: bool, settings: Any, log: list[str]
    ) -> None:
        @request_scoped
        def tenant() -> Iterator[str]:
            yield settings()
            log.append(f"tenant, with {settings()}")

        async def request() -> None:
            async with request_scope():
                await sync_to_async(tenant)()

        if is_held:
            async with lifespan_scope():
                await request()
        else:
            await request()
        assert log == ["tenant, with settings", "settings"]


class TestShutdown:
    async def test_it_waits_for_open_requests(self, log: list[str]) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield "pool"
            log.append("pool")

        @request_scoped
        async def db() -> AsyncIterator[str]:
            await pool()
            yield "db"
            await asyncio.sleep(0.01)
            log.append("db")

        opened, go_on = asyncio.Event(), asyncio.Event()

        async def request() -> None:
            async with request_scope():
                await db()
                opened.set()
                await go_on.wait()

        async with lifespan_scope():
            tasks = [asyncio.create_task(request()) for _ in range(2)]
            await opened.wait()
            asyncio.get_running_loop().call_later(0.01, go_on.set)
        assert log == ["db", "db", "pool"]
        await asyncio.gather(*tasks)

    async def test_but_not_for_ever(
        self, log: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Promises 16 and 21."""
        monkeypatch.setattr(LifespanScope, "shutdown_timeout", 0.02)

        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield "pool"
            log.append("pool")

        go_on = asyncio.Event()

        async def request() -> None:
            async with request_scope():
                await pool()
                await go_on.wait()
                with pytest.raises(ScopeClosedError):
                    await pool()

        async with lifespan_scope():
            task = asyncio.create_task(request())
            await settle()
        assert log == ["pool"]
        assert "1 request(s) still open after 0.02 seconds" in caplog.text
        assert "the request scope" in caplog.text
        go_on.set()
        await task

    async def test_cancelled_meanwhile_it_still_waits_and_tears_down(self, log: list[str]) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            try:
                yield "pool"
            finally:
                log.append("pool")

        opened, go_on = asyncio.Event(), asyncio.Event()

        async def request() -> None:
            async with request_scope():
                await pool()
                opened.set()
                await go_on.wait()
                log.append("request")

        async def server() -> None:
            async with lifespan_scope():
                await opened.wait()

        serving = asyncio.create_task(server())
        await settle()
        task = asyncio.create_task(request())
        await opened.wait()
        await settle()
        for _ in range(3):
            serving.cancel()
            await settle()
        assert log == []
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert log == ["request", "pool"]
        await task

    async def test_a_request_that_fails_to_tear_down_does_not_hold_it_up(
        self, log: list[str]
    ) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield "pool"
            log.append("pool")

        @request_scoped
        async def db() -> AsyncIterator[str]:
            yield await pool()
            raise ValueError("broken")

        async with lifespan_scope():
            with pytest.raises(TeardownError):
                async with request_scope():
                    await db()
        assert log == ["pool"]

    async def test_a_request_in_sync_code_is_waited_for_too(self, log: list[str]) -> None:
        @lifespan_scoped
        def settings() -> Iterator[str]:
            yield "settings"
            log.append("settings")

        opened, go_on = threading.Event(), threading.Event()

        def request() -> None:
            with request_scope():
                assert settings() == "settings"
                opened.set()
                go_on.wait(5)
                log.append("request")

        async with lifespan_scope():
            task = asyncio.create_task(asyncio.to_thread(request))
            await asyncio.to_thread(opened.wait, 5)
            asyncio.get_running_loop().call_later(0.01, go_on.set)
        assert log == ["request", "settings"]
        await task

    async def test_an_implied_one_whose_last_request_ends_in_another_thread(
        self, log: list[str]
    ) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield "pool"
            log.append("pool")

        opened, go_on = threading.Event(), threading.Event()

        def sync_request() -> None:
            with request_scope():
                opened.set()
                go_on.wait(5)

        async with request_scope():
            await pool()
            task = asyncio.create_task(asyncio.to_thread(sync_request))
            await asyncio.to_thread(opened.wait, 5)
        assert log == []
        go_on.set()
        await task
        await settle()
        assert log == ["pool"]

    def test_and_in_sync_code_of_the_loops_thread(self, log: list[str]) -> None:
        @lifespan_scoped
        def settings() -> Iterator[str]:
            try:
                yield "settings"
            finally:
                log.append("settings")

        async def main() -> None:
            with request_scope():
                settings()

        asyncio.run(main())
        assert log == ["settings"]

    def test_held_by_somebody_who_never_drops_it_it_ends_with_the_event_loop(
        self, log: list[str]
    ) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            try:
                yield "pool"
            finally:
                log.append("pool")

        held = lifespan_scope()

        async def enter() -> None:
            await held.__aenter__()
            await pool()

        with asyncio.Runner() as runner:
            runner.run(enter())
        assert log == ["pool"]

    def test_left_open_and_cancelled_twice_it_still_waits_for_requests_and_is_not_lost(
        self, log: list[str]
    ) -> None:
        """What an event loop that ends cancels, somebody else may cancel once more."""

        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            try:
                yield "pool"
            finally:
                log.append("pool")

        async def enter() -> None:
            await lifespan_scope().__aenter__()
            await pool()

        async def request() -> None:
            async with request_scope():
                await pool()
                await release.wait()
                log.append("request")

        async def end() -> None:
            mine = {asyncio.current_task(), requests[0]}
            for _ in range(2):
                for task in asyncio.all_tasks() - mine:
                    task.cancel()
                await settle()
            assert log == []
            release.set()
            await requests[0]
            await settle()

        async def begin() -> None:
            requests.append(asyncio.create_task(request()))
            await settle()

        requests: list[asyncio.Task[None]] = []
        with asyncio.Runner() as runner:
            runner.run(enter())
            release = asyncio.Event()
            runner.run(begin())
            runner.run(end())
        assert log == ["request", "pool"]

    def test_a_served_request_keeps_it_until_the_event_loop_ends(self, log: list[str]) -> None:
        """A server without the lifespan protocol says nothing at its end."""

        @lifespan_scoped
        async def pool() -> AsyncIterator[object]:
            try:
                yield object()
            finally:
                await asyncio.sleep(0.001)
                log.append("pool")

        async def request() -> object:
            scope = ServedScope("the request GET /").open()
            found = await pool()
            await scope.close()
            scope.leave()
            return found

        async def main() -> None:
            assert await asyncio.create_task(request()) is await asyncio.create_task(request())
            assert log == []

        asyncio.run(main())
        assert log == ["pool"]

    def test_also_where_a_thread_for_sync_code_was_the_first_to_ask(self, log: list[str]) -> None:
        @lifespan_scoped
        def settings() -> Iterator[object]:
            try:
                yield object()
            finally:
                log.append("settings")

        async def request() -> object:
            scope = ServedScope("the request GET /").open()
            found = await sync_to_async(settings)()
            await scope.close()
            scope.leave()
            return found

        async def main() -> None:
            assert await asyncio.create_task(request()) is await asyncio.create_task(request())
            assert log == []

        asyncio.run(main())
        assert log == ["settings"]

    async def test_taken_over_while_it_waits_it_stays_and_a_cancellation_is_not_lost(
        self, log: list[str]
    ) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield "pool"
            log.append("pool")

        go_on = asyncio.Event()

        async def request() -> None:
            async with request_scope():
                await pool()
                await go_on.wait()

        first, served = await holder_that_waits(request)
        async with lifespan_scope():
            first.cancel()
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert log == []
        assert log == ["pool"]
        await served

    async def test_who_waits_for_a_request_hears_of_its_end_though_another_holds_it_since(
        self,
    ) -> None:
        go_on, go_on_again = asyncio.Event(), asyncio.Event()

        async def requests() -> None:
            async with request_scope():
                await go_on.wait()
            async with request_scope():  # for which it is the other one that waits
                await go_on_again.wait()

        first, served = await holder_that_waits(requests)
        async with lifespan_scope():
            go_on.set()
            await settle()
            assert first.done()
            go_on_again.set()
            await served

    @pytest.mark.parametrize("cancelled", [None, 0, 1])
    async def test_two_who_have_held_it_both_hear_of_its_last_requests_end_and_one_closes_it(
        self, log: list[str], cancelled: int | None
    ) -> None:
        request, go_on = request_that_uses_a_pool(log)
        first, served = await holder_that_waits(request)
        holders = [first, asyncio.create_task(hold())]
        await settle()
        assert not any(holder.done() for holder in holders)
        if cancelled is not None:
            holders[cancelled].cancel()
            await settle()
        assert log == []
        go_on.set()
        async with asyncio.timeout(within(5)):
            await asyncio.wait(holders)
        assert [holder.cancelled() for holder in holders] == [cancelled == 0, cancelled == 1]
        assert log == ["pool"]
        await served

    async def test_whose_time_is_up_first_leaves_its_requests_to_who_waits_longer(
        self, log: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        request, go_on = request_that_uses_a_pool(log)
        monkeypatch.setattr(LifespanScope, "shutdown_timeout", 0.05)
        first, served = await holder_that_waits(request)
        monkeypatch.setattr(LifespanScope, "shutdown_timeout", within(5))
        second = asyncio.create_task(hold())
        await first
        assert (log, caplog.text, second.done()) == ([], "", False)
        go_on.set()
        await second
        assert log == ["pool"]
        await served

    async def test_it_waits_for_a_request_that_comes_as_the_last_one_ends(
        self, log: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Promise 16: as of a consumer, which handles one message after the other."""

        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield "pool"
            log.append("pool")

        go_on = asyncio.Event()

        async def consumer() -> None:
            for number in range(3):
                async with request_scope():
                    await pool()
                    if number == 0:
                        await go_on.wait()
                    await settle()
                    log.append(f"message {number}")

        holder, served = await holder_that_waits(consumer)
        go_on.set()
        await holder
        assert log == ["message 0", "message 1", "message 2", "pool"]
        await served
        assert caplog.text == ""

    async def test_but_not_for_ever_where_one_comes_after_the_other(
        self, log: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(LifespanScope, "shutdown_timeout", 0.05)
        is_over = False

        async def consumer() -> None:
            while not is_over:
                async with request_scope():
                    await asyncio.sleep(0)

        holder, served = await holder_that_waits(consumer)
        await holder
        assert "1 request(s) still open after 0.05 seconds" in caplog.text
        is_over = True
        await served

    async def test_nobody_waits_for_a_request_that_is_never_closed_once_it_is_collected(
        self,
    ) -> None:
        go_on = asyncio.Event()

        async def request() -> None:
            RequestScope("a request").open()
            await go_on.wait()
            scopes.current.set(None)

        holder, served = await holder_that_waits(request)
        go_on.set()
        await served
        gc.collect()
        async with asyncio.timeout(within(5)):
            await holder

    def test_after_such_a_one_the_next_to_end_closes_an_implied_lifespan(
        self, log: list[str]
    ) -> None:
        @lifespan_scoped
        def settings() -> Iterator[object]:
            yield object()
            log.append("settings")

        RequestScope("a request").open(sync_only=True)
        value = settings()
        scopes.current.set(None)
        gc.collect()
        with request_scope():
            assert settings() is value
            assert log == []
        assert log == ["settings"]

    async def test_what_a_request_has_used_is_no_reason_to_wait_for_it_once_it_has_ended(
        self,
    ) -> None:
        @request_scoped
        async def db() -> str:
            return "db"

        async with lifespan_scope():
            async with request_scope() as unused:
                lifespan = unused.lifespan
                assert lifespan is not None
            async with request_scope():
                await db()
                assert lifespan.in_use_by() == "the request scope"
            assert lifespan.in_use_by() == ""

    async def test_two_who_want_to_close_it_do_not_lose_a_teardown(self, log: list[str]) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield "pool"
            log.append("pool")

        go_on = asyncio.Event()

        @lifespan_scoped
        async def later() -> AsyncIterator[str]:
            yield "later"
            await go_on.wait()
            log.append("later")

        async with request_scope() as scope:
            await pool()
            await later()
            lifespan = scope.lifespan
            assert lifespan is not None
            closing = asyncio.create_task(lifespan.close())
            await settle()
        await settle()
        assert log == []
        go_on.set()
        await closing
        assert log == ["later", "pool"]

    def test_the_last_request_may_end_in_the_thread_that_has_set_up_what_it_holds(
        self, log: list[str]
    ) -> None:
        """In sync code of threads that are lent: there is a way back, and no need of it."""

        @lifespan_scoped
        def settings() -> Iterator[int]:
            thread = threading.get_ident()
            yield thread
            assert threading.get_ident() == thread
            log.append("settings")

        opened, asked, parted = threading.Event(), threading.Event(), threading.Event()

        def first() -> None:
            with request_scope():
                settings_of_none()
                opened.set()
                assert asked.wait(within(10))
            parted.set()

        def last() -> int:
            assert opened.wait(within(10))
            with request_scope():
                thread = settings()
                asked.set()
                assert parted.wait(within(10))
                assert log == []
                return thread

        @lifespan_scoped
        def settings_of_none() -> str:
            return "implies the lifespan"

        async def main() -> None:
            with LentThread() as one, LentThread() as other:
                [_, thread] = await asyncio.gather(one.submit(first), other.submit(last))
                assert thread == await other.submit(threading.get_ident)

        asyncio.run(main())
        assert log == ["settings"]


class TestRequestScopesOfItsFactories:
    """Promises 13, 16 and 21: who waits for them would wait for the teardown that comes after."""

    @pytest.fixture(autouse=True)
    def nobody_waits_in_vain(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> Iterator[None]:
        monkeypatch.setattr(LifespanScope, "shutdown_timeout", within(2))
        yield
        assert caplog.text == ""

    @staticmethod
    def resources(log: list[str]) -> Any:
        """A lifespan resource that holds a request's, which uses the lifespan's to its end."""

        pool = pool_of(log)

        @request_scoped
        async def db() -> AsyncIterator[str]:
            yield await pool()
            log.append(f"-db, with the {await pool()}")

        @lifespan_scoped
        async def worker() -> AsyncIterator[str]:
            async with request_scope():  # nobody asks for anything in this one
                async with request_scope():
                    yield await db()
            log.append("-worker")

        return worker

    async def test_one_across_its_yield_is_not_waited_for(self, log: list[str]) -> None:
        worker = self.resources(log)
        async with lifespan_scope():
            await worker()
        assert log == ["+pool", "-db, with the pool", "-worker", "-pool"]

    async def test_and_does_not_keep_an_implied_one_open(self, log: list[str]) -> None:
        worker = self.resources(log)
        async with request_scope():
            await worker()
        assert log == ["+pool", "-db, with the pool", "-worker", "-pool"]
        assert lifespans.lifespans == {}

    async def test_another_request_is_waited_for_beside_it(self, log: list[str]) -> None:
        worker, go_on = self.resources(log), asyncio.Event()

        async def request() -> None:
            async with request_scope():
                await worker()
                await go_on.wait()
                log.append("request")

        holder, served = await holder_that_waits(request)
        go_on.set()
        await asyncio.gather(holder, served)
        assert log == ["+pool", "request", "-db, with the pool", "-worker", "-pool"]

    @pytest.mark.parametrize("is_held", [True, False])
    def test_in_sync_code_too(self, log: list[str], is_held: bool) -> None:
        @request_scoped
        def tenant() -> Iterator[str]:
            yield "tenant"
            log.append("tenant")

        @lifespan_scoped
        def settings() -> Iterator[str]:
            with request_scope():
                yield tenant()
            log.append("settings")

        with lifespan_scope() if is_held else request_scope():
            assert settings() == "tenant"
        assert log == ["tenant", "settings"]
        assert lifespans.lifespans == {}

    @pytest.mark.parametrize("is_held", [True, False])
    async def test_what_it_opens_as_it_ends_uses_the_same_lifespan(
        self, log: list[str], is_held: bool
    ) -> None:
        pool = pool_of(log)

        @request_scoped
        async def db() -> str:
            return await pool()

        @lifespan_scoped
        async def worker() -> AsyncIterator[None]:
            await pool()
            yield
            async with request_scope():
                log.append(f"the last of the work, with the {await db()}")

        async with lifespan_scope() if is_held else request_scope():
            await worker()
        assert log == ["+pool", "the last of the work, with the pool", "-pool"]

    @pytest.mark.parametrize("is_held", [True, False])
    async def test_a_lifespan_that_it_holds_is_the_one_that_it_is_part_of(
        self, log: list[str], is_held: bool
    ) -> None:
        pool = pool_of(log)

        @lifespan_scoped
        async def schema() -> AsyncIterator[str]:
            async with lifespan_scope():  # only while it is set up
                await pool()
            async with lifespan_scope():
                yield await pool()
            log.append("-schema")

        async with lifespan_scope() if is_held else request_scope():
            assert await schema() == "pool"
        assert log == ["+pool", "-schema", "-pool"]

    @pytest.mark.parametrize("is_held", [True, False])
    def test_in_sync_code_too_it_is_part_of_it(self, log: list[str], is_held: bool) -> None:
        @lifespan_scoped
        def settings() -> Iterator[str]:
            with lifespan_scope():
                pass
            with lifespan_scope():
                yield "settings"
            log.append("settings")

        with lifespan_scope() if is_held else request_scope():
            assert settings() == "settings"
        assert log == ["settings"]

    async def test_an_eager_one_may_do_so(self, log: list[str]) -> None:
        @lifespan_scoped(eager=True)
        async def schema() -> AsyncIterator[str]:
            async with lifespan_scope():
                yield "schema"
            log.append("schema")

        async with lifespan_scope():
            assert await schema() == "schema"
        assert log == ["schema"]

    @pytest.mark.parametrize("is_held", [True, False])
    async def test_a_request_in_that_is_of_the_same_factory(
        self, log: list[str], is_held: bool
    ) -> None:
        worker = self.resources(log)

        @lifespan_scoped
        async def outer() -> AsyncIterator[str]:
            async with lifespan_scope(), request_scope():
                yield await worker()
            log.append("-outer")

        async with lifespan_scope() if is_held else request_scope():
            await outer()
        assert log == ["+pool", "-outer", "-db, with the pool", "-worker", "-pool"]

    @pytest.mark.timeout(20)
    async def test_what_asks_for_itself_in_one_is_a_circle(self) -> None:
        @lifespan_scoped
        async def inline() -> None:
            async with lifespan_scope():
                await inline()

        @lifespan_scoped
        async def in_child() -> None:
            async with lifespan_scope(), request_scope():
                await asyncio.create_task(in_child())

        async with lifespan_scope():
            for resource in (inline, in_child):
                with pytest.raises(CircularResourceError):
                    await resource()

    @pytest.mark.timeout(20)
    def test_what_asks_for_itself_in_one_of_sync_code_is_a_circle(self) -> None:
        @lifespan_scoped
        def settings() -> None:
            with lifespan_scope():
                settings()

        with lifespan_scope(), pytest.raises(CircularResourceError):
            settings()

    async def test_an_eager_one_may_open_one_as_it_ends(self, log: list[str]) -> None:
        @lifespan_scoped(eager=True)
        async def schema() -> AsyncIterator[str]:
            log.append("+schema")
            yield "schema"
            async with lifespan_scope():
                log.append("-schema")

        async with lifespan_scope():
            pass
        assert log == ["+schema", "-schema"]

    async def test_one_that_sync_code_opens_in_a_thread_is_that_of_sync_code(
        self, log: list[str]
    ) -> None:
        @lifespan_scoped
        def registry() -> Iterator[str]:
            yield "registry"
            log.append("-registry")

        def migrate() -> None:
            with lifespan_scope():
                registry()
            log.append("migrated")

        @lifespan_scoped
        async def database() -> str:
            await asyncio.to_thread(migrate)
            return "database"

        async with lifespan_scope():
            await database()
            assert log == ["-registry", "migrated"]

    async def test_what_it_opens_as_it_ends_is_a_new_lifespan(self, log: list[str]) -> None:
        pool = pool_of(log)

        @lifespan_scoped
        async def worker() -> AsyncIterator[None]:
            yield
            async with lifespan_scope():
                log.append(f"the last of the work, with a {await pool()}")

        async with lifespan_scope():
            await worker()
        assert log == ["+pool", "the last of the work, with a pool", "-pool"]

    async def test_one_of_a_task_that_it_has_started_is_waited_for(self, log: list[str]) -> None:
        go_on = asyncio.Event()

        async def work() -> None:
            async with request_scope():
                await go_on.wait()
                log.append("work")

        @lifespan_scoped
        async def worker() -> AsyncIterator[None]:
            task = asyncio.create_task(work())
            yield
            log.append("worker")
            await task

        async def request() -> None:
            async with request_scope():
                await worker()

        holder, served = await holder_that_waits(request)
        assert served.done()
        go_on.set()
        await holder
        assert log == ["work", "worker"]


class TestEager:
    def test_in_sync_code_what_is_sync_is_set_up_and_the_rest_is_not(self, log: list[str]) -> None:
        @lifespan_scoped(eager=True)
        async def pool() -> None:
            log.append("pool")

        @lifespan_scoped(eager=True)
        def settings() -> Iterator[str]:
            log.append("+settings")
            yield "settings"
            log.append("-settings")

        with lifespan_scope():
            assert log == ["+settings"]
        assert log == ["+settings", "-settings"]

    def test_in_sync_code_a_failure_closes_what_was_opened(self, log: list[str]) -> None:
        @lifespan_scoped(eager=True)
        def settings() -> Iterator[str]:
            try:
                yield "settings"
            finally:
                log.append("settings")

        @lifespan_scoped(eager=True)
        def cache() -> str:
            raise ValueError("no cache")

        with pytest.raises(ValueError, match="no cache"), lifespan_scope():
            log.append("started")
        assert log == ["settings"]
        assert scopes.current.get() is None

    async def test_it_is_set_up_when_the_lifespan_opens_in_order(self, log: list[str]) -> None:
        @lifespan_scoped(eager=True)
        async def pool() -> AsyncIterator[str]:
            log.append("+pool")
            yield "pool"
            log.append("-pool")

        @lifespan_scoped(eager=True)
        def settings() -> Iterator[str]:
            log.append("+settings")
            yield "settings"
            log.append("-settings")

        @lifespan_scoped
        async def lazy() -> None:
            log.append("lazy")

        async with lifespan_scope():
            assert log == ["+pool", "+settings"]
        assert log == ["+pool", "+settings", "-settings", "-pool"]

    async def test_a_failure_names_the_resource_and_closes_what_was_opened(
        self, log: list[str]
    ) -> None:
        @lifespan_scoped(eager=True)
        async def pool() -> AsyncIterator[str]:
            try:
                yield "pool"
            except ValueError:
                log.append("pool saw it")
                raise

        @lifespan_scoped(eager=True)
        async def cache() -> str:
            await pool()
            raise ValueError("no cache")

        @lifespan_scoped(eager=True)
        async def never() -> None:
            log.append("never")

        with pytest.raises(ValueError, match="no cache") as caught:
            async with lifespan_scope():
                log.append("started")
        assert log == ["pool saw it"]
        assert caught.value.__notes__ == [f"while {cache.resource} was set up"]
        assert scopes.current.get() is None

    async def test_cancelled_at_start_up_it_closes_what_was_opened(self, log: list[str]) -> None:
        @lifespan_scoped(eager=True)
        async def pool() -> AsyncIterator[str]:
            try:
                yield "pool"
            finally:
                log.append("pool")

        @lifespan_scoped(eager=True)
        async def slow() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                log.append("slow ended")

        async def server() -> None:
            async with lifespan_scope():
                log.append("started")

        task = asyncio.create_task(server())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["slow ended", "pool"]


async def test_one_block_holds_it_once() -> None:
    block = lifespan_scope()
    async with block:
        with pytest.raises(RuntimeError, match="make a new one for each use"):
            await block.__aenter__()


def test_in_sync_code_another_threads_request_closes_it_if_that_ends_last(log: list[str]) -> None:
    """Promises 8 and 16: nobody's pool is torn down under the request."""

    @lifespan_scoped
    def pool() -> Iterator[str]:
        yield "pool"
        log.append("pool torn down")

    @request_scoped
    def db() -> Iterator[str]:
        yield pool()
        log.append("db torn down")

    uses, left = threading.Event(), threading.Event()

    def request() -> None:
        with request_scope():
            db()
            uses.set()
            assert left.wait(within(10))

    with lifespan_scope():
        other = threading.Thread(target=request)
        other.start()
        assert uses.wait(within(10))
    assert log == []
    with request_scope():
        assert pool() == "pool"  # which is the same, still
    left.set()
    other.join()
    assert log == ["db torn down", "pool torn down"]


async def test_what_it_fails_with_is_told_with_what_its_last_request_failed_with() -> None:
    """Nobody's failure hides another's."""

    @lifespan_scoped
    async def pool() -> AsyncIterator[str]:
        yield "pool"
        raise LookupError("of the pool")

    @request_scoped
    async def db() -> AsyncIterator[str]:
        yield await pool()
        raise ValueError("of db")

    with pytest.raises(TeardownError) as caught:
        async with request_scope():
            await db()
    assert [str(error) for error in caught.value.exceptions] == ["of db", "of the pool"]


def test_an_async_resource_in_sync_code_is_refused_and_nothing_is_left() -> None:
    @lifespan_scoped
    async def pool() -> str:
        return "pool"

    with request_scope(), pytest.raises(AsyncResourceError):
        pool().send(None)


async def test_many_requests_in_many_threads_and_loops_leave_nothing() -> None:
    made: list[object] = []

    @lifespan_scoped
    def settings() -> Iterator[object]:
        made.append(object())
        yield made[-1]
        made.append("torn down")

    def requests() -> None:
        for _ in range(50):
            with request_scope():
                settings()

    await asyncio.gather(*(asyncio.to_thread(requests) for _ in range(4)))
    assert made.count("torn down") == len(made) / 2
