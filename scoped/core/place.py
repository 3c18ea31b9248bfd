"""
Where a generator lives, and so is torn down: with the scope's owner (``None``), in a keeper, or
in a thread. One verb, ``tear_down``, and one question, ``is_here``.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import Context
from queue import SimpleQueue
from threading import get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from asgiref.sync import SyncToAsync

from scoped.core.abandoned import watch_over
from scoped.core.current import current
from scoped.core.deadline import finish_in_time, warn_if_slow
from scoped.core.errors import teardown_timed_out
from scoped.core.record import STARTING, Record
from scoped.core.waits import begin_hop, do_for, outlast

if TYPE_CHECKING:
    from scoped.core.scope import Scope

__all__ = ["Keeper", "OwnThread", "Thread", "Way", "begin_finish", "thread_here"]


def begin_finish(record: Record, failure: BaseException | None) -> Coroutine[Any, Any, None] | None:
    """
    Begin to tear down, where the generator was started. Returns what is to be awaited
    for the rest, if that was not all.
    """
    rest = record.resource.factory.finish(record.generator, failure)
    return None if rest is None else finish_in_time(rest, record.resource, record.scope)


class Keeper:
    """
    A task that sets up, waits, and tears down what some other task than the owner has asked
    for: so both happen in one task and one Context, whoever asked first.
    """

    __slots__ = ("is_unwanted", "record", "task", "verdict")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.task: asyncio.Task[None] | None = None
        self.verdict: asyncio.Future[BaseException | None] = (
            asyncio.get_running_loop().create_future()
        )
        self.is_unwanted = False  # it has been cancelled, and is ending

    def start(self, set_up: Callable[[], Awaitable[Any]], context: Context) -> None:
        self.task = task = context.run(asyncio.create_task, self.run(set_up))
        # Else the Context of the asker, a request's, would live as long as a lifespan's keeper.
        task.add_done_callback(self.ended, context=context)

    def ended(self, _: "asyncio.Task[None]") -> None:
        if (record := self.record).state == STARTING:  # cancelled before its first step
            record.scope.fail(record, asyncio.CancelledError())

    @property
    def is_over(self) -> bool:
        return self.task is None or self.task.done()

    def cancel(self) -> None:
        """Once: what is ending already has its time for that."""
        if self.task is not None and not self.is_unwanted:
            self.is_unwanted = True
            self.task.cancel()

    async def run(self, set_up: Callable[[], Awaitable[Any]]) -> None:
        record = self.record
        self.task = asyncio.current_task()  # which start() does not know yet where it is eager
        try:
            await set_up()
        except (Exception, asyncio.CancelledError):
            return  # told to those who wait
        del set_up  # it knows who has asked first
        if record.generator is None:
            return
        failure = await self.wait_for_verdict(record.scope)
        # So that what its code asks for, in child tasks too, is known to be asked by it.
        current.set(record)
        if (rest := begin_finish(record, failure)) is not None:
            await rest

    async def wait_for_verdict(self, scope: "Scope") -> BaseException | None:
        """
        A cancellation is its factory's own affair (a timeout or task group across the `yield`),
        which is told of it in its turn; or that of an event loop which ends: then too it waits
        for its turn, for order is a promise.
        """
        cancellation: BaseException | None = None
        task = asyncio.current_task()
        assert task is not None
        watch_over(scope)
        while not self.verdict.done():
            try:
                await asyncio.wait([self.verdict])
            except asyncio.CancelledError as error:
                cancellation = error
                task.uncancel()
        failure = self.verdict.result()
        return cancellation if failure is None and scope.tells_own_cancellation else failure

    def tear_down(
        self, record: Record, failure: BaseException | None
    ) -> Coroutine[Any, Any, None] | None:
        self.verdict.set_result(failure)
        assert self.task is not None
        return _wait_for(record, self.task)

    def is_here(self, *, in_loop: bool) -> bool:
        return in_loop


class Way(Protocol):
    """
    How to get back to a thread, which its maker leaves in ``thread_here.way``. ``keep()``: it
    is needed until ``let_go()``. ``submit()`` raises RuntimeError where it has ended all the same.
    """

    def keep(self) -> None: ...

    def let_go(self) -> None: ...

    def submit(self, work: Callable[[], None], /) -> "Future[None]": ...


thread_here = threading.local()


class Thread:
    """A thread of sync code, and the Context in which a sync generator was started there."""

    __slots__ = ("context", "ident", "way")

    def __init__(self, context: Context, way: Way | None = None) -> None:
        self.context = context
        self.ident = get_ident()
        self.way = way

    def tear_down(
        self, record: Record, failure: BaseException | None
    ) -> Coroutine[Any, Any, None] | None:
        if record.scope.sync_only or self.ident == get_ident():
            self.tear_down_now(record, failure)
            return None
        return self.finish_from_loop(record, self.finish_of(record, failure))

    def tear_down_now(self, record: Record, failure: BaseException | None) -> None:
        """As ``tear_down()``, for sync code, which waits for all of it."""
        finish_there = self.finish_of(record, failure)
        if self.way is None:
            finish_there()
        elif self.ident == get_ident():
            try:
                finish_there()
            finally:
                self.way.let_go()
        else:
            self.finish_in_thread(finish_there).result()

    def finish_of(self, record: Record, failure: BaseException | None) -> Callable[[], None]:
        # The record has none any more where the thread is busy, and comes to it too late.
        generator = record.generator

        def finish_there() -> None:
            # So that what its code asks for is known to be asked by it.
            self.context.run(current.set, record)
            self.context.run(record.resource.factory.finish, generator, failure)

        return finish_there

    def finish_in_thread(self, finish_there: Callable[[], None]) -> "Future[None]":
        assert self.way is not None
        done: Future[None] = Future()
        try:
            done = self.way.submit(finish_there)
        except RuntimeError:  # the thread has ended, with the process, say: then here
            do_for(done, finish_there)
        self.way.let_go()
        return done

    async def finish_from_loop(self, record: Record, finish_there: Callable[[], None]) -> None:
        scope, began = record.scope, perf_counter()
        # In time, as nothing ends a thread that hangs.
        if self.way is None:
            done: asyncio.Future[None] = begin_hop(finish_there)
        else:
            done = asyncio.wrap_future(self.finish_in_thread(finish_there))
        await _wait_for(record, done, scope.teardown_timeout)
        warn_if_slow(record.resource, scope, perf_counter() - began)

    def is_here(self, *, in_loop: bool) -> bool:
        return in_loop or self.ident == get_ident()


class OwnThread:
    """A thread for one sync generator, where there would be no way back to the one at hand."""

    def __init__(self) -> None:
        self.work: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        # Where asgiref finds the event loop that the thread at hand belongs to.
        known = vars(SyncToAsync.threadlocal)
        names = {"main_event_loop", "main_event_loop_pid"} & known.keys()
        self.belongs_to = {name: known[name] for name in names}
        # A daemon, for it has to outlive what Python waits for at its end.
        thread = threading.Thread(target=self._run, name="scoped-generator", daemon=True)
        Context().run(thread.start)

    def _run(self) -> None:
        vars(SyncToAsync.threadlocal).update(self.belongs_to)
        while (item := self.work.get()) is not None:
            work, done = item
            do_for(done, work)
            del work, done, item

    def keep(self) -> None: ...

    def let_go(self) -> None:
        self.work.put(None)

    def submit(self, work: Callable[[], None], /) -> "Future[None]":
        done: Future[None] = Future()
        self.work.put((work, done))
        return done


async def _wait_for(
    record: Record, future: "asyncio.Future[None]", seconds: float | None = None
) -> None:
    """Wait for where it is torn down, whoever cancels this task meanwhile."""
    scope, resource = record.scope, record.resource
    cancellation: BaseException | None = await outlast(future, seconds=seconds)
    error: BaseException | None = None
    if not future.done():
        future.add_done_callback(scope.log_late)
        error = teardown_timed_out(resource, scope.teardown_timeout, scope.in_use_by())
    elif future.cancelled():
        cancellation = cancellation or asyncio.CancelledError()
    else:
        error = future.exception()
    try:
        if cancellation is not None:
            if error is not None:
                scope.log(error)
            raise cancellation
        if error is not None:
            raise error
    finally:
        del cancellation, error
