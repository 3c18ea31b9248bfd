"""Promises 1 to 5 and 17: what happens when a resource is first asked for."""

import asyncio
import contextvars
import gc
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
from asgiref.sync import async_to_sync, sync_to_async

from scoped import (
    AsyncResourceError,
    CircularResourceError,
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
from scoped.core import first_use
from tests.slowness import within
from tests.tables import under_way, what_is_kept


async def settle() -> None:
    """Let every other task run until it waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)


def other_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


class Pool:
    """A pool of connections, as small as can be."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free: asyncio.Queue[object] = asyncio.Queue()
        for number in range(size):
            self.free.put_nowait(number)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[object]:
        connection = await self.free.get()
        try:
            await asyncio.sleep(0)
            yield connection
        finally:
            self.free.put_nowait(connection)


class TestLazy:
    """Promise 1."""

    async def test_a_resource_is_set_up_when_it_is_first_asked_for(self) -> None:
        log: list[str] = []

        @request_scoped
        async def db() -> AsyncIterator[str]:
            log.append("set up")
            yield "db"
            log.append("torn down")

        async with request_scope():
            log.append("opened")
            assert await db() == "db"
            log.append("used")
        assert log == ["opened", "set up", "used", "torn down"]

    async def test_a_scope_that_is_asked_for_nothing_makes_no_task_and_no_thread(self) -> None:
        tasks: list[object] = []
        loop = asyncio.get_running_loop()

        def factory(
            loop: asyncio.AbstractEventLoop, coroutine: Any, **kwargs: Any
        ) -> asyncio.Task[Any]:
            tasks.append(coroutine)
            return asyncio.Task(coroutine, loop=loop, **kwargs)

        threads = threading.active_count()
        loop.set_task_factory(factory)
        try:
            async with request_scope():
                pass
        finally:
            loop.set_task_factory(None)
        assert tasks == []
        assert threading.active_count() == threads

    async def test_the_owner_sets_up_in_its_own_task(self) -> None:
        @request_scoped
        async def task() -> AsyncIterator[object]:
            yield asyncio.current_task()

        async with request_scope():
            assert await task() is asyncio.current_task()
            assert other_tasks() == set()

    async def test_a_coroutine_function_asked_for_in_a_child_leaves_no_task_behind(self) -> None:
        @request_scoped
        async def user() -> str:
            await asyncio.sleep(0)
            return "user"

        async with request_scope():
            assert await asyncio.create_task(user()) == "user"
            await settle()
            assert other_tasks() == set()

    @pytest.mark.parametrize("who", ["owner", "child", "factory"])
    async def test_its_factory_finds_no_exception_at_hand(self, who: str) -> None:
        """What is raised while another is handled reads as if that were its cause."""
        at_hand: list[BaseException | None] = []

        @request_scoped
        async def broken() -> None:
            at_hand.append(sys.exc_info()[1])
            raise LookupError("no such table")

        @request_scoped
        async def user() -> None:
            await broken()

        async with request_scope():
            with pytest.raises(LookupError) as raised:
                if who == "child":
                    await asyncio.create_task(broken())
                else:
                    await (broken if who == "owner" else user)()
        assert at_hand == [None]
        assert raised.value.__context__ is None

    def test_a_sync_factory_finds_none_either(self) -> None:
        at_hand: list[BaseException | None] = []

        @request_scoped
        def tenant() -> str:
            at_hand.append(sys.exc_info()[1])
            return "tenant"

        with request_scope():
            tenant()
        assert at_hand == [None]


class TestOne:
    """Promise 2, traps 10 and 12."""

    async def test_every_kind_of_caller_gets_the_same_object(self) -> None:
        made: list[object] = []

        @request_scoped
        async def db() -> AsyncIterator[object]:
            made.append(object())
            yield made[-1]

        async def nested() -> object:
            async with asyncio.TaskGroup() as group:
                return await group.create_task(db())

        async with request_scope():
            found = [
                await asyncio.create_task(db()),  # first used in a child: the parent sees it
                await db(),
                *await asyncio.gather(db(), db(), nested()),
                await sync_to_async(async_to_sync(db))(),
                await sync_to_async(async_to_sync(db), thread_sensitive=False)(),
            ]
        assert len(made) == 1
        assert all(one is made[0] for one in found)

    async def test_first_used_in_a_thread_for_sync_code_parent_and_siblings_see_it(self) -> None:
        made: list[object] = []

        @request_scoped
        async def db() -> AsyncIterator[object]:
            await asyncio.sleep(0)
            made.append(object())
            yield made[-1]

        async with request_scope():
            first = await sync_to_async(async_to_sync(db))()
            assert await db() is first
            assert await asyncio.gather(db(), db()) == [first, first]
        assert len(made) == 1

    @pytest.mark.parametrize("who", ["children", "owner too"])
    async def test_asked_for_by_many_at_once_it_is_set_up_once(self, who: str) -> None:
        log: list[str] = []
        pool = Pool(3)

        @request_scoped
        async def db() -> AsyncIterator[object]:
            async with pool.acquire() as connection:
                log.append("set up")
                yield connection
                log.append("torn down")

        async with request_scope():
            tasks = [asyncio.create_task(db()) for _ in range(20)]
            if who == "owner too":
                tasks.append(asyncio.ensure_future(asyncio.sleep(0, await db())))
            assert len(set(await asyncio.gather(*tasks))) == 1
            assert pool.free.qsize() == 2
        assert log == ["set up", "torn down"]
        assert pool.free.qsize() == pool.size

    async def test_unrelated_resources_are_set_up_in_parallel(self) -> None:
        meeting = asyncio.Barrier(2)

        @request_scoped
        async def one() -> int:
            await meeting.wait()
            return 1

        @request_scoped
        async def two() -> int:
            await meeting.wait()
            return 2

        async with request_scope():
            assert await asyncio.gather(one(), two()) == [1, 2]

    def test_a_sync_resource_asked_for_by_many_threads_at_once_is_set_up_once(self) -> None:
        made: list[object] = []
        meeting = threading.Barrier(8)

        @request_scoped
        def tenant() -> Iterator[object]:
            made.append(object())
            meeting.reset() if meeting.n_waiting else None
            yield made[-1]
            made.append("torn down")

        def ask() -> object:
            meeting.wait()
            return tenant()

        for _ in range(20):
            made.clear()
            with request_scope(), ThreadPoolExecutor(8) as threads:
                asking = [threads.submit(contextvars.copy_context().run, ask) for _ in range(8)]
                found = {task.result() for task in asking}
            assert found == {made[0]}
            assert made[1:] == ["torn down"]

    def test_a_thread_that_is_overtaken_between_look_and_claim_does_not_set_up_again(self) -> None:
        log: list[str] = []

        @request_scoped
        def tenant() -> object:
            log.append("set up")
            return object()

        class Overtaken(dict[Any, Any]):
            def setdefault(self, key: Any, value: Any = None) -> Any:
                if not found:
                    found.append(None)
                    found.append(tenant())
                return super().setdefault(key, value)

        found: list[object] = []
        with request_scope() as scope:
            scope.records = Overtaken()
            assert tenant() is found[1]
            assert under_way(scope) == []
        assert log == ["set up"]

    def test_threads_that_wait_for_a_sync_resource_get_it_when_it_is_set_up(self) -> None:
        log: list[str] = []
        begun, go_on = threading.Event(), threading.Event()

        @request_scoped
        def tenant() -> object:
            log.append("set up")
            begun.set()
            assert go_on.wait(5)
            return object()

        with request_scope() as scope, ThreadPoolExecutor(3) as threads:
            first = threads.submit(contextvars.copy_context().run, tenant)
            assert begun.wait(5)
            others = [threads.submit(contextvars.copy_context().run, tenant) for _ in range(2)]
            assert under_way(scope) == [tenant.resource]
            go_on.set()
            assert {task.result(5) for task in others} == {first.result(5)}
        assert log == ["set up"]

    async def test_none_and_other_falsy_values_are_values(self) -> None:
        log: list[str] = []

        @request_scoped
        async def nothing() -> None:
            log.append("async")

        @request_scoped
        def zero() -> int:
            log.append("sync")
            return 0

        async with request_scope():
            for _ in range(2):
                assert await nothing() is None
                assert zero() == 0
        assert log == ["async", "sync"]

    @pytest.mark.only_if(sys.version_info >= (3, 12), reason="eager tasks came with Python 3.12")
    async def test_eager_tasks_change_nothing(self) -> None:
        log: list[str] = []

        @request_scoped
        async def at_once() -> AsyncIterator[str]:
            log.append("at once")
            yield "a"
            log.append("at once torn down")

        @request_scoped
        async def later() -> AsyncIterator[str]:
            await at_once()
            await asyncio.sleep(0)
            log.append("later")
            yield "b"
            log.append("later torn down")

        @request_scoped
        async def failing() -> str:
            log.append("failing")
            raise ValueError("no")

        @request_scoped
        async def circle() -> str:
            return await asyncio.create_task(circle())

        loop = asyncio.get_running_loop()
        loop.set_task_factory(vars(asyncio)["eager_task_factory"])  # not in 3.11
        try:
            async with request_scope():
                assert await asyncio.gather(later(), later(), at_once()) == ["b", "b", "a"]
                failed = await asyncio.gather(failing(), failing(), return_exceptions=True)
                assert [type(error) for error in failed] == [ValueError, ValueError]
                with pytest.raises(CircularResourceError):
                    await asyncio.create_task(circle())
                keeper_of_nobody = asyncio.create_task(later())
            await keeper_of_nobody
        finally:
            loop.set_task_factory(None)
        assert log[:2] == ["at once", "later"]
        assert log[-2:] == ["later torn down", "at once torn down"]
        assert log.count("failing") == 2  # ended at once, so the second did not wait
        assert other_tasks() == set()


class TestWaitersAreInnocent:
    """Promise 3, traps 9 and 11."""

    async def test_a_waiting_task_takes_over_when_the_first_is_cancelled(self) -> None:
        log: list[str] = []
        begun = asyncio.Event()

        @request_scoped
        async def db() -> AsyncIterator[str]:
            log.append("begun")
            begun.set()
            await (asyncio.sleep(0) if len(log) > 1 else asyncio.Event().wait())
            yield "db"
            log.append("torn down")

        async def own(scope_is_open: asyncio.Future[contextvars.Context]) -> None:
            async with request_scope():
                scope_is_open.set_result(contextvars.copy_context())
                try:
                    await db()
                except asyncio.CancelledError:
                    log.append("owner cancelled")
                assert await waiting == ["db", "db"]

        scope_is_open: asyncio.Future[contextvars.Context] = asyncio.Future()
        owner = asyncio.create_task(own(scope_is_open))
        context = await scope_is_open
        await begun.wait()

        async def wait_for_both() -> list[str]:
            return await asyncio.gather(db(), db())

        waiting = context.run(asyncio.create_task, wait_for_both())
        await settle()
        assert log == ["begun"]
        owner.cancel()
        await owner
        assert log == ["begun", "owner cancelled", "begun", "torn down"]
        assert other_tasks() == set()

    async def test_a_child_that_asked_first_is_cancelled_and_the_waiting_get_its_work(self) -> None:
        log: list[str] = []
        go_on = asyncio.Event()

        @request_scoped
        async def db() -> AsyncIterator[str]:
            log.append("begun")
            await go_on.wait()
            yield "db"
            log.append("torn down")

        async with request_scope():
            first = asyncio.create_task(db())
            await settle()
            second, third = asyncio.create_task(db()), asyncio.create_task(db())
            await settle()
            first.cancel()
            await settle()
            assert first.cancelled()
            second.cancel()
            await settle()
            assert second.cancelled()
            go_on.set()
            assert await third == "db"
        assert log == ["begun", "torn down"]

    async def test_a_set_up_that_nobody_waits_for_any_more_is_cancelled(self) -> None:
        log: list[str] = []
        pool = Pool(1)

        @request_scoped
        async def db() -> AsyncIterator[object]:
            try:
                async with pool.acquire() as connection:
                    yield connection
            except asyncio.CancelledError:
                log.append("cancelled")
                raise

        async with request_scope() as scope, pool.acquire():
            asking = asyncio.create_task(db())
            await settle()
            asking.cancel()
            await settle()
            assert log == ["cancelled"]
            assert under_way(scope) == []
            assert other_tasks() == set()
        assert pool.free.qsize() == pool.size

    async def test_an_asker_is_cancelled_in_the_moment_in_which_its_keeper_starts(self) -> None:
        log: list[str] = []

        @request_scoped
        async def db() -> AsyncIterator[str]:
            log.append("begun")
            await asyncio.sleep(0)
            log.append("set up")
            yield "db"
            log.append("torn down")

        async def ask() -> str:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()  # raised where it first waits, which is for the keeper
            return await db()

        async with request_scope() as scope:
            asking = asyncio.create_task(ask())
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert await asyncio.create_task(db()) == "db"
            assert under_way(scope) == []
        assert log == ["begun", "begun", "set up", "torn down"]

    async def test_a_keeper_is_cancelled_before_its_first_step(self) -> None:
        log: list[str] = []

        @request_scoped
        async def db() -> AsyncIterator[str]:
            log.append("begun")
            yield "db"

        async with request_scope() as scope:
            asking = [asyncio.create_task(db()) for _ in range(2)]
            await asyncio.sleep(0)  # they have asked, and the keeper's turn comes after ours
            assert under_way(scope) == [db.resource]
        assert log == []
        assert under_way(scope) == []
        for task in asking:
            with pytest.raises(ScopeClosedError):
                await task

    async def test_who_comes_while_an_unwanted_set_up_ends_has_its_own(self) -> None:
        log: list[str] = []
        ending = asyncio.Event()

        @request_scoped
        async def db() -> AsyncIterator[str]:
            log.append("begun")
            try:
                await (asyncio.sleep(0) if len(log) > 1 else asyncio.Event().wait())
            except asyncio.CancelledError:
                await ending.wait()
                log.append("ended")
                raise
            yield "db"

        async with request_scope():
            asking = asyncio.create_task(db())
            await settle()
            asking.cancel()
            await settle()
            late = asyncio.create_task(db())
            await settle()
            assert log == ["begun"]  # one at a time
            ending.set()
            assert await late == "db"
        assert log == ["begun", "ended", "begun"]

    @pytest.mark.parametrize("first", ["owner", "child"])
    async def test_the_factory_fails_and_all_who_wait_get_that_error(self, first: str) -> None:
        log: list[str] = []
        go_on = asyncio.Event()
        failure = ValueError("no connection")

        @request_scoped
        async def db() -> AsyncIterator[str]:
            log.append("begun")
            await go_on.wait()
            if len(log) == 1:
                raise failure
            yield "db"
            log.append("torn down")

        async with request_scope() as scope:
            waiting = [asyncio.create_task(db()) for _ in range(2)]
            if first == "owner":
                asyncio.get_running_loop().call_later(0.01, go_on.set)
                with pytest.raises(ValueError, match="no connection"):
                    await db()
            else:
                await settle()
                go_on.set()
            errors = await asyncio.gather(*waiting, return_exceptions=True)
            assert errors == [failure, failure]
            assert log == ["begun"]
            assert what_is_kept(scope) == []
            assert await db() == "db"  # the next call tries again
            assert await asyncio.create_task(db()) == "db"
        assert log == ["begun", "begun", "torn down"]

    async def test_what_a_failed_factory_used_is_torn_down_with_the_scope_and_used_again(
        self,
    ) -> None:
        log: list[str] = []

        @request_scoped
        async def base() -> AsyncIterator[str]:
            log.append("base")
            yield "base"
            log.append("base torn down")

        @request_scoped
        async def user() -> str:
            await base()
            log.append("user")
            if len(log) == 2:
                raise ValueError("no user")
            return "user"

        async with request_scope():
            with pytest.raises(ValueError, match="no user"):
                await user()
            assert await user() == "user"
        assert log == ["base", "user", "user", "base torn down"]

    def test_a_sync_factory_fails_and_the_threads_that_wait_get_that_error(self) -> None:
        begun, go_on = threading.Event(), threading.Event()
        log: list[str] = []

        @request_scoped
        def tenant() -> str:
            log.append("begun")
            begun.set()
            assert go_on.wait(5)
            if len(log) == 1:
                raise ValueError("no tenant")
            return "tenant"

        with request_scope() as scope, ThreadPoolExecutor(3) as threads:
            context = contextvars.copy_context
            first = threads.submit(context().run, tenant)
            assert begun.wait(5)
            second = threads.submit(context().run, tenant)
            (record,) = scope.records.values()
            while not record.waiters:
                time.sleep(0.001)
            go_on.set()
            for task in (first, second):
                with pytest.raises(ValueError, match="no tenant"):
                    task.result(5)
            assert tenant() == "tenant"
            assert under_way(scope) == []
        assert log == ["begun", "begun"]

    @pytest.fixture
    def _nobody_elses_finalizers(self) -> Iterator[None]:
        """Which would find the stack at its end, too."""
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    @pytest.mark.usefixtures("_nobody_elses_finalizers")
    @pytest.mark.parametrize("frames", range(8))
    async def test_at_the_end_of_the_stack_nothing_half_open_stays_behind(
        self, frames: int
    ) -> None:
        """Be it reached in the factory, or in what tells of its failure."""
        depth: list[int] = []

        @request_scoped(keyed=True)
        async def step(number: int) -> int:
            if is_deep:
                depth.append(number)
                await step(number + 1)
            return number

        async def ask(frames: int) -> None:
            await (ask(frames - 1) if frames else step(0))

        is_deep = True
        async with request_scope():
            with pytest.raises(RecursionError):
                await ask(frames)
            assert under_way(current_scope()) == []
            is_deep = False
            async with asyncio.timeout(within(10)):
                for number in range(max(depth) + 2):
                    assert await step(number) == number

    @pytest.mark.usefixtures("_nobody_elses_finalizers")
    @pytest.mark.parametrize("frames", range(8))
    @pytest.mark.parametrize("in_loop", [True, False])
    async def test_nor_does_anything_of_a_sync_factory(self, frames: int, in_loop: bool) -> None:
        depth: list[int] = []

        @request_scoped(keyed=True)
        def step(number: int) -> int:
            if is_deep:
                depth.append(number)
                step(number + 1)
            return number

        def ask(frames: int) -> None:
            if frames:
                ask(frames - 1)
            else:
                step(0)

        def fail_and_retry() -> None:
            nonlocal is_deep
            with pytest.raises(RecursionError):
                ask(frames)
            assert under_way(current_scope()) == []
            is_deep = False
            for number in range(max(depth) + 2):
                assert step(number) == number

        is_deep = True
        async with request_scope():
            if in_loop:
                fail_and_retry()
            else:
                await sync_to_async(fail_and_retry)()

    async def test_a_factory_that_cancels_itself_does_not_make_its_asker_try_for_ever(self) -> None:
        log: list[str] = []

        @request_scoped
        async def odd() -> str:
            log.append("begun")
            raise asyncio.CancelledError

        async with request_scope():
            with pytest.raises(asyncio.CancelledError):
                await asyncio.create_task(odd())
            tasks = [asyncio.create_task(odd()) for _ in range(3)]
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks)
        assert len(log) <= 4

    async def test_the_owner_takes_over_when_a_set_up_that_a_child_has_begun_is_cancelled(
        self,
    ) -> None:
        tasks: list[asyncio.Task[Any] | None] = []

        @request_scoped
        async def odd() -> str:
            tasks.append(asyncio.current_task())
            await asyncio.sleep(0)
            if len(tasks) == 1:
                raise asyncio.CancelledError
            return "odd"

        async with request_scope():
            child = asyncio.create_task(odd())
            await asyncio.sleep(0)
            assert await odd() == "odd"
            assert tasks[1] is asyncio.current_task()
            with pytest.raises(asyncio.CancelledError):
                await child

    async def test_a_cancelled_task_does_not_strand_a_connection_that_was_just_given_to_it(
        self,
    ) -> None:
        pool = Pool(1)

        @request_scoped
        async def db() -> AsyncIterator[object]:
            async with pool.acquire() as connection:
                yield connection

        async def request() -> object:
            async with request_scope():
                return await asyncio.create_task(db())

        async with pool.acquire():
            first, second = asyncio.create_task(request()), asyncio.create_task(request())
            await settle()
        first.cancel()  # in the moment in which it gets the connection
        assert await second == 0
        with pytest.raises(asyncio.CancelledError):
            await first
        assert pool.free.qsize() == pool.size


class TestCirclesAreErrors:
    """Promise 4."""

    async def test_straight(self) -> None:
        @request_scoped
        async def loop() -> object:
            return await loop()

        async with request_scope():
            with pytest.raises(CircularResourceError, match=r"loop.* -> .*loop") as caught:
                await loop()
            assert caught.value.circle == (loop.resource, loop.resource)
            with pytest.raises(CircularResourceError):
                await asyncio.create_task(loop())

    @pytest.mark.parametrize("where", ["owner", "child"])
    async def test_through_others(self, where: str) -> None:
        @request_scoped
        async def one() -> object:
            return await two()

        @request_scoped
        async def two() -> AsyncIterator[object]:
            yield await three()

        @request_scoped
        async def three() -> object:
            return await asyncio.create_task(one())

        async with request_scope() as scope:
            with pytest.raises(CircularResourceError) as caught:
                await (one() if where == "owner" else asyncio.create_task(one()))
            assert {part.factory.name.rpartition(".")[2] for part in caught.value.circle} == {
                "one",
                "two",
                "three",
            }
            assert caught.value.circle[0] is caught.value.circle[-1]
            assert what_is_kept(scope) == []

    async def test_through_children_that_are_gathered(self) -> None:
        @request_scoped
        async def free() -> int:
            await asyncio.sleep(0)
            return 1

        @request_scoped
        async def one() -> object:
            return await asyncio.gather(free(), two())

        @request_scoped
        async def two() -> object:
            async with asyncio.TaskGroup() as group:
                return group.create_task(one()), group.create_task(free())

        async with request_scope():
            with pytest.raises(ExceptionGroup) as caught:
                await one()
            assert caught.group_contains(CircularResourceError)

    @pytest.mark.parametrize("where", ["owner", "child"])
    async def test_after_another_resource_that_is_in_none(self, where: str) -> None:
        @request_scoped
        async def free() -> int:
            return 1

        @request_scoped
        def sync_free() -> int:
            return 2

        @request_scoped
        async def one() -> object:
            assert (await free(), sync_free()) == (1, 2)
            return await two()

        @request_scoped
        async def two() -> object:
            return await asyncio.wait_for(asyncio.create_task(one()), 5)

        async with request_scope():
            with pytest.raises(CircularResourceError):
                await (one() if where == "owner" else asyncio.create_task(one()))

    async def test_across_tasks_that_begin_at_its_two_ends(self) -> None:
        meeting = asyncio.Barrier(2)

        @request_scoped
        async def one() -> object:
            await meeting.wait()
            return await two()

        @request_scoped
        async def two() -> object:
            await meeting.wait()
            return await one()

        async with request_scope():
            errors = await asyncio.gather(one(), two(), return_exceptions=True)
        assert [type(error) for error in errors] == [CircularResourceError] * 2

    async def test_between_the_owner_and_a_child(self) -> None:
        meeting = asyncio.Barrier(2)

        @request_scoped
        async def one() -> object:
            await meeting.wait()
            return await two()

        @request_scoped
        async def two() -> object:
            await meeting.wait()
            return await one()

        async with request_scope():
            child = asyncio.create_task(two())
            with pytest.raises(CircularResourceError):
                await one()
            with pytest.raises(CircularResourceError):
                await child

    async def test_across_lifespan_resources(self) -> None:
        @lifespan_scoped
        async def one() -> object:
            return await two()

        @lifespan_scoped
        def two() -> object:
            return three()

        @lifespan_scoped
        def three() -> object:
            return two()

        async with request_scope():
            with pytest.raises(CircularResourceError):
                await one()

    def test_of_sync_resources(self) -> None:
        @request_scoped
        def one() -> object:
            return two()

        @request_scoped
        def two() -> Iterator[object]:
            yield one()

        with request_scope() as scope:
            with pytest.raises(CircularResourceError) as caught:
                one()
            assert caught.value.circle == (two.resource, one.resource, two.resource)
            assert what_is_kept(scope) == []

    def test_of_sync_resources_across_threads(self) -> None:
        meeting = threading.Barrier(2)

        @request_scoped
        def one() -> object:
            if not meeting.broken:
                meeting.wait(5)
            return two()

        @request_scoped
        def two() -> object:
            if not meeting.broken:
                meeting.wait(5)
            return one()

        with request_scope(), ThreadPoolExecutor(2) as threads:
            asking = [threads.submit(contextvars.copy_context().run, ask) for ask in (one, two)]
            threading.Timer(1, meeting.abort).start()  # a second try comes to it alone
            errors = [task.exception(10) for task in asking]
        assert any(isinstance(error, CircularResourceError) for error in errors)
        assert all(
            isinstance(error, CircularResourceError | threading.BrokenBarrierError)
            for error in errors
        )

    async def test_of_sync_and_async_ones_through_the_event_loop(self) -> None:
        @request_scoped
        async def one() -> object:
            return await sync_to_async(two)()

        @request_scoped
        def two() -> object:
            return async_to_sync(one)()

        async with request_scope():
            with pytest.raises(CircularResourceError):
                await one()
            with pytest.raises(CircularResourceError):
                await sync_to_async(two)()

    async def test_a_sync_factory_that_waits_for_itself_without_a_trace_is_told_in_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Not at once: it may be another greenlet of the same thread.
        monkeypatch.setattr(first_use, "_PATIENCE", 0.05)

        @request_scoped
        def odd() -> object:
            return contextvars.Context().run(current.run, odd)  # no trace of who asks

        async with request_scope():
            current = contextvars.copy_context()
            with pytest.raises(AsyncResourceError, match="in this very thread"):
                odd()

    @pytest.mark.parametrize("is_child", [False, True])
    @pytest.mark.parametrize("depth", [0, 1, 2])
    async def test_through_scopes_that_factories_open(self, depth: int, is_child: bool) -> None:
        async def ask(access: Callable[[], Coroutine[Any, Any, object]]) -> object:
            return await (asyncio.create_task(access()) if is_child else access())

        @lifespan_scoped
        async def pool() -> object:
            async with request_scope(), request_scope():
                return await ask([pool, db, tenant][depth])

        @request_scoped
        async def db() -> object:
            return await ask(pool)

        @request_scoped
        async def tenant() -> object:
            async with request_scope():
                return await ask(db)

        circle = [[pool], [db, pool], [db, pool, tenant]][depth]
        async with lifespan_scope(), asyncio.timeout(within(5)):
            with pytest.raises(CircularResourceError) as caught:
                await pool()
        assert caught.value.circle == tuple(one.resource for one in [*circle, circle[0]])

    @pytest.mark.parametrize("is_direct", [True, False])
    def test_through_scopes_that_sync_factories_open(self, is_direct: bool) -> None:
        @lifespan_scoped
        def settings() -> object:
            with request_scope():
                return settings() if is_direct else tenant()

        @request_scoped
        def tenant() -> object:
            return settings()

        with lifespan_scope(), pytest.raises(CircularResourceError):
            settings()

    async def test_a_task_with_a_scope_of_its_own_may_wait_for_who_has_started_it(self) -> None:
        """A worker, say, whose work uses it: its factory does not wait for that."""
        asked = asyncio.Event()

        @lifespan_scoped
        async def worker() -> AsyncIterator[list[asyncio.Task[object]]]:
            tasks = [asyncio.create_task(work())]
            await asked.wait()
            yield tasks

        @request_scoped
        async def job() -> object:
            asked.set()
            return await worker()

        async def work() -> object:
            async with request_scope():
                return await job()

        async with lifespan_scope(), asyncio.timeout(within(5)):
            tasks = await worker()
            assert await tasks[0] is tasks

    async def test_the_diamond_is_no_circle(self) -> None:
        log: list[str] = []

        @request_scoped
        async def base() -> AsyncIterator[str]:
            await asyncio.sleep(0)
            log.append("base")
            yield "base"

        @request_scoped
        async def left() -> str:
            return "left of " + await base()

        @request_scoped
        async def right() -> str:
            return "right of " + await base()

        @request_scoped
        async def top() -> list[str]:
            return await asyncio.gather(left(), right(), base())

        async with request_scope():
            assert await asyncio.gather(top(), right()) == [
                ["left of base", "right of base", "base"],
                "right of base",
            ]
        assert log == ["base"]

    async def test_who_is_reached_by_many_ways_is_looked_at_once(self) -> None:
        """Two in each of forty layers wait for both below: 2 ** 40 ways from top to bottom."""
        go_on = asyncio.Event()

        def declare(needs: list[Callable[[], Coroutine[Any, Any, None]]]) -> Any:
            @request_scoped
            async def one() -> None:
                await asyncio.gather(*(need() for need in needs))
                await go_on.wait()

            return one

        layer = [declare([]), declare([])]
        for _ in range(40):
            layer = [declare(layer), declare(layer)]
        async with request_scope() as scope:
            tasks = [asyncio.create_task(one()) for one in layer]
            while len(under_way(scope)) < 82:
                await asyncio.sleep(0)
            late = declare(layer)
            tasks.append(asyncio.create_task(late()))
            await settle()
            go_on.set()
            await asyncio.gather(*tasks)

    async def test_two_who_wait_for_one_that_still_comes_are_no_circle(self) -> None:
        go_on = asyncio.Event()

        @request_scoped
        async def base() -> str:
            await go_on.wait()
            return "base"

        @request_scoped
        async def left() -> str:
            return "left of " + await base()

        @request_scoped
        async def right() -> str:
            return "right of " + await base()

        @request_scoped
        async def top() -> list[str]:
            return await asyncio.gather(left(), right())

        @request_scoped
        async def roof() -> list[str]:
            return ["roof", *await top()]

        async with request_scope():
            asked = asyncio.create_task(top())
            await settle()
            asked_too = asyncio.create_task(roof())
            await settle()
            go_on.set()
            assert await asked == ["left of base", "right of base"]
            assert await asked_too == ["roof", "left of base", "right of base"]

    async def test_a_background_task_of_a_finished_factory_may_ask_for_it(self) -> None:
        @request_scoped
        async def db() -> AsyncIterator[str]:
            go_on = asyncio.Event()

            async def heartbeat() -> str:
                await go_on.wait()
                return await db()

            task = asyncio.create_task(heartbeat())
            yield "db"
            go_on.set()
            with pytest.raises(ScopeClosedError):
                await task

        @request_scoped
        async def worker() -> AsyncIterator[asyncio.Task[object]]:
            async def work() -> object:
                await asyncio.sleep(0)
                return await worker()

            yield asyncio.create_task(work())

        async with request_scope():
            assert await db() == "db"
            task = await worker()
            assert await task is task


class TestLifetimesNest:
    """Promise 5."""

    @pytest.mark.parametrize("where", ["owner", "child"])
    async def test_a_lifespan_resource_may_not_ask_for_one_of_a_request(self, where: str) -> None:
        @request_scoped
        async def user() -> str:
            return "user"

        @lifespan_scoped
        async def cache() -> str:
            return await user()

        async with request_scope():
            assert await user() == "user"  # though it is there
            with pytest.raises(LifetimeError, match=r"cache .* asked for .*user") as caught:
                await (cache() if where == "owner" else asyncio.create_task(cache()))
        assert caught.value.resource is cache.resource
        assert caught.value.needed is user.resource

    async def test_nor_may_a_sync_one(self) -> None:
        @request_scoped
        def user() -> str:
            return "user"

        @lifespan_scoped
        def cache() -> str:
            return user()

        def check() -> None:
            with request_scope():
                assert user() == "user"
                with pytest.raises(LifetimeError, match=r"cache .* asked for .*user"):
                    cache()

        check()
        await asyncio.to_thread(check)

    async def test_nor_a_task_that_it_has_left_running(self) -> None:
        @request_scoped
        async def user() -> str:
            return "user"

        @lifespan_scoped
        async def refresher() -> AsyncIterator[asyncio.Task[str]]:
            async def refresh() -> str:
                await asyncio.sleep(0)
                return await user()

            yield asyncio.create_task(refresh())

        async with request_scope():
            task = await refresher()
            with pytest.raises(LifetimeError):
                await task

    async def test_a_lifespan_resource_may_open_a_request_scope_of_its_own(self) -> None:
        @request_scoped
        async def user() -> str:
            return "user"

        @lifespan_scoped
        async def cache() -> str:
            async with request_scope():
                return await user()

        async with request_scope():
            assert await cache() == "user"

    async def test_a_request_resource_may_ask_for_one_of_the_lifespan(self) -> None:
        @lifespan_scoped
        async def pool() -> object:
            return object()

        @request_scoped
        async def db() -> object:
            return await pool()

        async with lifespan_scope():
            async with request_scope():
                first = await db()
            async with request_scope():
                assert await db() is first

    async def test_directly_in_a_lifespan_there_is_no_request(self) -> None:
        @request_scoped
        async def user() -> str:
            return "user"

        async with lifespan_scope():
            with pytest.raises(NoScopeError):
                await user()


class TestSync:
    """Promise 17."""

    async def test_a_sync_generator_is_torn_down_in_the_thread_that_set_it_up(self) -> None:
        log: list[object] = []

        @request_scoped
        def tenant() -> Iterator[str]:
            log.append(threading.get_ident())
            yield "tenant"
            log.append(threading.get_ident())

        async with request_scope():
            assert await sync_to_async(tenant)() == "tenant"
            assert tenant() == "tenant"
        assert log[0] == log[1] != threading.get_ident()

    async def test_set_up_in_the_event_loop_it_is_torn_down_there(self) -> None:
        log: list[object] = []

        @request_scoped
        def tenant() -> Iterator[str]:
            log.append(threading.get_ident())
            yield "tenant"
            log.append(threading.get_ident())

        async with request_scope():
            assert tenant() == "tenant"
            assert await sync_to_async(tenant)() == "tenant"
        assert log == [threading.get_ident()] * 2

    def test_without_an_event_loop_everything_sync_works(self) -> None:
        log: list[str] = []

        @lifespan_scoped
        def settings() -> Iterator[str]:
            yield "settings"
            log.append("settings torn down")

        @request_scoped
        def tenant() -> Iterator[str]:
            yield "tenant of " + settings()
            log.append("tenant torn down")

        with request_scope() as scope:
            assert current_scope() is scope
            assert tenant() == "tenant of settings"
        assert log == ["tenant torn down", "settings torn down"]

    @pytest.mark.parametrize("declare", [request_scoped, lifespan_scoped])
    def test_an_async_resource_there_says_what_to_do(self, declare: Callable[..., Any]) -> None:
        @declare
        async def db() -> str:
            return "db"

        with request_scope(), pytest.raises(AsyncResourceError, match="async with") as caught:
            asyncio.run(db())
        assert caught.value.resource is db.resource

    @pytest.mark.parametrize("kind", ["async generator", "function of the lifespan"])
    @pytest.mark.parametrize("is_cached", [False, True])
    async def test_another_event_loop_is_refused(self, kind: str, is_cached: bool) -> None:
        @request_scoped
        async def db() -> AsyncIterator[str]:
            yield "db"

        @lifespan_scoped
        async def pool() -> str:
            return "pool"

        ask: Callable[[], Coroutine[Any, Any, str]]
        ask = db if kind == "async generator" else pool
        async with request_scope():
            if is_cached:
                await ask()
            with pytest.raises(AsyncResourceError, match="another one"):
                await asyncio.to_thread(async_to_sync(ask, force_new_loop=True))
            with pytest.raises(AsyncResourceError, match="another one"):
                await asyncio.to_thread(lambda: asyncio.run(ask()))
            await ask()

    async def test_sync_code_in_the_loop_waits_for_a_thread_with_patience_that_ends(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(first_use, "_PATIENCE", 0.05)
        begun = threading.Event()

        @request_scoped
        async def db() -> str:
            return "db"

        @request_scoped
        def tenant() -> str:
            begun.set()
            return "tenant of " + async_to_sync(db)()

        async with request_scope():
            first = asyncio.create_task(sync_to_async(tenant)())
            await asyncio.to_thread(begun.wait)
            with suppress(AsyncResourceError):  # unless the thread was quicker
                assert tenant() == "tenant of db"
            assert await first == "tenant of db"
            assert tenant() == "tenant of db"

    async def test_the_patience_names_the_resource(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(first_use, "_PATIENCE", 0.01)
        begun, go_on = threading.Event(), threading.Event()

        @request_scoped
        def tenant() -> str:
            begun.set()
            assert go_on.wait(5)
            return "tenant"

        async with request_scope():
            first = asyncio.create_task(sync_to_async(tenant)())
            await asyncio.to_thread(begun.wait)
            with pytest.raises(AsyncResourceError, match=r"tenant .*another thread"):
                tenant()
            go_on.set()
            assert await first == "tenant"


# Promises 2, 3 and 6, trap 9: cancelled at every await of every task, one after the other


@types.coroutine
def counted(coroutine: Any, at_suspension: Callable[[], None]) -> Iterator[Any]:
    """Run the coroutine, and call back each time that it is about to suspend."""
    step, value = coroutine.send, None
    while True:
        try:
            awaited = step(value)
        except StopIteration as end:
            return end.value
        at_suspension()
        try:
            step, value = coroutine.send, (yield awaited)
        except BaseException as error:
            step, value = coroutine.throw, error


async def tick() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(lambda: future.done() or future.set_result(None))
    await future


async def everything(log: list[str], pool: Pool) -> None:
    """A request that uses the owner, children, dependencies and a sync generator."""

    def tracked(name: str) -> Iterator[None]:
        log.append(f"+{name}")
        try:
            yield
        finally:
            log.append(f"-{name}")

    @request_scoped
    async def base() -> AsyncIterator[object]:
        async with pool.acquire() as connection:
            await tick()
            for _ in tracked("base"):
                try:
                    yield connection
                finally:
                    await tick()

    @request_scoped
    def plain() -> Iterator[str]:
        for _ in tracked("plain"):
            yield "plain"

    @request_scoped
    async def middle() -> AsyncIterator[str]:
        await base()
        plain()
        await tick()
        for _ in tracked("middle"):
            try:
                yield "middle"
            finally:
                await tick()
                await base()

    @request_scoped
    async def top() -> AsyncIterator[str]:
        await asyncio.gather(middle(), base())
        for _ in tracked("top"):
            try:
                yield "top"
            finally:
                await tick()

    @request_scoped
    async def aside() -> AsyncIterator[str]:
        await tick()
        for _ in tracked("aside"):
            yield "aside"
            await tick()

    async with request_scope() as scope:
        try:
            early = asyncio.create_task(middle())
            early.add_done_callback(lambda task: task.cancelled() or task.exception())
            await base()
            await asyncio.gather(top(), top(), aside())
            await early
            await tick()
        finally:
            log.append("closing")
            scope_of.append(scope)


scope_of: list[Any] = []


@pytest.mark.parametrize("twice", [False, True])
async def test_cancelled_at_any_await_of_any_task_it_tears_down_what_it_set_up(
    twice: bool,
) -> None:
    loop = asyncio.get_running_loop()
    outcomes = set()
    for number in range(500):
        log: list[str] = []
        pool = Pool(2)
        suspensions = 0

        cancelled_at = (number, number + 2) if twice else (number,)

        def at_suspension(cancelled_at: tuple[int, ...] = cancelled_at) -> None:
            nonlocal suspensions
            suspensions += 1
            if suspensions - 1 in cancelled_at:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()

        async def count(coroutine: Any) -> Any:
            return await counted(coroutine, at_suspension)

        def factory(
            loop: asyncio.AbstractEventLoop, coroutine: Any, **kwargs: Any
        ) -> asyncio.Task[Any]:
            task = asyncio.Task(count(coroutine), loop=loop, **kwargs)
            task.add_done_callback(lambda _: coroutine.close())  # cancelled before its first step
            return task

        before = asyncio.all_tasks()
        scope_of.clear()
        loop.set_task_factory(factory)
        try:
            request = loop.create_task(everything(log, pool))
            await asyncio.wait([request], timeout=5)
        finally:
            loop.set_task_factory(None)
        assert request.done(), (number, log)
        outcomes.add(request.cancelled())
        if not request.cancelled() and (error := request.exception()) is not None:
            # A keeper was cancelled in its teardown, and the request was not.
            assert isinstance(error, TeardownError), (number, log)
            causes = {type(one.__cause__) for one in error.exceptions}
            assert causes == {asyncio.CancelledError}, (number, log)
        await settle()
        assert asyncio.all_tasks() == before, (number, log)
        set_up = [name[1:] for name in log if name[0] == "+"]
        torn_down = [name[1:] for name in log if name[0] == "-"]
        assert torn_down == set_up[::-1], (number, log)
        assert pool.free.qsize() == pool.size, (number, log)
        for scope in scope_of:
            assert what_is_kept(scope) == []
        if suspensions <= number:
            break
    else:
        pytest.fail("it never ran to its end")
    assert number >= 20
    assert outcomes == {True, False}
    assert not request.cancelled()


async def test_cancelled_by_anyio_at_every_await_it_leaves_nothing_behind() -> None:
    log: list[str] = []
    pool = Pool(2)
    with anyio.CancelScope() as cancel_scope:
        asyncio.get_running_loop().call_soon(cancel_scope.cancel)
        await everything(log, pool)
    assert cancel_scope.cancelled_caught
    await settle()
    assert pool.free.qsize() == pool.size


async def test_a_plain_with_block_holds_sync_resources_only_in_async_code_too() -> None:
    @request_scoped
    async def db() -> AsyncIterator[str]:
        yield "db"

    @request_scoped
    def tenant() -> Iterator[str]:
        yield "tenant"

    with request_scope():
        assert tenant() == "tenant"
        with pytest.raises(AsyncResourceError, match="async with"):
            await db()
        tenant.release()
        assert tenant() == "tenant"


async def test_a_set_up_that_the_garbage_collector_ends_leaves_its_context_alone() -> None:
    @request_scoped
    async def db() -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield "db"

    async with request_scope() as scope:
        asking = db()
        contextvars.copy_context().run(asking.send, None)
        assert under_way(scope) == [db.resource]
        asking.close()
        assert current_scope() is scope
        assert under_way(scope) == []


@pytest.mark.parametrize("where", ["owner", "child"])
async def test_a_scope_that_a_factory_holds_is_its_own_and_not_that_of_who_asks(where: str) -> None:
    """Promise 15."""
    log: list[str] = []

    @request_scoped
    async def nested() -> AsyncIterator[str]:
        async with request_scope():
            yield await name()

    @request_scoped
    def sync_nested() -> Iterator[None]:
        with request_scope():
            yield

    @request_scoped
    async def name() -> AsyncIterator[str]:
        yield "name"
        log.append("name")

    async with request_scope() as scope:
        assert await (nested() if where == "owner" else asyncio.create_task(nested())) == "name"
        assert current_scope() is scope
        if where == "owner":
            sync_nested()
        else:
            await sync_to_async(sync_nested)()
        assert current_scope() is scope
        assert name.resource not in scope.records
        await name()
    assert log == ["name", "name"]
