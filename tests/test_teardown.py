"""Promises 7, 8, 10, 11, 13 and 14: how a scope ends."""

import asyncio
import contextvars
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async

from scoped import (
    FactoryError,
    ScopeClosedError,
    TeardownError,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.core.scope import Scope
from scoped.core.waits import run_without_loop
from scoped.serving.threads import LentThread
from tests.tables import what_is_kept


async def settle() -> None:
    """Let every other task run until it waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)


def set_up_late(
    decorator: Any, name: str, log: list[str]
) -> tuple[Callable[[], str], threading.Event, threading.Event]:
    """A sync resource; its set-up has begun, and may go on. It ends in the thread of its set-up."""
    begun, go_on = threading.Event(), threading.Event()

    @decorator
    def resource() -> Iterator[str]:
        begun.set()
        go_on.wait(5)
        thread = threading.get_ident()
        yield name
        assert threading.get_ident() == thread
        log.append(name)

    return resource, begun, go_on


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scope, "teardown_timeout", 0.02)


Make = Callable[..., Any]


@pytest.fixture
def tracked(log: list[str]) -> Make:
    """Make a resource that logs its teardown, and may do something more in it."""

    def make(name: str, teardown: Callable[[], Any] | None = None, *needs: Any) -> Any:
        @request_scoped
        async def resource() -> AsyncIterator[str]:
            for needed in needs:
                await needed()
            try:
                yield name
            finally:
                log.append(name)
                if teardown is not None:
                    await teardown()

        return resource

    return make


WHERE = pytest.mark.parametrize("where", ["owner", "child"])


async def ask(resource: Any, where: str) -> Any:
    """First use in the scope's owner, or in a child task and so in a keeper."""
    return await (resource() if where == "owner" else asyncio.create_task(resource()))


class GraveError(BaseException):
    """No Exception, and nothing that ends the event loop."""


class TestReverseOrder:
    """Promise 7, trap 13."""

    async def test_the_last_set_up_is_torn_down_first(self, log: list[str], tracked: Make) -> None:
        one, two, three = tracked("one"), tracked("two"), tracked("three")
        async with request_scope():
            await two()
            await asyncio.create_task(one())
            await three()
        assert log == ["three", "one", "two"]

    @WHERE
    async def test_a_resource_goes_before_what_its_factory_used(
        self, where: str, log: list[str], tracked: Make
    ) -> None:
        base = tracked("base")
        middle = tracked("middle", None, base)
        top = tracked("top", None, middle, base)
        async with request_scope():
            await ask(top, where)
        assert log == ["top", "middle", "base"]

    async def test_what_counts_is_when_it_was_complete(self, log: list[str], tracked: Make) -> None:
        base = tracked("base")
        begun = asyncio.Event()

        @request_scoped
        async def slow() -> AsyncIterator[str]:
            begun.set()
            await asyncio.sleep(0.01)
            await base()
            yield "slow"
            log.append("slow")

        async with request_scope():
            task = asyncio.create_task(slow())
            await begun.wait()
            await base()
            await task
        assert log == ["slow", "base"]

    @WHERE
    async def test_sync_and_async_mixed(self, where: str, log: list[str]) -> None:
        @request_scoped
        def settings() -> Iterator[str]:
            yield "settings"
            log.append("settings")

        @request_scoped
        async def db() -> AsyncIterator[str]:
            settings()
            yield "db"
            await asyncio.sleep(0)
            log.append("db")

        @request_scoped
        def tenant() -> Iterator[str]:
            yield async_to_sync(db)()
            log.append("tenant")

        @request_scoped
        async def user() -> AsyncIterator[str]:
            yield await sync_to_async(tenant)()
            await asyncio.sleep(0)
            log.append("user")

        async with request_scope():
            await ask(user, where)
        assert log == ["user", "tenant", "db", "settings"]

    async def test_what_its_factory_used_can_be_used_in_its_teardown(self, log: list[str]) -> None:
        @request_scoped
        async def db() -> AsyncIterator[str]:
            yield "db"
            log.append("db")

        @request_scoped
        async def user() -> AsyncIterator[str]:
            await db()
            yield "user"
            log.append("user, with " + await db())

        async with request_scope():
            await asyncio.create_task(user())
        assert log == ["user, with db", "db"]

    async def test_a_request_goes_before_the_lifespan_that_it_implied(self, log: list[str]) -> None:
        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            yield "pool"
            log.append("pool")

        @request_scoped
        async def db() -> AsyncIterator[str]:
            await pool()
            yield "db"
            log.append("db")

        async with request_scope():
            await db()
        assert log == ["db", "pool"]

    @pytest.mark.parametrize("attempt", range(5))  # asyncio.run cancels in an order of its own
    def test_asyncio_run_shuts_down_while_scopes_are_open(
        self, attempt: int, log: list[str]
    ) -> None:
        @lifespan_scoped
        def settings() -> Iterator[str]:
            try:
                yield "settings"
            finally:
                log.append("settings")

        @lifespan_scoped
        async def pool() -> AsyncIterator[str]:
            settings()
            try:
                yield "pool"
            finally:
                await asyncio.sleep(0.001)
                log.append("pool")

        @request_scoped
        async def db() -> AsyncIterator[str]:
            await pool()
            try:
                yield "db"
            finally:
                await asyncio.sleep(0.001)
                log.append("db")

        opened: list[Scope] = []

        async def request() -> None:
            async with request_scope() as scope:
                await asyncio.create_task(db())
                opened.append(scope)
                await asyncio.Event().wait()

        async def abandoned() -> None:
            scope = request_scope().open()
            await asyncio.create_task(db())
            opened.append(scope)

        async def main(other: Any) -> None:
            task = asyncio.create_task(other())
            await settle()
            assert opened
            assert task.done() is (other is abandoned)

        for other in (request, abandoned):
            asyncio.run(main(other))
            assert log == ["db", "pool", "settings"]
            assert repr(opened[0]).endswith("closed>")
            log.clear()
            opened.clear()

    @pytest.mark.parametrize("kind", [ValueError, GraveError])
    def test_what_fails_then_is_logged_for_nobody_is_left_to_be_told(
        self, kind: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        @request_scoped
        async def db() -> AsyncIterator[str]:
            try:
                yield "db"
            finally:
                raise kind("the teardown")

        async def leave() -> None:
            opened.append(request_scope().open())
            await asyncio.create_task(db())

        async def main() -> None:
            await asyncio.create_task(leave())
            await settle()

        opened: list[Scope] = []
        asyncio.run(main())
        assert repr(opened[0]).endswith("closed>")
        assert "the teardown" in caplog.text

    def test_a_scope_whose_event_loop_was_closed_under_it_can_still_be_closed(
        self, log: list[str]
    ) -> None:
        @request_scoped
        async def db() -> AsyncIterator[str]:
            yield "db"

        @request_scoped
        async def own() -> AsyncIterator[str]:
            yield "own"
            log.append("own")

        async def main() -> Scope:
            scope = request_scope().open()
            await own()
            await asyncio.create_task(db())
            return scope

        loop = asyncio.new_event_loop()
        scope = loop.run_until_complete(main())
        loop.run_until_complete(settle())
        loop.close()
        with pytest.raises(TeardownError) as caught:
            asyncio.run(scope.close())
        assert [str(error) for error in caught.value.exceptions] == ["Event loop is closed"]
        assert log == ["own"]
        assert repr(scope).endswith("closed>")


class TestAllOfIt:
    """Promise 8, traps 6, 7 and 8."""

    @WHERE
    async def test_one_that_fails_does_not_stop_the_others(
        self, where: str, log: list[str], tracked: Make
    ) -> None:
        async def fail() -> None:
            raise ValueError("broken")

        @request_scoped
        def plain() -> Iterator[None]:
            yield
            log.append("plain")
            raise KeyError("plain too")

        resources = [tracked("one"), tracked("two", fail), plain, tracked("three", fail)]
        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                for resource in resources:
                    if resource is plain:
                        plain()
                    else:
                        await ask(resource, where)
        assert log == ["three", "plain", "two", "one"]
        assert [type(error) for error in caught.value.exceptions] == [
            ValueError,
            KeyError,
            ValueError,
        ]
        notes = [error.__notes__ for error in caught.value.exceptions]
        assert f"while {plain.resource} was torn down" in notes[1]
        assert str(resources[3].resource) in notes[0][0]

    @WHERE
    @pytest.mark.parametrize("times", [1, 2, 3])
    async def test_cancelled_while_it_tears_down(
        self, where: str, times: int, log: list[str], tracked: Make
    ) -> None:
        waiting = asyncio.Event()

        async def wait() -> None:
            waiting.set()
            await asyncio.sleep(0.01 if where == "child" else 10)

        async def request() -> None:
            async with request_scope():
                for name in ("one", "two", "three", "four"):
                    await ask(tracked(name, wait), where)

        task = asyncio.create_task(request())
        for _ in range(times):
            await waiting.wait()
            waiting.clear()
            task.cancel("enough")
        # With the owner's own, each cancellation ends one teardown; a keeper's are out of reach.
        if where == "owner":
            for _ in range(4 - times):
                await waiting.wait()
                waiting.clear()
                task.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await task
        assert log == ["four", "three", "two", "one"]

    async def test_a_keeper_is_not_cancelled_with_the_one_who_waits_for_it(
        self, log: list[str], tracked: Make
    ) -> None:
        waiting, go_on = asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            waiting.set()
            await go_on.wait()
            log.append("complete")

        async def request() -> None:
            async with request_scope():
                await ask(tracked("db", wait), "child")

        task = asyncio.create_task(request())
        await waiting.wait()
        for _ in range(3):
            task.cancel()
            await settle()
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["db", "complete"]

    async def test_a_cancellation_comes_bare_and_the_errors_are_logged(
        self, log: list[str], tracked: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fail() -> None:
            raise ValueError("broken")

        async def request() -> None:
            async with request_scope():
                await ask(tracked("one", fail), "owner")
                await ask(tracked("two", fail), "child")
                await asyncio.Event().wait()

        task = asyncio.create_task(request())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["two", "one"]
        (record,) = caplog.records
        assert record.name == "scoped"
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], TeardownError)
        assert len(record.exc_info[1].exceptions) == 2

    @WHERE
    async def test_a_teardown_that_raises_a_cancellation_has_failed(
        self, where: str, log: list[str], tracked: Make
    ) -> None:
        """Promise 8: a task group, say, takes a bare one for its own, and nobody hears of it."""

        async def cancelled() -> None:
            worker = asyncio.create_task(asyncio.Event().wait())
            await asyncio.sleep(0)
            worker.cancel()
            await worker

        two = tracked("two", cancelled)
        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await ask(tracked("one"), where)
                await ask(two, where)
        assert log == ["two", "one"]
        (error,) = caught.value.exceptions
        assert isinstance(error.__cause__, asyncio.CancelledError)
        assert "the task that closes it was not" in str(error)
        assert error.__notes__ == [f"while {two.resource} was torn down"]

    async def test_so_has_one_in_which_the_time_of_anothers_timeout_is_up(
        self, log: list[str], tracked: Make
    ) -> None:
        @request_scoped
        async def limited() -> AsyncIterator[None]:
            async with asyncio.timeout(0.01):
                yield
            log.append("limited")

        slow = tracked("slow", asyncio.Event().wait)
        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await limited()
                await slow()
        assert log == ["slow", "limited"]
        (error,) = caught.value.exceptions
        assert error.__notes__ == [f"while {slow.resource} was torn down"]
        assert isinstance(error.__cause__, asyncio.CancelledError)

    async def test_a_cancellation_does_not_hide_what_is_graver(
        self, log: list[str], tracked: Make
    ) -> None:
        class Grave(BaseException):
            pass

        async def fail() -> None:
            raise Grave

        task = asyncio.current_task()
        assert task is not None

        async def cancel() -> None:
            task.cancel()
            await asyncio.sleep(0)

        with pytest.raises(Grave):
            async with request_scope():
                await tracked("one", cancel)()
                await tracked("two", fail)()
        assert task.uncancel() == 0
        assert log == ["two", "one"]

    @WHERE
    @pytest.mark.usefixtures("short_patience")
    async def test_one_that_hangs_is_cancelled_and_named(
        self, where: str, log: list[str], tracked: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Promises 8 and 21."""
        hanging = tracked("hanging", asyncio.Event().wait)
        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await tracked("one")()
                await ask(hanging, where)
        assert log == ["hanging", "one"]
        (error,) = caught.value.exceptions
        assert isinstance(error, TimeoutError)
        assert str(hanging.resource) in str(error)
        assert str(hanging.resource) in caplog.text
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    @WHERE
    @pytest.mark.usefixtures("short_patience")
    async def test_one_that_hangs_again_when_cancelled_is_cancelled_again(
        self, where: str, log: list[str], tracked: Make
    ) -> None:
        async def hang_twice() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                try:
                    log.append("again")
                    await asyncio.Event().wait()
                finally:
                    log.append("and again")
                    await asyncio.Event().wait()

        with pytest.raises(TeardownError, match="torn down") as caught:
            async with request_scope():
                await tracked("one")()
                await ask(tracked("hanging", hang_twice), where)
        assert log == ["hanging", "again", "and again", "one"]
        assert [type(error) for error in caught.value.exceptions] == [TimeoutError]
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    @pytest.mark.usefixtures("short_patience")
    async def test_cancelled_by_others_while_one_hangs_it_is_a_cancellation(
        self, log: list[str], tracked: Make
    ) -> None:
        async def hang() -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            task.cancel()
            await asyncio.Event().wait()

        async def request() -> None:
            async with request_scope():
                await tracked("one")()
                await tracked("hanging", hang)()

        task = asyncio.create_task(request())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["hanging", "one"]
        assert task.cancelling() == 1

    @pytest.mark.usefixtures("short_patience")
    async def test_an_error_of_its_own_after_the_time_is_up_is_kept(
        self, log: list[str], tracked: Make
    ) -> None:
        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("half closed") from None

        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await tracked("hanging", hang)()
        assert [type(error) for error in caught.value.exceptions] == [ValueError]

    async def test_one_that_hangs_is_cancelled_though_another_may_take_longer(
        self, log: list[str], tracked: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The bound is that of the moment in which each began."""
        go_on = asyncio.Event()
        patient, hanging = tracked("patient", go_on.wait), tracked("hanging", asyncio.Event().wait)

        async def hold() -> None:
            async with request_scope():
                await patient()

        monkeypatch.setattr(Scope, "teardown_timeout", 3600)
        holding = asyncio.create_task(hold())
        await settle()
        monkeypatch.setattr(Scope, "teardown_timeout", 0.02)
        with pytest.raises(TeardownError):
            async with request_scope():
                await hanging()
        assert log == ["patient", "hanging"]
        assert not holding.done()
        go_on.set()
        await holding

    async def test_teardowns_in_two_event_loops_are_bounded_each_in_its_own(
        self, log: list[str], tracked: Make, short_patience: None
    ) -> None:
        async def in_a_scope() -> None:
            with pytest.raises(TeardownError):
                async with request_scope():
                    await tracked("hanging", asyncio.Event().wait)()

        await in_a_scope()
        await asyncio.to_thread(asyncio.run, in_a_scope())
        await in_a_scope()
        assert log == ["hanging"] * 3

    @pytest.mark.usefixtures("short_patience")
    @pytest.mark.parametrize("fails", [True, False], ids=["badly", "well"])
    async def test_a_thread_that_hangs_is_left_behind(
        self, fails: bool, log: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Promises 8 and 21."""
        go_on = threading.Event()

        @request_scoped
        def hanging() -> Iterator[str]:
            yield "hanging"
            go_on.wait(5)
            if fails:
                raise ValueError("late")

        @request_scoped
        async def db() -> AsyncIterator[str]:
            yield "db"
            log.append("db")

        async with ThreadSensitiveContext():
            with pytest.raises(TeardownError) as caught:
                async with request_scope():
                    await db()
                    await sync_to_async(hanging)()
            assert log == ["db"]
            assert [type(error) for error in caught.value.exceptions] == [TimeoutError]
            go_on.set()
            await sync_to_async(lambda: None)()  # the thread has got so far
            await settle()
        assert ("late" in caplog.text) is fails

    @pytest.mark.usefixtures("short_patience")
    async def test_a_thread_that_comes_to_it_too_late_tears_down_all_the_same(
        self, log: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Promise 17: not whatever thread lets go of the generator."""
        go_on, threads = threading.Event(), set[int]()

        @request_scoped
        def tenant() -> Iterator[str]:
            threads.add(threading.get_ident())
            try:
                yield "tenant"
                log.append("well")
            finally:
                threads.add(threading.get_ident())

        async with ThreadSensitiveContext():
            with pytest.raises(TeardownError):
                async with request_scope():
                    await sync_to_async(tenant)()
                    working = asyncio.create_task(sync_to_async(go_on.wait)(5))
                    await settle()
            assert log == []
            go_on.set()
            await working
            await sync_to_async(lambda: None)()  # the thread has got so far
        assert log == ["well"]
        assert len(threads) == 1
        assert caplog.text == ""

    async def test_what_waits_for_its_thread_is_torn_down_though_cancelled(
        self, log: list[str]
    ) -> None:
        busy, go_on = threading.Event(), threading.Event()

        @request_scoped
        def tenant() -> Iterator[str]:
            try:
                yield "tenant"
            finally:
                log.append("tenant")

        @request_scoped
        async def db() -> AsyncIterator[str]:
            try:
                yield "db"
            finally:
                log.append("db")

        def work() -> None:
            busy.set()
            go_on.wait(5)

        async def request() -> None:
            async with request_scope():
                await db()
                await sync_to_async(tenant)()
                working.append(asyncio.create_task(sync_to_async(work)()))
                await asyncio.to_thread(busy.wait)

        working: list[asyncio.Task[None]] = []
        async with ThreadSensitiveContext():
            task = asyncio.create_task(request())
            await asyncio.to_thread(busy.wait, 5)
            while not task.done():
                for _ in range(3):
                    task.cancel()
                    await settle()
                go_on.set()
                await asyncio.wait([task], timeout=5)
            await working[0]
        assert task.cancelled()
        assert log == ["tenant", "db"]

    @pytest.mark.usefixtures("short_patience")
    async def test_a_set_up_that_will_not_end_when_cancelled_is_cancelled_again(
        self, log: list[str], tracked: Make
    ) -> None:
        @request_scoped
        async def stubborn() -> str:
            try:
                await asyncio.Event().wait()
            finally:
                log.append("stubborn")
                await asyncio.Event().wait()
            return "never"

        async with request_scope():
            await tracked("one")()
            stray = asyncio.create_task(stubborn())
            await settle()
        assert log == ["stubborn", "one"]
        with pytest.raises(ScopeClosedError):
            await stray

    @WHERE
    async def test_cancelled_by_anyio_again_at_every_await(
        self, where: str, log: list[str], tracked: Make
    ) -> None:
        async def wait() -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            log.append("complete")

        with anyio.CancelScope() as cancel_scope:
            async with request_scope() as scope:
                await ask(tracked("one", wait), where)
                await ask(tracked("two", wait), where)
                cancel_scope.cancel()
                await anyio.sleep_forever()
        assert cancel_scope.cancelled_caught
        # In the owner each is cut short, as in any `async with`. A keeper is out of reach.
        assert log == (
            ["two", "one"] if where == "owner" else ["two", "complete", "one", "complete"]
        )
        assert not scope.records
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    async def test_closed_twice_it_tears_down_once(self, log: list[str], tracked: Make) -> None:
        async with request_scope() as scope:
            await tracked("one")()
            await scope.close()
            await scope.close()
        assert log == ["one"]

    async def test_a_set_up_in_a_keeper_is_cancelled_when_the_scope_closes(
        self, log: list[str], tracked: Make
    ) -> None:
        one = tracked("one")

        @request_scoped
        async def slow() -> AsyncIterator[str]:
            await one()
            try:
                await asyncio.Event().wait()
            finally:
                log.append("slow ended")
            yield "never"

        async with request_scope():
            stray = asyncio.create_task(slow())
            await settle()
        assert log == ["slow ended", "one"]
        with pytest.raises(ScopeClosedError):
            await stray

    @pytest.mark.parametrize("fails", [False, True], ids=["well", "badly"])
    async def test_a_set_up_that_completes_though_the_scope_closes_is_torn_down_at_once(
        self, fails: bool, log: list[str], tracked: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        one = tracked("one")

        @request_scoped
        async def stubborn() -> AsyncIterator[str]:
            await one()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            log.append("stubborn set up")
            try:
                yield "too late"
            except ValueError:
                await asyncio.sleep(0)
                log.append("stubborn torn down, and knows why")
                if fails:
                    raise KeyError("the teardown") from None

        async def use_it() -> None:
            async with request_scope():
                strays.append(asyncio.create_task(stubborn()))
                await settle()
                raise ValueError("the body")

        strays: list[asyncio.Task[str]] = []
        with pytest.raises(ValueError, match="the body"):
            await use_it()
        assert log == ["stubborn set up", "stubborn torn down, and knows why", "one"]
        with pytest.raises(ScopeClosedError):
            await strays[0]
        assert ("the teardown" in caplog.text) is fails

    async def test_a_set_up_in_a_thread_that_comes_too_late_is_torn_down_there(
        self, log: list[str]
    ) -> None:
        tenant, begun, go_on = set_up_late(request_scoped, "tenant", log)
        async with request_scope() as scope:
            stray = asyncio.create_task(asyncio.to_thread(tenant))
            await asyncio.to_thread(begun.wait, 5)
        assert log == []
        go_on.set()
        with pytest.raises(ScopeClosedError):
            await stray
        assert log == ["tenant"]
        assert what_is_kept(scope) == []

    async def test_that_of_a_lifespan_in_the_thread_that_it_has_of_its_own(
        self, log: list[str]
    ) -> None:
        settings, begun, go_on = set_up_late(lifespan_scoped, "settings", log)
        async with lifespan_scope():
            stray = asyncio.create_task(asyncio.to_thread(settings))
            await asyncio.to_thread(begun.wait, 5)
        assert log == []
        go_on.set()
        with pytest.raises(ScopeClosedError):
            await stray
        assert log == ["settings"]

    async def test_that_of_a_lifespan_in_the_thread_that_was_lent_for_it(
        self, log: list[str]
    ) -> None:
        """Which does not wait for what it is itself to do."""
        settings, begun, go_on = set_up_late(lifespan_scoped, "settings", log)
        with LentThread():  # as in a request
            async with lifespan_scope():
                stray = asyncio.create_task(sync_to_async(settings)())
                await asyncio.to_thread(begun.wait, 5)
            assert log == []
            go_on.set()
            with pytest.raises(ScopeClosedError):
                await stray
        assert log == ["settings"]

    @pytest.mark.parametrize("fails", [False, True], ids=["well", "badly"])
    def test_so_is_one_whose_scope_another_thread_has_closed_meanwhile(
        self, fails: bool, log: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        @request_scoped
        def tenant() -> Iterator[str]:
            closer = threading.Thread(target=run_without_loop, args=[scope.close()])
            closer.start()
            closer.join()
            yield "tenant"
            log.append("tenant")
            if fails:
                raise ValueError("the teardown")

        with request_scope() as scope, pytest.raises(ScopeClosedError):
            tenant()
        assert log == ["tenant"]
        assert ("the teardown" in caplog.text) is fails
        assert what_is_kept(scope) == []

    @pytest.mark.parametrize("failure", [None, ValueError("the body")])
    async def test_a_teardown_that_the_garbage_collector_ends_is_closed(
        self, failure: Exception | None, log: list[str], tracked: Make
    ) -> None:
        """As where an event loop is closed without a word to its tasks."""

        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            except GeneratorExit:
                log.append("closed")
                raise

        scope = request_scope()
        await scope.__aenter__()
        await tracked("db", hang)()
        closing = scope.close(failure)
        closing.send(None)
        assert log == ["db"]
        closing.close()
        scope.leave()
        del closing, scope
        gc.collect()
        await settle()
        assert log == ["db", "closed"]


CURRENT: ContextVar[str] = ContextVar("CURRENT", default="unset")


class TestSameTaskSameContext:
    """Promise 10, traps 17 and 24."""

    @WHERE
    async def test_set_up_and_teardown_run_in_one_task(self, where: str) -> None:
        tasks: list[object] = []

        @request_scoped
        async def db() -> AsyncIterator[None]:
            tasks.append(asyncio.current_task())
            yield
            tasks.append(asyncio.current_task())

        async with request_scope():
            await ask(db, where)
        assert tasks[0] is tasks[1]
        assert (tasks[0] is asyncio.current_task()) is (where == "owner")

    @WHERE
    async def test_a_token_can_be_reset(self, where: str, log: list[str]) -> None:
        @request_scoped
        async def language() -> AsyncIterator[str]:
            token = CURRENT.set("de")
            yield CURRENT.get()
            log.append(CURRENT.get())
            CURRENT.reset(token)
            log.append(CURRENT.get())

        CURRENT.set("en")
        async with request_scope():
            assert await ask(language, where) == "de"
        assert log == ["de", "en"]

    @pytest.mark.parametrize("where", ["owner", "child", "thread"])
    async def test_a_token_of_a_sync_generator_too(self, where: str, log: list[str]) -> None:
        @request_scoped
        def language() -> Iterator[str]:
            token = CURRENT.set("de")
            yield CURRENT.get()
            log.append(CURRENT.get())
            CURRENT.reset(token)
            log.append(CURRENT.get())

        async def child() -> str:
            return language()

        CURRENT.set("en")
        async with request_scope():
            if where == "owner":
                assert language() == "de"
            elif where == "child":
                assert await asyncio.create_task(child()) == "de"
            else:
                assert await sync_to_async(language)() == "de"
        assert log == ["de", "en"]

    async def test_a_keeper_does_not_mix_its_context_variables_with_anyones(self) -> None:
        @request_scoped
        async def language() -> AsyncIterator[str]:
            CURRENT.set("de")
            yield CURRENT.get()

        async def child() -> str:
            await language()
            return CURRENT.get()

        CURRENT.set("en")
        async with request_scope():
            assert await asyncio.create_task(child()) == "en"
        assert CURRENT.get() == "en"

    @WHERE
    async def test_asyncio_timeout_across_the_yield(self, where: str, log: list[str]) -> None:
        @request_scoped
        async def db() -> AsyncIterator[None]:
            async with asyncio.timeout(10):
                yield
            log.append("in time")

        async with request_scope():
            await ask(db, where)
        assert log == ["in time"]

    async def test_asyncio_timeout_that_expires_in_a_keeper_is_told_at_the_end_of_the_scope(
        self, log: list[str], tracked: Make
    ) -> None:
        @request_scoped
        async def db() -> AsyncIterator[None]:
            async with asyncio.timeout(0):
                yield
            log.append("in time")

        with pytest.raises(TeardownError) as caught:
            async with request_scope() as scope:
                await tracked("one")()
                await ask(db, "child")
                await asyncio.sleep(0.01)
                assert scope.is_open
        assert [type(error) for error in caught.value.exceptions] == [TimeoutError]
        assert log[-1] == "one"

    @WHERE
    @pytest.mark.parametrize("group", [asyncio.TaskGroup, anyio.create_task_group])
    async def test_a_task_group_across_the_yield(
        self, where: str, group: Any, log: list[str]
    ) -> None:
        @request_scoped
        async def worker() -> AsyncIterator[asyncio.Event]:
            event = asyncio.Event()

            async def work() -> None:
                await event.wait()
                log.append("worked")

            async with group() as tasks:
                if group is asyncio.TaskGroup:
                    tasks.create_task(work())
                else:
                    tasks.start_soon(work)
                yield event
                event.set()
            log.append("group ended")

        async with request_scope():
            assert not (await ask(worker, where)).is_set()
        assert log == ["worked", "group ended"]

    @WHERE
    @pytest.mark.parametrize("group", [asyncio.TaskGroup, anyio.create_task_group])
    async def test_a_task_group_gives_the_failure_back_in_a_group_and_that_is_no_error(
        self, where: str, group: Any, log: list[str]
    ) -> None:
        @request_scoped
        async def worker() -> AsyncIterator[None]:
            async with group(), group():
                yield

        with pytest.raises(ValueError, match="the body"):
            async with request_scope():
                await ask(worker, where)
                raise ValueError("the body")

    @WHERE
    async def test_but_what_else_is_in_the_group_is(self, where: str) -> None:
        @request_scoped
        async def worker() -> AsyncIterator[None]:
            async def fail() -> None:
                try:
                    await asyncio.Event().wait()
                finally:
                    raise KeyError("worker")

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fail())
                await asyncio.sleep(0)
                yield

        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await ask(worker, where)
                raise ValueError("the body")
        assert caught.group_contains(KeyError)

    @WHERE
    async def test_an_anyio_cancel_scope_across_the_yield(self, where: str, log: list[str]) -> None:
        @request_scoped
        async def db() -> AsyncIterator[None]:
            with anyio.fail_after(10):
                yield
                await anyio.lowlevel.checkpoint()
            log.append("in time")

        async with request_scope():
            await ask(db, where)
        assert log == ["in time"]


class TestTheFactorySeesTheFailure:
    """Promise 11, trap 14."""

    @WHERE
    @pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt(), StopIteration(1)])
    async def test_it_is_thrown_in_at_the_yield(
        self, where: str, failure: BaseException, log: list[str]
    ) -> None:
        @request_scoped
        async def db() -> AsyncIterator[None]:
            try:
                yield
            except BaseException as error:
                log.append("the same" if error is failure else repr(error))
                raise

        @request_scoped
        def plain() -> Iterator[None]:
            try:
                yield
            except BaseException as error:
                log.append("the same" if error is failure else repr(error))
                raise

        scope = request_scope()
        await scope.__aenter__()
        await ask(db, where)
        plain()
        await scope.__aexit__(type(failure), failure, None)
        assert log == ["the same", "the same"]

    @WHERE
    async def test_a_cancellation_is_seen_too(self, where: str, log: list[str]) -> None:
        @request_scoped
        async def db() -> AsyncIterator[None]:
            try:
                yield
            except asyncio.CancelledError:
                log.append("cancelled")
                await asyncio.sleep(0)
                log.append("rolled back")
                raise

        async def request() -> None:
            async with request_scope():
                await ask(db, where)
                await asyncio.Event().wait()

        task = asyncio.create_task(request())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["cancelled", "rolled back"]

    @WHERE
    async def test_one_that_swallows_it_does_not_hide_it_from_the_others(
        self, where: str, log: list[str]
    ) -> None:
        def make() -> Any:
            @request_scoped
            async def swallowing() -> AsyncIterator[None]:
                try:
                    yield
                except ValueError:
                    log.append("seen")

            return swallowing

        with pytest.raises(ValueError, match="the body"):
            async with request_scope():
                await ask(make(), where)
                await ask(make(), where)
                raise ValueError("the body")
        assert log == ["seen", "seen"]

    @WHERE
    async def test_one_that_raises_another_is_an_error_of_the_teardown(self, where: str) -> None:
        @request_scoped
        async def translating() -> AsyncIterator[None]:
            try:
                yield
            except ValueError as error:
                raise KeyError("translated") from error

        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await ask(translating, where)
                raise ValueError("the body")
        assert [type(error) for error in caught.value.exceptions] == [KeyError]
        assert isinstance(caught.value.__context__, ValueError)

    @WHERE
    async def test_one_that_handles_a_part_of_a_group_has_not_failed_with_the_rest(
        self, where: str, log: list[str]
    ) -> None:
        @request_scoped
        async def db() -> AsyncIterator[None]:
            try:
                yield
            except* KeyError:
                log.append("db handles a KeyError")

        @request_scoped
        def plain() -> Iterator[None]:
            try:
                yield
            except* ValueError:
                log.append("plain handles a ValueError")

        @request_scoped
        async def grouped() -> AsyncIterator[None]:
            async with asyncio.TaskGroup():
                await ask(db, where)
                yield

        inner = ExceptionGroup("inner", [KeyError(1), OSError(3)])
        failure = ExceptionGroup("the body", [ValueError(2), inner])
        with pytest.raises(ExceptionGroup) as caught:
            async with request_scope():
                await ask(grouped, where)
                plain()
                raise failure
        assert caught.value is failure
        assert log == ["plain handles a ValueError", "db handles a KeyError"]

    @WHERE
    async def test_but_with_what_it_adds_to_the_rest(self, where: str) -> None:
        @request_scoped
        async def db() -> AsyncIterator[None]:
            try:
                yield
            except* KeyError as group:
                raise LookupError("translated") from group

        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await ask(db, where)
                raise ExceptionGroup("the body", [KeyError(1), ValueError(2)])
        [error] = caught.value.exceptions
        assert isinstance(error, ExceptionGroup)
        assert "translated" in repr(error.exceptions)

    async def test_its_traceback_does_not_grow_with_every_factory(self, tracked: Make) -> None:
        def frames(error: BaseException) -> list[str]:
            found, traceback = [], error.__traceback__
            while traceback is not None:
                found.append(traceback.tb_frame.f_code.co_name)
                traceback = traceback.tb_next
            return found

        with pytest.raises(ValueError, match="the body") as caught:
            async with request_scope():
                for name in "abc":
                    await ask(tracked(name), "owner")
                    await ask(tracked(name), "child")
                raise ValueError("the body")
        assert "resource" not in frames(caught.value)

    async def test_a_failure_that_is_falsy_is_one(self, log: list[str]) -> None:
        class EmptyError(Exception):
            def __bool__(self) -> bool:
                return False

        @request_scoped
        async def db() -> AsyncIterator[None]:
            try:
                yield
                log.append("committed")
            except EmptyError:
                log.append("rolled back")

        with pytest.raises(EmptyError):
            async with request_scope():
                await ask(db, "owner")
                raise EmptyError
        with pytest.raises(EmptyError):
            async with request_scope():
                await ask(db, "child")
                raise EmptyError
        assert log == ["rolled back", "rolled back"]

    async def test_a_scope_in_an_async_generator_that_is_closed(self, log: list[str]) -> None:
        @request_scoped
        async def db() -> AsyncIterator[None]:
            try:
                yield
            except GeneratorExit:
                log.append("closed")
                raise

        async def stream() -> Any:
            async with request_scope():
                await ask(db, "owner")
                yield 1

        chunks = stream()
        assert await anext(chunks) == 1
        await chunks.aclose()
        assert log == ["closed"]

    @WHERE
    @pytest.mark.parametrize("failure", [None, ValueError("the body")])
    async def test_one_that_yields_twice_is_named(
        self, where: str, failure: Exception | None, log: list[str], tracked: Make
    ) -> None:
        @request_scoped
        async def twice() -> AsyncIterator[int]:
            with suppress(ValueError):
                yield 1
            try:
                yield 2
            finally:
                log.append("closed")

        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await tracked("one")()
                await ask(twice, where)
                if failure is not None:
                    raise failure
        assert log == ["closed", "one"]
        (error,) = caught.value.exceptions
        assert isinstance(error, FactoryError)
        assert str(twice.resource) in str(error)


class TestAfterTheEnd:
    """Promise 13, trap 19."""

    @WHERE
    async def test_a_task_that_outlives_its_scope_is_told_so(
        self, where: str, tracked: Make
    ) -> None:
        db, other = tracked("db"), tracked("other")
        go_on = asyncio.Event()

        async def outlive() -> str:
            await go_on.wait()
            with pytest.raises(ScopeClosedError):
                await other()
            return await db()

        async with request_scope():
            await ask(db, where)
            task = asyncio.create_task(outlive())
            await settle()
        go_on.set()
        with pytest.raises(ScopeClosedError, match=r"the request scope.*async with") as caught:
            await task
        assert caught.value.resource is db.resource
        assert str(db.resource) in str(caught.value)

    async def test_so_is_one_that_waits_for_a_set_up_when_the_scope_closes(self) -> None:
        @request_scoped
        async def slow() -> None:
            await asyncio.Event().wait()

        async with request_scope():
            tasks = [asyncio.create_task(slow()) for _ in range(3)]
            await settle()
        for task in tasks:
            with pytest.raises(ScopeClosedError):
                await task

    async def test_so_is_a_teardown_that_asks_for_what_was_never_set_up(
        self, tracked: Make
    ) -> None:
        other = tracked("other")
        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await tracked("db", other)()
        assert [type(error) for error in caught.value.exceptions] == [ScopeClosedError]

    async def test_or_for_itself(self, tracked: Make) -> None:
        @request_scoped
        async def db() -> AsyncIterator[None]:
            yield
            await db()

        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await db()
        assert [type(error) for error in caught.value.exceptions] == [ScopeClosedError]

    def test_so_is_sync_code(self) -> None:
        @request_scoped
        def tenant() -> str:
            return "tenant"

        with request_scope():
            tenant()
            context = contextvars.copy_context()
        with pytest.raises(ScopeClosedError):
            context.run(tenant)

    async def test_a_scope_of_its_own_is_the_way_out(self, log: list[str], tracked: Make) -> None:
        db = tracked("db")
        go_on = asyncio.Event()

        async def outlive() -> str:
            await go_on.wait()
            async with request_scope():
                return await db()

        async with request_scope():
            await db()
            task = asyncio.create_task(outlive())
        go_on.set()
        assert await task == "db"
        assert log == ["db", "db"]

    def test_a_scope_is_opened_once(self) -> None:
        with request_scope() as scope:
            pass
        with pytest.raises(RuntimeError, match="opened before"):
            scope.open()


class Thing:
    """Something that can be seen to be gone."""


class TestNothingIsKept:
    """Promise 14."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> None:
        gc.collect()

    @WHERE
    @pytest.mark.parametrize("kind", ["async generator", "coroutine function"])
    async def test_a_stray_task_keeps_no_value_alive(self, where: str, kind: str) -> None:
        if kind == "async generator":

            @request_scoped
            async def thing() -> AsyncIterator[Thing]:
                yield Thing()
        else:

            @request_scoped
            async def thing() -> Thing:
                return Thing()

        @request_scoped
        def plain() -> Iterator[Thing]:
            yield Thing()

        async with request_scope() as scope:
            gone = [weakref.ref(await ask(thing, where)), weakref.ref(plain())]
            gone.append(weakref.ref(await sync_to_async(plain)()))
            await sync_to_async(lambda: None)()  # the thread lets go of it
            stray = asyncio.create_task(asyncio.Event().wait())
            await settle()
        gc.collect()
        assert [reference() for reference in gone] == [None] * 3
        assert what_is_kept(scope) == []
        stray.cancel()

    @WHERE
    async def test_nor_one_that_the_factory_has_started(self, where: str) -> None:
        strays: list[asyncio.Task[Any]] = []

        @request_scoped
        async def thing() -> AsyncIterator[Thing]:
            strays.append(asyncio.create_task(asyncio.Event().wait()))
            yield Thing()

        async with request_scope():
            gone = weakref.ref(await ask(thing, where))
        gc.collect()
        assert gone() is None
        strays[0].cancel()

    @pytest.mark.parametrize("where", ["owner", "child", "sync", "thread"])
    async def test_nor_does_it_keep_the_error_of_a_factory_that_failed(self, where: str) -> None:
        strays: list[Any] = []
        gone: list[weakref.ref[Any]] = []

        class FailedError(Exception):
            pass

        def fail() -> Any:
            thing = Thing()
            error = FailedError(thing)
            gone.extend([weakref.ref(error), weakref.ref(thing)])
            raise error

        @request_scoped
        async def failing() -> AsyncIterator[Thing]:
            strays.append(asyncio.create_task(asyncio.Event().wait()))
            await asyncio.sleep(0)
            yield fail()

        @request_scoped
        def failing_sync() -> Iterator[Thing]:
            strays.append(contextvars.copy_context())
            yield fail()

        async def request() -> None:
            async with request_scope():
                if where == "sync":
                    with pytest.raises(FailedError):
                        failing_sync()
                elif where == "thread":
                    with pytest.raises(FailedError):
                        await sync_to_async(failing_sync)()
                else:
                    results = await asyncio.gather(
                        ask(failing, where), failing(), return_exceptions=True
                    )
                    assert {type(result) for result in results} == {FailedError}

        await asyncio.create_task(request())
        await sync_to_async(lambda: None)()  # the thread lets go of its work when it has other
        await settle()
        gc.collect()
        assert len(gone) >= 2
        assert {reference() for reference in gone} == {None}
        for stray in strays:
            if isinstance(stray, asyncio.Task):
                stray.cancel()

    @WHERE
    async def test_nor_what_the_scope_has_failed_with(self, where: str, tracked: Make) -> None:
        class FailedError(Exception):
            pass

        strays: list[asyncio.Task[Any]] = []

        async def request() -> weakref.ref[FailedError]:
            error = FailedError()
            gone = weakref.ref(error)
            try:
                async with request_scope():
                    await ask(tracked("db"), where)
                    strays.append(asyncio.create_task(asyncio.Event().wait()))
                    raise error
            except FailedError:
                del error
            return gone

        gone = await asyncio.create_task(request())
        gc.collect()
        assert gone() is None
        strays[0].cancel()

    async def test_nor_the_task_that_opened_the_scope(self, tracked: Make) -> None:
        strays: list[asyncio.Task[Any]] = []

        async def request() -> None:
            async with request_scope():
                await ask(tracked("db"), "child")
                strays.append(asyncio.create_task(asyncio.Event().wait()))

        task = asyncio.create_task(request())
        gone = weakref.ref(task)
        await task
        del task
        await settle()  # the event loop has it in hand until then
        gc.collect()
        assert gone() is None
        strays[0].cancel()

    @WHERE
    async def test_values_go_without_the_garbage_collector(self, where: str) -> None:
        @request_scoped
        async def thing() -> AsyncIterator[Thing]:
            yield Thing()

        gc.disable()
        try:
            async with request_scope():
                gone = weakref.ref(await ask(thing, where))
                await settle()
            assert gone() is None
        finally:
            gc.enable()

    async def test_a_scope_keeps_no_closed_one_whose_context_it_was_opened_in(self) -> None:
        async with request_scope() as scope:
            context = contextvars.copy_context()
        gone = weakref.ref(scope)
        del scope

        async def next_request() -> None:
            async with request_scope():
                await settle()
                gc.collect()
                assert gone() is None

        task = context.run(asyncio.create_task, next_request())
        del context
        await task

    async def test_nested_scopes_make_no_chain(self) -> None:
        references: list[weakref.ref[Any]] = []

        async def nest(depth: int) -> None:
            async with request_scope() as scope:
                references.append(weakref.ref(scope))
                if depth:
                    await asyncio.create_task(nest(depth - 1))
                else:
                    strays.append(asyncio.create_task(asyncio.Event().wait()))
                del scope

        strays: list[asyncio.Task[Any]] = []
        await asyncio.create_task(nest(5))
        gc.collect()
        alive = [reference() for reference in references]
        assert alive[:5] == [None] * 5
        assert alive[5] is not None  # in the stray's Context
        strays[0].cancel()


async def test_an_async_context_manager_around_the_yield_is_what_it_is_made_for(
    log: list[str],
) -> None:
    """Promise 11."""

    @asynccontextmanager
    async def connect() -> AsyncIterator[str]:
        try:
            yield "connection"
        except ValueError:
            log.append("rolled back")
            raise
        else:
            log.append("committed")
        finally:
            await asyncio.sleep(0)
            log.append("closed")

    @request_scoped
    async def db() -> AsyncIterator[str]:
        async with connect() as connection:
            yield connection

    async with request_scope():
        await db()
    assert log == ["committed", "closed"]
    log.clear()
    with pytest.raises(ValueError, match="no"):
        async with request_scope():
            await db()
            raise ValueError("no")
    assert log == ["rolled back", "closed"]


async def test_a_lifespan_tears_down_all_of_it_too(log: list[str], caplog: Any) -> None:
    """Promise 8."""

    caplog.set_level(logging.ERROR)

    @lifespan_scoped
    async def one() -> AsyncIterator[None]:
        yield
        log.append("one")

    @lifespan_scoped
    async def two() -> AsyncIterator[None]:
        await one()
        yield
        log.append("two")
        raise ValueError("two")

    with pytest.raises(TeardownError, match="the lifespan"):
        async with lifespan_scope():
            await two()
    assert log == ["two", "one"]
