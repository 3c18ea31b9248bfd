"""
What lies between two steps of a resource's life: one truth about each, whoever comes in between.
Tasks and threads are made to come at the moment that matters; nothing here waits for time to pass.
"""

import asyncio
import contextvars
import gc
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpRequest, HttpResponse
from django.test import override_settings

from scoped import (
    AsyncResourceError,
    ScopeClosedError,
    TeardownError,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.asgi import ScopedASGIHandler
from scoped.core import books, first_use
from scoped.core.current import current
from scoped.core.lifespan import LifespanScope, lifespans
from scoped.core.place import thread_here
from scoped.core.record import ENDING, GONE, HELD, Record
from scoped.core.request import RequestScope
from scoped.core.resource import Resource
from scoped.core.scope import Scope
from scoped.core.waits import hop, run_without_loop
from scoped.testing import AsyncClient
from tests.connection import Connection
from tests.tables import under_way, what_is_kept
from tests.views import Views

# Seconds after which what should go on is taken to hang.
DEADLINE = 20

view = Views()
urlpatterns = view.urlpatterns


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = dict(lifespans)
    yield
    assert lifespans == before


@pytest.fixture
def log() -> list[str]:
    return []


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.001)


def logged(name: str, log: list[str], *needs: Callable[[], Any], declare: Any = None) -> Any:
    """A resource that uses others, and logs when it is torn down."""

    async def factory() -> AsyncIterator[str]:
        for need in needs:
            await need()
        yield name
        log.append(name)

    factory.__qualname__ = name
    return (declare or request_scoped)(factory)


def in_thread(function: Callable[[], object], context: contextvars.Context) -> threading.Thread:
    thread = threading.Thread(target=context.run, args=[function])
    thread.start()
    return thread


class TestOneCancellationThenPatience:
    """Promise 20: what is ending is not cancelled again before its time is over."""

    @override_settings(ROOT_URLCONF=__name__)
    async def test_a_client_that_goes_while_children_set_up_does_not_cut_their_clean_up_short(
        self,
    ) -> None:
        free = asyncio.Semaphore(1)
        taken = asyncio.Event()

        @request_scoped
        async def connection() -> AsyncIterator[str]:
            await free.acquire()
            try:
                taken.set()
                await asyncio.get_running_loop().create_future()  # SET ROLE: no answer comes
                yield "connection"
            finally:
                await turns(50)  # RESET ALL
                free.release()

        @view
        async def gathers(request: HttpRequest) -> HttpResponse:
            await asyncio.gather(connection(), asyncio.sleep(0), connection())
            return HttpResponse()

        browser = Connection(ScopedASGIHandler(), "/gathers")
        request = browser.start()
        await asyncio.wait_for(taken.wait(), DEADLINE)
        browser.disconnect()
        async with asyncio.timeout(DEADLINE):
            with suppress(asyncio.CancelledError):
                await request
        assert not free.locked()

    async def test_nor_does_the_end_of_a_scope_whose_task_is_cancelled(self) -> None:
        free = asyncio.Semaphore(1)
        taken = asyncio.Event()

        @request_scoped
        async def connection() -> AsyncIterator[str]:
            async with free:
                try:
                    taken.set()
                    await asyncio.get_running_loop().create_future()
                    yield "connection"
                finally:
                    await turns(50)
                    clean.append(True)

        async def work() -> None:
            async with request_scope():
                children = [asyncio.create_task(connection()) for _ in range(2)]
                try:
                    await asyncio.gather(*children)
                finally:
                    await turns(3)  # the keeper has begun to end

        clean: list[bool] = []
        working = asyncio.create_task(work())
        await asyncio.wait_for(taken.wait(), DEADLINE)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(working, DEADLINE)
        assert clean == [True]
        assert not free.locked()


class TestWhoCancelsIsKnown:
    """Promise 19: what a factory's own timeout or task group cancels is that factory's affair."""

    async def test_a_keepers_own_timeout_ends_no_scope_whose_owner_has_gone(
        self, log: list[str]
    ) -> None:
        other = logged("other", log)
        expire = asyncio.Event()

        @request_scoped
        async def limited() -> AsyncIterator[str]:
            async with asyncio.timeout(None) as timeout:
                expiring.append(timeout)
                yield "limited"

        expiring: list[asyncio.Timeout] = []
        context = contextvars.copy_context()
        scope = request_scope()
        # As a fixture does: opened in one task, used in another, closed in a third.
        await asyncio.create_task(scope.__aenter__(), context=context)

        async def test() -> None:
            await other()
            await limited()
            expiring[0].reschedule(0)
            await until(expiring[0].expired)
            await turns()
            assert scope.is_open
            assert await other() == "other"
            assert log == []
            expire.set()

        await asyncio.create_task(test(), context=context)
        with pytest.raises(TeardownError) as caught:
            await asyncio.create_task(scope.__aexit__(None, None, None), context=context)
        assert [type(error) for error in caught.value.exceptions] == [TimeoutError]
        assert log == ["other"]
        await turns()
        assert asyncio.all_tasks() == {asyncio.current_task()}  # not even one to watch over it

    def test_a_scope_whose_owner_has_gone_ends_with_the_event_loop_though_no_keeper_waits_any_more(
        self, log: list[str]
    ) -> None:
        kept = logged("kept", log)

        @request_scoped
        def plain() -> Iterator[str]:
            try:
                yield "plain"
            finally:
                time.sleep(0.05)
                log.append("plain")

        async def test() -> None:
            await sync_to_async(plain)()
            await kept()
            await kept.release()
            assert log == ["kept"]

        async def program() -> None:
            context = contextvars.copy_context()
            # As a fixture does that forgets the end of it.
            await asyncio.create_task(scope.__aenter__(), context=context)
            await asyncio.create_task(test(), context=context)

        scope = request_scope()
        asyncio.run(program())
        assert log == ["kept", "plain"]
        assert repr(scope).endswith(", closed>")

    @pytest.mark.parametrize("is_held", [True, False], ids=["held", "implied"])
    async def test_a_worker_that_dies_ends_no_lifespan(self, is_held: bool, log: list[str]) -> None:
        pool = logged("pool", log, declare=lifespan_scoped)
        die = asyncio.Event()

        @lifespan_scoped
        async def worker() -> AsyncIterator[str]:
            async def work() -> None:
                await die.wait()
                raise ValueError("a worker of the pool dies")

            async with asyncio.TaskGroup() as group:
                working.append(group.create_task(work()))
                yield "worker"

        working: list[asyncio.Task[None]] = []

        async def request() -> None:
            async with request_scope() as scope:
                await pool()
                await worker()
                die.set()
                await asyncio.wait(working)
                await turns()
                lifespan = scope.lifespan
                assert lifespan is not None
                assert lifespan.is_open
                assert await pool() == "pool"
                assert log == []

        with pytest.raises(TeardownError) as caught:
            if is_held:
                async with lifespan_scope():
                    await request()
            else:
                await request()
        group = caught.value.exceptions[0]
        assert isinstance(group, ExceptionGroup)
        assert isinstance(group.exceptions[0], ValueError)
        assert log == ["pool"]

    async def test_a_keeper_that_was_cancelled_may_use_task_groups_in_its_teardown(
        self, log: list[str]
    ) -> None:
        async def fail() -> None:
            raise ValueError("a child")

        @request_scoped
        async def db() -> AsyncIterator[str]:
            keepers.append(asyncio.current_task())
            try:
                yield "db"
            finally:
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(fail())
                except* ValueError:
                    log.append("handled")
                await asyncio.sleep(0)
                log.append("down")

        keepers: list[asyncio.Task[Any] | None] = []
        with suppress(asyncio.CancelledError):
            async with request_scope():
                await asyncio.create_task(db())
                assert keepers[0] is not None
                keepers[0].cancel()
                await turns()
                assert log == []
        assert log == ["handled", "down"]


class TestHandedOver:
    """Promises 2 and 24: a set-up that succeeds is handed to those who wait for it."""

    @pytest.mark.parametrize("count", [1, 3])
    async def test_to_tasks_though_it_is_released_in_the_same_moment(
        self, count: int, log: list[str]
    ) -> None:
        go_on = asyncio.Event()

        @request_scoped
        async def db() -> AsyncIterator[str]:
            await go_on.wait()
            log.append("up")
            yield f"db {log.count('up')}"
            log.append("down")

        async with request_scope():
            waiting = [asyncio.create_task(db()) for _ in range(count)]
            await turns()
            taken = asyncio.create_task(self.release_when_it_is_there(db))
            go_on.set()
            await taken
            assert await asyncio.gather(*waiting) == ["db 1"] * count
            assert log == ["up", "down"]

    @staticmethod
    async def release_when_it_is_there(resource: Any) -> None:
        """In the turn in which those who wait are about to be woken."""
        while True:
            try:
                resource.get_nowait()
            except AsyncResourceError:
                await asyncio.sleep(0)
            else:
                break
        await resource.release()

    @pytest.mark.parametrize("count", [1, 3])
    async def test_not_where_the_scope_closes_in_that_moment(
        self, count: int, log: list[str]
    ) -> None:
        go_on = asyncio.Event()

        @request_scoped
        async def db() -> AsyncIterator[str]:
            await go_on.wait()
            yield "db"
            log.append("down")

        async with request_scope() as scope:
            waiting = [asyncio.create_task(db()) for _ in range(count)]
            await turns()
            go_on.set()
            while scope.records[db.resource].state != HELD:
                await asyncio.sleep(0)
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, ScopeClosedError)
        assert log == ["down"]

    async def test_an_error_that_many_are_told_has_no_more_frames_than_for_one(self) -> None:
        @request_scoped
        async def db() -> str:
            await turns(3)
            raise ValueError("db")

        frames: list[int] = []
        for count in (1, 50):
            async with request_scope():
                asking = [asyncio.create_task(db()) for _ in range(count)]
                outcomes = await asyncio.gather(*asking, return_exceptions=True)
            assert len(set(map(id, outcomes))) == 1
            error = outcomes[0]
            assert isinstance(error, ValueError)
            frames.append(len(list(traceback.walk_tb(error.__traceback__))))
        assert frames[1] <= frames[0] + 4

    def test_to_threads_though_it_is_released_before_they_go_on(
        self, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go_on, released = (threading.Event() for _ in range(3))
        real = first_use._is_for

        def late(*args: Any, **kwargs: Any) -> bool:
            assert released.wait(DEADLINE)
            return real(*args, **kwargs)

        monkeypatch.setattr(first_use, "_is_for", late)

        @request_scoped
        def tenant() -> Iterator[str]:
            begun.set()
            assert go_on.wait(DEADLINE)
            log.append("up")
            yield f"tenant {log.count('up')}"
            log.append("down")

        def set_up_and_release() -> None:
            found.append(tenant())
            tenant.release()
            released.set()

        def wait() -> None:
            found.append(tenant())

        found: list[str] = []
        with request_scope() as scope:
            first = in_thread(set_up_and_release, contextvars.copy_context())
            assert begun.wait(DEADLINE)
            second = in_thread(wait, contextvars.copy_context())
            while not scope.records[tenant.resource].waiters:
                time.sleep(0.001)
            go_on.set()
            first.join(DEADLINE)
            second.join(DEADLINE)
            assert found == ["tenant 1", "tenant 1"]
            assert log == ["up", "down"]

    def test_a_thread_that_comes_to_wait_when_it_is_released_already_has_one_of_its_own(
        self, log: list[str]
    ) -> None:
        begun, go_on, released = (threading.Event() for _ in range(3))
        here = threading.get_ident()

        class Overtaken(RequestScope):
            """The other thread sets up, and releases, what this one has found being set up."""

            __slots__ = ()

            def begin(self, resource: Resource[Any], asker: Record | None) -> tuple[Record, bool]:
                found = super().begin(resource, asker)
                if threading.get_ident() == here and not go_on.is_set():
                    go_on.set()
                    assert released.wait(DEADLINE)
                return found

        @request_scoped
        def tenant() -> Iterator[str]:
            number = log.count("up") + 1
            if number == 1:
                begun.set()
                assert go_on.wait(DEADLINE)
            log.append("up")
            yield f"tenant {number}"
            log.append("down")

        def set_up_and_release() -> None:
            tenant()
            tenant.release()
            released.set()

        with Overtaken("the request scope"):
            other = in_thread(set_up_and_release, contextvars.copy_context())
            assert begun.wait(DEADLINE)
            assert tenant() == "tenant 2"
            other.join(DEADLINE)
            assert log == ["up", "down", "up"]
        assert log == ["up", "down", "up", "down"]

    def test_a_thread_that_waits_takes_over_where_the_first_is_interrupted(
        self, log: list[str]
    ) -> None:
        """Promise 3: that was not meant for who waits."""
        begun, go_on = threading.Event(), threading.Event()

        class Interrupted(BaseException):
            pass

        @request_scoped
        def tenant() -> str:
            log.append("asked for")
            if log == ["asked for"]:
                begun.set()
                assert go_on.wait(DEADLINE)
                raise Interrupted
            return "tenant"

        def be_interrupted() -> None:
            with pytest.raises(Interrupted):
                tenant()
            log.append("interrupted")

        def wait() -> None:
            found.append(tenant())

        found: list[str] = []
        with request_scope() as scope:
            first = in_thread(be_interrupted, contextvars.copy_context())
            assert begun.wait(DEADLINE)
            second = in_thread(wait, contextvars.copy_context())
            while not scope.records[tenant.resource].waiters:
                time.sleep(0.001)
            go_on.set()
            first.join(DEADLINE)
            second.join(DEADLINE)
        assert sorted(log) == ["asked for", "asked for", "interrupted"]
        assert found == ["tenant"]


class TestRelease:
    """Promise 24: no retry without bound, and nobody waits for himself."""

    @pytest.mark.parametrize("first", ["owner", "child"])
    @pytest.mark.parametrize("later", range(7))
    async def test_a_release_beside_a_first_use_of_what_uses_it_comes_to_an_end(
        self, first: str, later: int, log: list[str]
    ) -> None:
        a = logged("a", log)
        b = logged("b", log, a)

        @request_scoped
        async def c() -> str:
            return str(await b())

        async with asyncio.timeout(DEADLINE), request_scope() as scope:
            await (a() if first == "owner" else asyncio.create_task(a()))
            await asyncio.create_task(b())
            child = asyncio.create_task(c())
            await turns(later)
            with suppress(AsyncResourceError):  # c is being set up with it
                await a.release()
            assert await child == "b"
        assert len(log) <= 4
        assert log.count("a") in (1, 2)
        assert log.count("b") in (1, 2)
        assert what_is_kept(scope) == []

    async def test_what_another_thread_takes_meanwhile_goes_before_what_it_uses(
        self, log: list[str]
    ) -> None:
        come, going, go_on = threading.Event(), threading.Event(), threading.Event()
        here = threading.get_ident()

        class Overtaken(RequestScope):
            """The other thread takes it, which this one has found."""

            __slots__ = ()

            def take_and_tell(self, record: Record) -> bool:
                if threading.get_ident() == here and not going.is_set():
                    come.set()
                    assert going.wait(DEADLINE)
                    threading.Timer(0.05, go_on.set).start()
                return super().take_and_tell(record)

        base = logged("base", log)

        @request_scoped
        def user() -> Iterator[str]:
            yield base.get_nowait()
            going.set()
            assert go_on.wait(DEADLINE)
            log.append("user")

        def use() -> None:
            user()
            used.set()
            assert come.wait(DEADLINE)
            user.release()

        used = threading.Event()
        async with Overtaken("the request scope"):
            await base()
            thread = in_thread(use, contextvars.copy_context())
            assert used.wait(DEADLINE)
            await base.release()
            thread.join(DEADLINE)
        assert log == ["user", "base"]

    def test_nor_does_sync_code_release_what_is_used_by_what_another_thread_has_just_taken(
        self, log: list[str]
    ) -> None:
        taken, go_on = threading.Event(), threading.Event()
        here = threading.get_ident()
        others: list[threading.Thread] = []

        class Interrupted(Record):
            """The other thread loses its turn when it has claimed it, until this one waits."""

            __slots__ = ()

            def __setattr__(self, name: str, value: object) -> None:
                if name == "state" and value == ENDING and threading.get_ident() != here:
                    taken.set()
                    assert go_on.wait(DEADLINE)
                super().__setattr__(name, value)

            def wait(self, waiter: Any) -> None:
                super().wait(waiter)
                go_on.set()

        class Overtaken(RequestScope):
            """The other thread takes what this one has found."""

            __slots__ = ()

            def take_and_tell(self, record: Record) -> bool:
                if threading.get_ident() == here and not others:
                    others.append(in_thread(user.release, contextvars.copy_context()))
                    assert taken.wait(DEADLINE)
                return super().take_and_tell(record)

        @request_scoped
        def base() -> Iterator[str]:
            yield "base"
            log.append(f"base, when its user is {'gone' if used.state == GONE else 'there'}")

        @request_scoped
        def user() -> str:  # torn down nowhere, so any thread may release it
            return base()

        with Overtaken("the request scope") as scope:
            user()
            used = scope.records[user.resource]
            used.__class__ = Interrupted
            base.release()
            assert log == ["base, when its user is gone"]
            others[0].join(DEADLINE)
            assert what_is_kept(scope) == []

    @pytest.mark.parametrize("where", ["owner", "child"])
    async def test_a_teardown_that_is_released_may_release_others_in_child_tasks(
        self, where: str, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Scope, "teardown_timeout", float(DEADLINE))
        a, b = logged("a", log), logged("b", log)

        @request_scoped
        async def c() -> AsyncIterator[str]:
            yield "c"
            await asyncio.gather(a.release(), b.release())
            log.append("c")

        async with asyncio.timeout(DEADLINE / 2), request_scope():
            for one in (a, b):
                await asyncio.create_task(one())
            await (c() if where == "owner" else asyncio.create_task(c()))
            await c.release()
            assert sorted(log) == ["a", "b", "c"]
            assert log[-1] == "c"

    async def test_what_comes_to_use_it_while_others_go_goes_too(self, log: list[str]) -> None:
        a = logged("a", log)
        is_going, go_on = asyncio.Event(), asyncio.Event()

        @request_scoped
        async def slow() -> AsyncIterator[str]:
            await a()
            yield "slow"
            is_going.set()
            await go_on.wait()
            log.append("slow")

        late = logged("late", log, a)

        async with request_scope():
            await a()
            await asyncio.create_task(slow())
            releasing = asyncio.create_task(slow.release())
            await is_going.wait()
            await asyncio.create_task(late())
            go_on.set()
            await releasing
            assert log == ["slow"]
            await a.release()
            assert log == ["slow", "late", "a"]

    async def test_it_stops_where_somebody_begins_to_set_up_with_what_it_is_about_to_take(
        self, log: list[str]
    ) -> None:
        a = logged("a", log)
        is_going, go_on, let_it_be = asyncio.Event(), asyncio.Event(), asyncio.Event()

        @request_scoped
        async def slow() -> AsyncIterator[str]:
            await a()
            yield "slow"
            is_going.set()
            await go_on.wait()
            log.append("slow")

        @request_scoped
        async def late() -> AsyncIterator[str]:
            await a()
            await let_it_be.wait()
            yield "late"
            log.append("late")

        async with request_scope():
            await asyncio.create_task(a())
            await asyncio.create_task(slow())
            releasing = asyncio.create_task(a.release())
            await is_going.wait()
            coming = asyncio.create_task(late())
            await turns()
            go_on.set()
            with pytest.raises(TeardownError) as caught:
                await releasing
            assert "late" in str(caught.value.exceptions[0])
            assert isinstance(caught.value.exceptions[0], AsyncResourceError)
            assert log == ["slow"]
            let_it_be.set()
            assert await coming == "late"
        assert log == ["slow", "late", "a"]

    async def test_a_factory_that_releases_and_is_complete_before_that_is_over_goes_too(
        self, log: list[str]
    ) -> None:
        a = logged("a", log)
        is_going, go_on = asyncio.Event(), asyncio.Event()

        @request_scoped
        async def slow() -> AsyncIterator[str]:
            await a()
            yield "slow"
            is_going.set()
            await go_on.wait()
            log.append("slow")

        @request_scoped
        async def quick() -> AsyncIterator[str]:
            await a()
            releasing.append(asyncio.create_task(a.release()))
            await is_going.wait()
            yield "quick"
            log.append("quick")

        releasing: list[asyncio.Task[None]] = []
        async with request_scope():
            await asyncio.create_task(a())
            await asyncio.create_task(slow())
            assert await asyncio.create_task(quick()) == "quick"
            go_on.set()
            await releasing[0]
            assert log == ["slow", "quick", "a"]

    async def test_beside_get_nowait_in_a_thread_no_set_up_is_left_that_nobody_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Promises 3 and 24: the release comes in the midst of the look."""
        in_thread, released = threading.Event(), threading.Event()

        @request_scoped
        async def db() -> AsyncIterator[object]:
            yield object()

        asker_here = first_use.asker_here

        def asks_late() -> Record | None:
            if threading.current_thread() is not threading.main_thread():
                in_thread.set()
                assert released.wait(DEADLINE)
            return asker_here()

        monkeypatch.setattr(first_use, "asker_here", asks_late)
        async with request_scope() as scope, asyncio.timeout(DEADLINE):
            first = await db()
            looking = asyncio.create_task(asyncio.to_thread(db.get_nowait))
            await asyncio.to_thread(in_thread.wait)
            await db.release()
            released.set()
            with pytest.raises(AsyncResourceError, match="has not been set up yet"):
                await looking
            assert not scope.records
            assert await db() is not first


class TestLifespan:
    """Promises 16 and 24: a lifespan joined inside an open request ends after it."""

    @pytest.mark.parametrize("enter", [lifespan_scope, AsyncClient])
    @pytest.mark.parametrize("first", ["outside", "inside"])
    async def test_inside_a_request_it_does_not_wait_for_that_and_outlives_it(
        self, enter: Callable[[], Any], first: str, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Scope, "shutdown_timeout", float(DEADLINE))
        pool = logged("pool", log, declare=lifespan_scoped)
        db = logged("db", log, pool)
        async with asyncio.timeout(DEADLINE / 2):
            async with request_scope():
                if first == "outside":
                    await db()
                async with enter():
                    assert await pool() == "pool"
                if first == "outside":
                    assert log == []
                    assert await pool() == "pool"
            assert log == (["db", "pool"] if first == "outside" else ["pool"])

    @pytest.mark.parametrize("depth", [1, 2])
    async def test_it_is_closed_by_the_last_of_the_requests_around_it(
        self, depth: int, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Scope, "shutdown_timeout", float(DEADLINE))
        pool = logged("pool", log, declare=lifespan_scoped)

        async def inside(depth: int) -> None:
            if depth:
                async with request_scope():
                    await pool()
                    await inside(depth - 1)
                    assert log == []
                    assert await pool() == "pool"
            else:
                async with lifespan_scope():
                    assert await pool() == "pool"

        async with asyncio.timeout(DEADLINE / 2):
            await inside(depth)
        assert log == ["pool"]

    async def test_it_still_waits_for_requests_beside_the_one_around_it(
        self, log: list[str]
    ) -> None:
        pool = logged("pool", log, declare=lifespan_scoped)
        is_open, go_on = asyncio.Event(), asyncio.Event()

        async def beside() -> None:
            async with request_scope():
                await pool()
                is_open.set()
                await go_on.wait()
                log.append("beside")

        async with request_scope():
            await pool()
            lifespan = lifespan_scope()
            await lifespan.__aenter__()
            other = asyncio.create_task(beside(), context=contextvars.Context())
            await is_open.wait()
            leaving = asyncio.create_task(lifespan.__aexit__(None, None, None))
            await turns()
            assert not leaving.done()
            go_on.set()
            await asyncio.wait_for(leaving, DEADLINE)
            await other
            assert log == ["beside"]
        assert log == ["beside", "pool"]

    def test_in_sync_code_too(self, log: list[str]) -> None:
        @lifespan_scoped
        def pool() -> Iterator[str]:
            yield "pool"
            log.append("pool")

        with request_scope():
            pool()
            with request_scope():
                with lifespan_scope():
                    pool()
                assert pool() == "pool"
            assert pool() == "pool"
            assert log == []
        assert log == ["pool"]

    def test_who_comes_when_its_end_is_decided_and_not_begun_has_another(
        self, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        is_up, go_on = threading.Event(), threading.Event()
        real = LifespanScope.end

        @lifespan_scoped
        def pool() -> Iterator[str]:
            found.append(f"pool {len(found) + 1}")
            yield (value := found[-1])
            log.append(value)

        def come() -> None:
            with lifespan_scope():
                pool()
                is_up.set()
                assert go_on.wait(DEADLINE)
                log.append(f"used {pool()}")

        async def overtaken(self: LifespanScope, failure: BaseException | None) -> None:
            if not threads:
                threads.append(in_thread(come, contextvars.Context()))
                assert is_up.wait(DEADLINE)
            await real(self, failure)

        monkeypatch.setattr(LifespanScope, "end", overtaken)
        found: list[str] = []
        threads: list[threading.Thread] = []
        with lifespan_scope():
            assert pool() == "pool 1"
        assert log == ["pool 1"]
        go_on.set()
        threads[0].join(DEADLINE)
        assert log == ["pool 1", "used pool 2", "pool 2"]


def about_to_find_its_lifespan(seen: threading.Event, go_on: threading.Event) -> RequestScope:
    """It ends in the moment in which a thread is about to find its lifespan."""

    class Overtaken(RequestScope):
        __slots__ = ()

        def need_lifespan(self, resource: Resource[Any]) -> LifespanScope:
            seen.set()
            assert go_on.wait(DEADLINE)
            return super().need_lifespan(resource)

    return Overtaken("the request scope")


def closed_beside_a_thread(
    kind: str,
    scope: RequestScope,
    base: Callable[[], object],
    ask: Callable[[], None],
    begun: threading.Event,
) -> threading.Thread:
    """The scope has ``base``, and closes when the thread has begun to ask for something else."""
    threads: list[threading.Thread] = []

    def use() -> None:
        base()
        threads.append(in_thread(ask, contextvars.copy_context()))
        assert begun.wait(DEADLINE)

    async def use_async() -> None:
        async with scope:
            use()

    if kind == "async":
        asyncio.run(use_async())
    else:
        with scope:
            use()
    return threads[0]


class TestThreadsAtTheMomentOfClosing:
    """Promises 6, 13 and 24: nothing that a thread sets up meanwhile is lost."""

    async def test_what_lives_until_the_response_and_comes_after_it_is_torn_down_there(
        self, log: list[str]
    ) -> None:
        begun, go_on = threading.Event(), threading.Event()

        @request_scoped(until="response")
        def transaction() -> Iterator[str]:
            begun.set()
            assert go_on.wait(DEADLINE)
            up_in.append(threading.get_ident())
            yield "transaction"
            log.append("transaction")
            up_in.append(threading.get_ident())

        def ask() -> None:
            with pytest.raises(ScopeClosedError, match="until its response"):
                transaction()
            log.append("told")

        up_in: list[int] = []
        async with request_scope() as scope:
            thread = in_thread(ask, contextvars.copy_context())
            assert begun.wait(DEADLINE)
            await scope.end_response()
            go_on.set()
            thread.join(DEADLINE)
            assert log == ["transaction", "told"]
            assert what_is_kept(scope) == []
        assert len(set(up_in)) == 1

    def test_a_release_and_the_end_of_the_scope_take_it_once(self, log: list[str]) -> None:
        meeting = threading.Barrier(2)
        taken: list[bool] = []

        class Contended(RequestScope):
            """Two come to take it in the same moment: the end waits no longer for the other."""

            __slots__ = ()

            teardown_timeout = 0.01

            def take(self, record: Record) -> bool:
                with suppress(threading.BrokenBarrierError):
                    meeting.wait(DEADLINE)
                is_mine = super().take(record)
                taken.append(is_mine)
                return is_mine

        @request_scoped
        def tenant() -> Iterator[str]:
            yield "tenant"
            log.append("tenant")

        def use_and_release() -> None:
            tenant()
            tenant.release()

        with Contended("the request scope"):
            thread = in_thread(use_and_release, contextvars.copy_context())
            while not meeting.n_waiting:
                time.sleep(0.001)
        thread.join(DEADLINE)
        assert sorted(taken) == [False, True]
        assert log == ["tenant"]

    @pytest.mark.parametrize("ends", ["under way", "over"])
    def test_a_release_that_finds_it_taken_by_the_end_of_the_scope_leaves_it_alone(
        self, ends: str, log: list[str]
    ) -> None:
        about, come, told, taken, released = (threading.Event() for _ in range(5))

        class Overtaken(RequestScope):
            """It closes when a thread is about to release, and takes first."""

            __slots__ = ()

            def take_and_tell(self, record: Record) -> bool:
                about.set()
                assert come.wait(DEADLINE)
                return super().take_and_tell(record)

            def take(self, record: Record) -> bool:
                if threading.get_ident() != here:
                    told.set()
                    assert taken.wait(DEADLINE)
                    return super().take(record)
                come.set()
                assert told.wait(DEADLINE)
                is_mine = super().take(record)
                if ends == "under way":
                    taken.set()
                return is_mine

        @request_scoped
        def tenant() -> Iterator[str]:
            yield "tenant"
            if ends == "under way":
                assert released.wait(DEADLINE)
            log.append("tenant")

        def use_and_release() -> None:
            tenant()
            tenant.release()
            log.append("released")
            released.set()

        here = threading.get_ident()
        with Overtaken("the request scope") as scope:
            thread = in_thread(use_and_release, contextvars.copy_context())
            assert about.wait(DEADLINE)
        taken.set()
        thread.join(DEADLINE)
        assert sorted(log) == ["released", "tenant"]
        assert what_is_kept(scope) == []

    @pytest.mark.parametrize("others", [False, True], ids=["alone", "beside another"])
    def test_nor_for_one_of_sync_code(self, others: bool, log: list[str]) -> None:
        seen, go_on = threading.Event(), threading.Event()

        @lifespan_scoped
        def pool() -> Iterator[str]:
            yield "pool"
            log.append("pool")

        def ask() -> None:
            with pytest.raises(ScopeClosedError):
                pool()
            log.append("told")

        with about_to_find_its_lifespan(seen, go_on):
            thread = in_thread(ask, contextvars.copy_context())
            assert seen.wait(DEADLINE)
        with request_scope():
            if others:
                assert pool() == "pool"
            go_on.set()
            thread.join(DEADLINE)
            assert log == ["told"]
        assert log == (["told", "pool"] if others else ["told"])

    async def test_a_lifespan_is_not_begun_for_a_request_that_has_ended(
        self, log: list[str]
    ) -> None:
        seen, go_on = threading.Event(), threading.Event()

        @lifespan_scoped
        def pool() -> Iterator[str]:
            yield "pool"
            log.append("pool")

        def ask() -> None:
            with pytest.raises(ScopeClosedError):
                pool()
            log.append("told")

        async with about_to_find_its_lifespan(seen, go_on):
            thread = in_thread(ask, contextvars.copy_context())
            assert seen.wait(DEADLINE)
        go_on.set()
        thread.join(DEADLINE)
        await until(lambda: asyncio.get_running_loop() not in lifespans)
        assert log == ["told"]

    def test_nothing_is_set_up_where_it_closes_between_the_look_and_the_set_up(
        self, log: list[str]
    ) -> None:
        begun, closed = threading.Event(), threading.Event()
        here = threading.get_ident()

        class Overtaken(RequestScope):
            """It closes when the thread has found that it is to set up."""

            __slots__ = ()

            def begin(self, resource: Resource[Any], asker: Record | None) -> tuple[Record, bool]:
                found = super().begin(resource, asker)
                assert threading.get_ident() != here
                begun.set()
                assert closed.wait(DEADLINE)
                return found

        @request_scoped
        def tenant() -> str:
            log.append("tenant")
            return "tenant"

        def ask() -> None:
            with pytest.raises(ScopeClosedError):
                tenant()
            log.append("told")

        with Overtaken("the request scope") as scope:
            thread = in_thread(ask, contextvars.copy_context())
            assert begun.wait(DEADLINE)
        closed.set()
        thread.join(DEADLINE)
        assert log == ["told"]
        assert what_is_kept(scope) == []

    def test_what_has_to_end_sets_nothing_up_in_a_lifespan_that_goes_on(
        self, log: list[str]
    ) -> None:
        begun, closed = threading.Event(), threading.Event()

        @lifespan_scoped
        def pool() -> Iterator[str]:
            log.append("+pool")
            yield "pool"
            log.append("-pool")

        @request_scoped
        def late() -> str:
            begun.set()
            assert closed.wait(DEADLINE)
            return pool()

        def ask() -> None:
            with pytest.raises(ScopeClosedError, match="late"):
                late()
            log.append("told")

        with lifespan_scope() as lifespan:
            with request_scope():
                thread = in_thread(ask, contextvars.copy_context())
                assert begun.wait(DEADLINE)
            closed.set()
            thread.join(DEADLINE)
            assert log == ["told"]
            assert lifespan.records == {}
            assert pool() == "pool"
        assert log == ["told", "+pool", "-pool"]

    def test_of_two_threads_that_need_a_lifespan_at_once_one_begins_it(
        self, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        is_up, go_on = threading.Event(), threading.Event()
        real, here = LifespanScope.implied_by, threading.get_ident()

        @lifespan_scoped
        def pool() -> Iterator[str]:
            log.append("+pool")
            yield "pool"
            log.append("-pool")

        def come() -> None:
            with request_scope():
                pool()
                is_up.set()
                assert go_on.wait(DEADLINE)

        def overtaken(request: Scope) -> LifespanScope:
            made.append(real(request))
            if threading.get_ident() == here:
                threads.append(in_thread(come, contextvars.Context()))
                assert is_up.wait(DEADLINE)
                return made[0]
            return made[-1]

        monkeypatch.setattr(LifespanScope, "implied_by", overtaken)
        made: list[LifespanScope] = []
        threads: list[threading.Thread] = []
        with request_scope() as scope:
            assert pool() == "pool"
            assert scope.lifespan is made[1]
            assert [one.is_open for one in made] == [False, True]
            go_on.set()
            threads[0].join(DEADLINE)
            assert log == ["+pool"]
        assert log == ["+pool", "-pool"]

    @pytest.mark.parametrize("kind", ["async", "sync"])
    @pytest.mark.parametrize("declare", [request_scoped, lifespan_scoped])
    def test_what_a_thread_sets_up_with_what_is_there_is_waited_for(
        self, declare: Any, kind: str, log: list[str]
    ) -> None:
        begun, go_on = threading.Event(), threading.Event()

        @declare
        def base() -> Iterator[str]:
            yield "base"
            log.append("base")

        @request_scoped
        def late() -> Iterator[str]:
            base()
            begun.set()
            assert go_on.wait(DEADLINE)
            try:
                yield "late"
            finally:
                log.append("late")

        def ask() -> None:
            with pytest.raises(ScopeClosedError):
                late()

        class Closing(RequestScope):
            """The thread goes on when this one has begun to close."""

            __slots__ = ()

            async def stop(self, lifetime: Any, problems: list[BaseException]) -> None:
                threading.Timer(0.01, go_on.set).start()
                await super().stop(lifetime, problems)

        thread = closed_beside_a_thread(kind, Closing("the request scope"), base, ask, begun)
        thread.join(DEADLINE)
        assert log == ["late", "base"]

    @pytest.mark.parametrize("kind", ["async", "sync"])
    @pytest.mark.parametrize("declare", [request_scoped, lifespan_scoped])
    def test_what_a_thread_sets_up_is_not_given_what_is_about_to_go(
        self, declare: Any, kind: str, log: list[str]
    ) -> None:
        begun, go_on, asked = threading.Event(), threading.Event(), threading.Event()

        @declare
        def base() -> Iterator[str]:
            yield "base"
            log.append("base")

        @request_scoped
        def first_to_go() -> Iterator[str]:
            yield base()
            go_on.set()  # the scope closes, and has found that nobody uses it
            assert asked.wait(DEADLINE)

        @request_scoped
        def late() -> str:
            begun.set()
            assert go_on.wait(DEADLINE)
            try:
                log.append(f"given {base()}")
            finally:
                asked.set()
            return "late"

        def ask() -> None:
            with pytest.raises(ScopeClosedError):
                late()
            log.append("refused")

        thread = closed_beside_a_thread(kind, request_scope(), first_to_go, ask, begun)
        thread.join(DEADLINE)
        assert sorted(log) == ["base", "refused"]

    @pytest.mark.parametrize("kind", ["async", "sync"])
    @pytest.mark.parametrize("how", ["released", "set up too late"])
    def test_what_a_thread_is_tearing_down_goes_before_what_it_uses(
        self, how: str, kind: str, log: list[str]
    ) -> None:
        begun, closing, go_on = threading.Event(), threading.Event(), threading.Event()

        @request_scoped
        def base() -> Iterator[str]:
            yield "base"
            log.append("base")

        @request_scoped
        def user() -> Iterator[str]:
            base()
            if how == "set up too late":
                begun.set()
                assert closing.wait(DEADLINE)
            try:
                yield "user"
            finally:
                begun.set()
                assert go_on.wait(DEADLINE)
                log.append("user")

        def use() -> None:
            with suppress(ScopeClosedError):
                user()
                user.release()

        class Closing(RequestScope):
            """The thread goes on when this one has begun to close."""

            __slots__ = ()

            async def stop(self, lifetime: Any, problems: list[BaseException]) -> None:
                closing.set()
                threading.Timer(0.05, go_on.set).start()
                await super().stop(lifetime, problems)

        thread = closed_beside_a_thread(kind, Closing("the request scope"), base, use, begun)
        thread.join(DEADLINE)
        assert log == ["user", "base"]

    @pytest.mark.parametrize("kind", ["async", "sync"])
    @pytest.mark.parametrize("declare", [request_scoped, lifespan_scoped])
    def test_what_a_thread_takes_after_the_look_goes_before_what_it_uses(
        self, declare: Any, kind: str, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used, come, going, go_on = (threading.Event() for _ in range(4))
        here = threading.get_ident()

        class Looked(Record):
            """The other thread goes on when the end has looked what there is."""

            __slots__ = ()

            def __getattribute__(self, name: str) -> Any:
                if name == "number" and threading.get_ident() == here and not come.is_set():
                    come.set()
                    assert going.wait(DEADLINE)
                    threading.Timer(0.05, go_on.set).start()
                return super().__getattribute__(name)

        monkeypatch.setattr(books, "Record", Looked)

        @declare
        def base() -> Iterator[str]:
            yield "base"
            log.append("base")

        @request_scoped
        def user() -> Iterator[str]:
            yield base()
            going.set()
            assert go_on.wait(DEADLINE)
            log.append("user")

        def use() -> None:
            user()
            user.release()

        class Overtaken(RequestScope):
            """The thread waits for that."""

            __slots__ = ()

            def take_and_tell(self, record: Record) -> bool:
                used.set()
                assert come.wait(DEADLINE)
                return super().take_and_tell(record)

        thread = closed_beside_a_thread(kind, Overtaken("the request scope"), base, use, used)
        thread.join(DEADLINE)
        assert log == ["user", "base"]

    @pytest.mark.parametrize("kind", ["async", "sync"])
    def test_what_a_thread_has_just_taken_goes_before_what_it_uses(
        self, kind: str, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken, go_on = threading.Event(), threading.Event()
        here = threading.get_ident()

        class Interrupted(Record):
            """The other thread loses its turn when it has claimed the record."""

            __slots__ = ()

            def __setattr__(self, name: str, value: object) -> None:
                if name == "state" and value == ENDING and threading.get_ident() != here:
                    taken.set()
                    assert go_on.wait(DEADLINE)
                super().__setattr__(name, value)

        monkeypatch.setattr(books, "Record", Interrupted)

        @request_scoped
        def base() -> Iterator[str]:
            yield "base"
            log.append("base")

        @request_scoped
        def user() -> Iterator[str]:
            yield base()
            log.append("user")

        def use() -> None:
            user()
            user.release()

        class Closing(RequestScope):
            __slots__ = ()

            async def stop(self, lifetime: Any, problems: list[BaseException]) -> None:
                threading.Timer(0.05, go_on.set).start()
                await super().stop(lifetime, problems)

        thread = closed_beside_a_thread(kind, Closing("the request scope"), base, use, taken)
        thread.join(DEADLINE)
        assert log == ["user", "base"]

    @pytest.mark.parametrize("kind", ["async", "sync"])
    def test_what_a_thread_completes_as_the_end_comes_to_it_goes_before_what_it_uses(
        self, kind: str, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go_on, complete, over = (threading.Event() for _ in range(4))
        here = threading.get_ident()

        class Interrupted(Record):
            """The other thread loses its turn when the record has its number, and no value."""

            __slots__ = ()

            def __setattr__(self, name: str, value: object) -> None:
                if name == "value" and threading.get_ident() != here:
                    begun.set()
                    assert go_on.wait(DEADLINE)
                super().__setattr__(name, value)

        monkeypatch.setattr(books, "Record", Interrupted)

        @request_scoped
        def base() -> Iterator[str]:
            yield "base"
            log.append("base")
            over.set()

        @request_scoped
        def user() -> Iterator[str]:
            yield base()
            log.append("user")
            over.set()

        class Closing(RequestScope):
            """The end has come for the record when the thread completes it."""

            __slots__ = ()

            async def stop(self, lifetime: Any, problems: list[BaseException]) -> None:
                go_on.set()
                assert complete.wait(DEADLINE)
                await super().stop(lifetime, problems)

            def take_and_tell(self, record: Record) -> bool:
                complete.set()
                assert over.wait(DEADLINE)
                return super().take_and_tell(record)

        thread = closed_beside_a_thread(kind, Closing("the request scope"), base, user, begun)
        thread.join(DEADLINE)
        assert log == ["user", "base"]

    @pytest.mark.parametrize("kind", ["async", "sync"])
    def test_but_no_longer_than_a_teardown_may_take(
        self, kind: str, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Scope, "teardown_timeout", 0.01)
        begun, go_on = threading.Event(), threading.Event()

        @request_scoped
        def base() -> Iterator[str]:
            yield "base"
            log.append("base")

        @request_scoped
        def late() -> Iterator[str]:
            base()
            begun.set()
            assert go_on.wait(DEADLINE)
            yield "late"
            log.append("late")

        def ask() -> None:
            with pytest.raises(ScopeClosedError):
                late()

        thread = closed_beside_a_thread(kind, request_scope(), base, ask, begun)
        assert log == ["base"]
        go_on.set()
        thread.join(DEADLINE)
        assert log == ["base", "late"]


class TestWhoCancelsAllTasks:
    """As an event loop's end does: those too that have yet to take their first step."""

    @pytest.mark.parametrize("tasks", range(1, 5))
    async def test_what_was_set_up_in_a_thread_is_torn_down_all_the_same(
        self, tasks: int, log: list[str]
    ) -> None:
        known: set[asyncio.Task[Any]] = set()
        loop = asyncio.get_running_loop()

        def cancel_new_ones() -> None:
            for task in asyncio.all_tasks() - known:
                known.add(task)
                if len(cancelled) < tasks:
                    cancelled.append(task)
                    task.cancel()
            if not log:
                loop.call_soon(cancel_new_ones)

        cancelled: list[asyncio.Task[Any]] = []

        @request_scoped
        def tenant() -> Iterator[str]:
            failure: BaseException | None = None
            try:
                yield "tenant"
            except BaseException as error:
                failure = error
            log.append(f"tenant saw {type(failure).__name__}")

        @request_scoped
        async def first_to_go() -> AsyncIterator[None]:
            yield
            known.update(asyncio.all_tasks())
            loop.call_soon(cancel_new_ones)

        async with request_scope():
            await sync_to_async(tenant)()
            await first_to_go()
        assert log == ["tenant saw NoneType"]
        assert len(cancelled) == tasks

    async def test_work_that_has_yet_to_be_given_to_a_thread_is_done_there_all_the_same(
        self, log: list[str]
    ) -> None:
        before = asyncio.all_tasks()
        hopping = asyncio.create_task(hop(lambda: log.append("worked")))
        await asyncio.sleep(0)
        assert log == []
        new = asyncio.all_tasks() - before
        assert len(new) == 2  # that one, and the one which is to give the work to the thread
        for task in new:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hopping
        assert log == ["worked"]


class TestSyncGeneratorsOfALifespan:
    """Promises 10 and 17: one ends in the thread in which it began, one of its own if need be."""

    @staticmethod
    def own_threads() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name == "scoped-generator"]

    async def no_own_thread_is_left(self) -> None:
        await until(lambda: not self.own_threads())

    @pytest.mark.parametrize("fails", [False, True])
    async def test_first_used_in_a_thread_of_a_pool_it_has_its_own(
        self, fails: bool, log: list[str]
    ) -> None:
        @lifespan_scoped
        def cache() -> Iterator[str]:
            threads.append(threading.get_ident())
            yield "cache"
            threads.append(threading.get_ident())
            log.append("cache")
            if fails:
                raise ValueError("cache")

        threads: list[int] = []
        try:
            async with lifespan_scope():
                assert await asyncio.to_thread(cache) == "cache"
                assert cache() == "cache"
        except TeardownError:
            log.append("told")
        assert log == ["cache"] + ["told"] * fails
        assert len(set(threads)) == 1
        assert threads[0] != threading.get_ident()
        await self.no_own_thread_is_left()

    async def test_a_set_up_that_fails_leaves_no_thread(self) -> None:
        @lifespan_scoped
        def cache() -> Iterator[str]:
            raise ValueError("cache")
            yield

        async with lifespan_scope():
            with pytest.raises(ValueError, match="cache"):
                await asyncio.to_thread(cache)
            await self.no_own_thread_is_left()

    @pytest.mark.parametrize("has_ended", [False, True])
    async def test_where_there_is_a_way_back_to_the_thread_it_ends_there_or_here_if_that_has_ended(
        self, has_ended: bool, log: list[str]
    ) -> None:
        class Way:
            """As whoever lends threads leaves it in each."""

            def __init__(self, thread: ThreadPoolExecutor) -> None:
                self.thread = thread

            def keep(self) -> None:
                log.append("keep")

            def let_go(self) -> None:
                log.append("let go")

            def submit(self, work: Callable[[], None], /) -> "Future[None]":
                return self.thread.submit(work)

        @lifespan_scoped
        def cache() -> Iterator[str]:
            threads.append(threading.get_ident())
            yield "cache"
            threads.append(threading.get_ident())

        def use() -> str:
            thread_here.way = way
            try:
                return cache()
            finally:
                del thread_here.way

        threads: list[int] = []
        with ThreadPoolExecutor(1) as thread:
            way = Way(thread)
            hop = partial(sync_to_async, thread_sensitive=False, executor=thread)
            async with lifespan_scope():
                assert await hop(use)() == "cache"
                assert log == ["keep"]
                assert self.own_threads() == []
                if has_ended:
                    thread.shutdown()
        assert threads[0] != threading.get_ident()
        assert threads[1] == (threading.get_ident() if has_ended else threads[0])
        assert log == ["keep", "let go"]


class TestGarbage:
    """Promises 14 and 15: what Python lets go of half-way takes nothing from others."""

    @pytest.mark.parametrize("where", ["owner", "keeper"])
    async def test_a_set_up_that_is_collected_leaves_the_scope_at_hand_alone(
        self, where: str
    ) -> None:
        @request_scoped
        def tenant() -> object:
            return object()

        @request_scoped
        async def never() -> str:
            begun.append(True)
            try:
                await asyncio.get_running_loop().create_future()  # which nobody else holds
            finally:
                ended.append(True)
            return "never"

        begun: list[bool] = []
        ended: list[bool] = []

        async def forgotten() -> None:
            # Not `async with`: of what is collected in one, Python says more than we can mute.
            await request_scope().__aenter__()
            await (never() if where == "owner" else asyncio.gather(never(), never()))

        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)  # "Task was destroyed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of the scope: see below
            gc.collect()
            gc.disable()
            try:
                asyncio.create_task(forgotten(), context=contextvars.Context())  # noqa: RUF006
                await turns()
                async with request_scope() as scope:
                    found = tenant()
                    gc.collect()
                    assert tenant() is found
                    assert what_is_kept(scope) != []
                    assert ended == [True]
            finally:
                gc.enable()
        assert begun == [True]

    @pytest.mark.parametrize("kind", ["sync", "async"])
    def test_a_scope_that_is_collected_open_says_what_it_held(self, kind: str) -> None:
        @request_scoped
        def tenant() -> str:
            return "tenant"

        @request_scoped
        async def db() -> str:
            return "db"

        async def of_async_code() -> None:
            scope = request_scope()
            await scope.__aenter__()
            await db()

        def of_sync_code() -> None:
            request_scope().__enter__()
            tenant()

        held = "tenant" if kind == "sync" else "db"

        def leave_open() -> None:
            if kind == "sync":
                contextvars.Context().run(of_sync_code)
            else:
                contextvars.Context().run(asyncio.run, of_async_code())
            gc.collect()

        with pytest.warns(ResourceWarning, match=rf"request scope was never closed.*{held} \("):
            leave_open()

    def test_one_that_held_nothing_says_nothing(self) -> None:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            contextvars.Context().run(request_scope().__enter__)
            gc.collect()
        assert [one for one in warned if "never closed" in str(one.message)] == []


class TestSharedContext:
    """Promise 4: what only looks like a circle is none."""

    @pytest.mark.only_if(sys.version_info >= (3, 12), reason="a task's Context can be asked for")
    @pytest.mark.parametrize("first", ["owner", "keeper"])
    async def test_a_task_that_shares_a_context_is_no_part_of_the_set_up_there(
        self, first: str
    ) -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        @request_scoped
        async def db() -> AsyncIterator[str]:
            begun.set()
            await go_on.wait()
            yield "db"

        context = contextvars.copy_context()

        async def owner() -> None:
            async with request_scope():
                if first == "owner":
                    assert await db() == "db"
                else:
                    setting_up = asyncio.create_task(db())
                    assert await setting_up == "db"
                await asyncio.wait(others)

        async def other() -> str:
            return await db()

        others: list[asyncio.Task[str]] = []
        owning = asyncio.create_task(owner(), context=context)
        await begun.wait()
        others.append(asyncio.create_task(other(), context=context))
        await turns()
        go_on.set()
        await asyncio.wait_for(owning, DEADLINE)
        assert others[0].result() == "db"

    async def test_who_has_given_up_waiting_is_in_no_circle(self) -> None:
        go_on = asyncio.Event()

        @request_scoped
        async def one() -> str:
            waiting = asyncio.create_task(other())
            await turns(3)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
            go_on.set()
            await turns()
            return "one"

        @request_scoped
        async def other() -> str:
            await go_on.wait()
            return "other of " + await one()

        async with request_scope():
            first = asyncio.create_task(other())
            await turns()
            assert await asyncio.create_task(one()) == "one"
            assert await asyncio.wait_for(first, DEADLINE) == "other of one"


class TestPatience:
    """Promises 4 and 21: no wait for a thread that waits for this one."""

    @override_settings(ROOT_URLCONF=__name__)
    async def test_sync_code_that_waits_for_a_set_up_which_needs_its_thread_is_told_so(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(first_use, "_PATIENCE", 0.05)
        in_its_thread = threading.Event()

        @request_scoped
        async def user() -> str:
            await asyncio.to_thread(in_its_thread.wait, DEADLINE)
            return await sync_to_async(lambda: "ada")()  # as the ORM's async methods do

        def render() -> str:
            in_its_thread.set()
            return async_to_sync(user)()

        @view
        async def page(request: HttpRequest) -> HttpResponse:
            setting_up = asyncio.create_task(user())
            await turns()
            with pytest.raises(AsyncResourceError, match="may be waiting for the thread") as caught:
                await sync_to_async(render)()
            assert "user" in str(caught.value)
            assert await setting_up == "ada"
            return HttpResponse(await sync_to_async(render)())

        browser = Connection(ScopedASGIHandler(), "/page")
        await asyncio.wait_for(browser.start(), DEADLINE)
        assert (browser.status, browser.body) == (200, b"ada")

    def test_a_sync_factory_that_waits_for_itself_without_a_trace_is_told_so(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(first_use, "_PATIENCE", 0.05)

        @request_scoped
        def odd() -> object:
            return contextvars.Context().run(outside.run, odd)  # as another greenlet might

        with request_scope():
            outside = contextvars.copy_context()
            with pytest.raises(AsyncResourceError, match="in this very thread"):
                odd()


def cancel_all_but_the_first(
    tasks: "list[asyncio.Task[Any]]", order: str
) -> "list[asyncio.Task[Any]]":
    """Those that are cancelled, in the order in which they are."""
    cancelled = {
        "none": [],
        "first to last": tasks[1:],
        "last to first": tasks[:0:-1],
        "mixed": [*tasks[1::2], *tasks[2::2][::-1]],
    }[order]
    for task in cancelled:
        task.cancel()
    return cancelled


class TestWorkIsLinear:
    """Promise 25: no work grows faster than what was asked for."""

    @staticmethod
    def seconds(count: int, work: Callable[[int], Awaitable[float]]) -> float:
        """CPU time of this thread, without what asyncio's debug mode and the collector add."""
        gc.collect()
        gc.disable()
        try:
            with asyncio.Runner(debug=False) as runner:
                return runner.run(work(count))  # type: ignore[arg-type]
        finally:
            gc.enable()

    def check(self, work: Callable[[int], Awaitable[float]]) -> None:
        """Sixteen times as much takes 16 times as long, or 256 times where each looks at all."""
        ratios: list[float] = []
        for _ in range(4):
            few = min(self.seconds(1_000, work) for _ in range(3))
            ratios.append(self.seconds(16_000, work) / few)
            if ratios[-1] < 64:
                return
        pytest.fail(f"16 times as much took {ratios} times as long")

    @pytest.mark.parametrize("order", ["none", "first to last", "last to first", "mixed"])
    def test_children_that_wait_for_one_set_up_and_are_cancelled(self, order: str) -> None:
        async def work(count: int) -> float:
            ready = asyncio.Event()

            @request_scoped
            async def db() -> AsyncIterator[str]:
                await ready.wait()
                yield "db"

            async with request_scope():
                tasks = [asyncio.create_task(db()) for _ in range(count)]
                await turns(4)
                began = time.thread_time()
                cancelled = cancel_all_but_the_first(tasks, order)
                await turns(4)
                ready.set()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                seconds = time.thread_time() - began
                assert results.count("db") == count - len(cancelled)
                return seconds

        self.check(work)

    @pytest.mark.parametrize("how", ["release", "close"])
    def test_users_of_one_resource_that_goes(self, how: str) -> None:
        async def work(count: int) -> float:
            down: list[int] = []

            @request_scoped
            async def base() -> AsyncIterator[str]:
                yield "base"
                down.append(-1)

            @request_scoped(keyed=True)
            async def user(number: int) -> AsyncIterator[int]:
                await base()
                yield number
                down.append(number)

            async with request_scope() as scope:
                for number in range(count):
                    await user(number)
                began = time.thread_time()
                await (base.release() if how == "release" else scope.close())
                seconds = time.thread_time() - began
                assert down == [*range(count - 1, -1, -1), -1]
                return seconds

        self.check(work)

    def test_releases_at_once_of_different_ones(self) -> None:
        """In calls of functions and resumptions of coroutines: each that ends wakes the next."""

        async def calls(count: int) -> int:
            down: list[int] = []

            @request_scoped(keyed=True)
            async def lock(number: int) -> AsyncIterator[int]:
                yield number
                await asyncio.sleep(0)
                down.append(number)

            called = 0

            def count_calls(_: object, event: str, __: object) -> None:
                nonlocal called
                called += event == "call"

            async with request_scope():
                for number in range(count):
                    await asyncio.create_task(lock(number))
                sys.setprofile(count_calls)
                try:
                    await asyncio.gather(*(lock.release(number) for number in range(count)))
                finally:
                    sys.setprofile(None)
                assert down == list(range(count))
            return called

        with asyncio.Runner(debug=False) as runner:
            few, many = (runner.run(calls(count)) for count in (20, 200))
        assert many < 15 * few, (few, many)

    @pytest.mark.parametrize("order", ["none", "first to last", "last to first", "mixed"])
    def test_releases_that_wait_for_one_and_are_cancelled(self, order: str) -> None:
        async def work(count: int) -> float:
            go_on = asyncio.Event()

            @request_scoped
            async def db() -> AsyncIterator[str]:
                yield "db"
                await go_on.wait()

            async with request_scope():
                await asyncio.create_task(db())
                tasks = [asyncio.create_task(db.release()) for _ in range(count)]
                await turns(4)
                began = time.thread_time()
                cancelled = cancel_all_but_the_first(tasks, order)
                await turns(4)
                go_on.set()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                seconds = time.thread_time() - began
                assert results.count(None) == count - len(cancelled)
                return seconds

        self.check(work)

    def test_needs_of_one_resource_are_looked_through_once_each(self) -> None:
        """A lattice has more ways through it than anybody can go."""

        async def work() -> None:
            go_on = asyncio.Event()

            @request_scoped(keyed=True)
            async def step(level: int, side: int) -> str:
                if level == 24:
                    await go_on.wait()
                    return "end"
                await asyncio.gather(step(level + 1, 0), step(level + 1, 1))
                return "step"

            async with request_scope() as scope:
                asking = asyncio.create_task(step(0, 0))
                await until(lambda: len(under_way(scope)) == 49)
                last = asyncio.create_task(step(0, 0))
                go_on.set()
                assert await asking == await last == "step"
                assert all(record.state == HELD for record in scope.records.values())

        asyncio.run(work())


async def test_a_task_that_opens_scope_after_scope_keeps_none_of_them() -> None:
    """Promise 14: a worker, a consumer of messages, a command."""

    @request_scoped
    async def db() -> AsyncIterator[object]:
        yield object()

    closed: list[weakref.ref[Scope]] = []
    for _ in range(3):
        async with request_scope() as scope:
            await asyncio.gather(db(), db())  # in child tasks, so by a keeper
        closed.append(weakref.ref(scope))
    del scope
    gc.collect()
    assert [one() for one in closed] == [None] * 3


@pytest.mark.parametrize("how", ["the end of the scope", "release"])
def test_a_value_whose_finalizer_asks_for_it_goes(how: str) -> None:
    """Promise 24: as where it logs, through a filter that asks for the tenant."""
    answers: list[str] = []

    class Tenant:
        def __del__(self) -> None:
            try:
                answers.append(type(tenant()).__name__)
            except ScopeClosedError:
                answers.append("closed")

    makers: list[Callable[[], object]] = [Tenant, lambda: "another"]

    @request_scoped
    def tenant() -> object:
        return makers.pop(0)()

    with request_scope():
        tenant()
        if how == "release":
            tenant.release()
            gc.collect()
            assert answers == ["str"]
    gc.collect()
    assert answers == (["str"] if how == "release" else ["closed"])


async def test_a_record_that_is_gone_keeps_nothing() -> None:
    """Promise 14: the Context of a task that its factory has left running holds it for ever."""
    contexts: list[contextvars.Context] = []

    @request_scoped
    async def base() -> AsyncIterator[str]:
        yield "base"

    @request_scoped
    async def user() -> AsyncIterator[str]:
        await base()
        contexts.append(contextvars.copy_context())
        yield "user"

    async with request_scope():
        await user()
        await asyncio.create_task(user())
    record = contexts[0].run(current.get)
    assert isinstance(record, Record)
    assert (record.generator, record.place, record.uses, record.needs) == (None,) * 4
    assert record.used == []
    assert not record.waiters
    assert not hasattr(record, "value")


def test_a_thread_that_a_factory_has_started_may_close_the_scope(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is a part of that set-up, and so does not wait for it."""
    monkeypatch.setattr(Scope, "teardown_timeout", DEADLINE)

    @request_scoped
    def base() -> Iterator[str]:
        yield "base"

    @request_scoped
    def user() -> str:
        base()
        closing = in_thread(partial(run_without_loop, scope.close()), contextvars.copy_context())
        closing.join(DEADLINE / 2)
        ended.append(not closing.is_alive())
        return "user"

    def ask() -> None:
        with pytest.raises(ScopeClosedError):
            user()

    ended: list[bool] = []
    with request_scope() as scope:
        in_thread(ask, contextvars.copy_context()).join()
    assert ended == [True]


async def test_a_factory_that_some_child_asked_for_may_close_the_scope(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Scope, "teardown_timeout", DEADLINE)

    @request_scoped
    async def base() -> AsyncIterator[str]:
        yield "base"

    @request_scoped
    async def user() -> str:
        await base()
        await scope.close()
        return "user"

    async with request_scope() as scope:
        async with asyncio.timeout(DEADLINE / 2):
            with pytest.raises(ScopeClosedError):
                await asyncio.create_task(user())
