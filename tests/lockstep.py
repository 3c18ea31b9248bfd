"""
An event loop in which what happens depends on the program alone, so that a run
can be had again: time is virtual, and the loop waits for threads before it
goes on. And a count of suspensions, to interfere at each of them.
"""

import asyncio
import contextvars
import selectors
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from asgiref.sync import async_to_sync

from tests.slowness import within

# Seconds that the loop waits for a thread to do something: one that waits for another does not.
GRACE = within(0.05)
# Seconds without anything to do after which the loop is taken to hang.
PATIENCE = within(5.0)


class Hang(BaseException):
    """Nothing is left to run, and yet somebody waits."""


class Lockstep(asyncio.SelectorEventLoop):
    """
    Each sync job that runs in a thread is *busy* from when it is submitted until
    it calls the loop: with its result, or to have something awaited. The loop
    takes no step while a job is busy.
    """

    threads = ThreadPoolExecutor(16, thread_name_prefix="lockstep")

    def __init__(self) -> None:
        self._now = 0.0
        self.jobs: set[object] = set()  # not ended yet
        self._busy: set[object] = set()
        self._change = threading.Condition()
        self._thread = threading.local()
        super().__init__(_Turns(self))

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, function: Callable[..., Any], *arguments: Any
    ) -> "asyncio.Future[Any]":
        submit = (executor or self.threads).submit
        return asyncio.wrap_future(self.follow(submit, partial(function, *arguments)), loop=self)

    def follow(
        self, submit: Callable[[Callable[[], Any]], Future[Any]], work: Callable[[], Any]
    ) -> Future[Any]:
        """Submit the work to any thread: the loop waits for it."""
        job = object()

        def run() -> Any:
            outer = getattr(self._thread, "job", None)
            self._thread.job = job
            try:
                return work()
            finally:
                self._thread.job = outer

        self.jobs.add(job)
        self._set_busy(job, True)
        try:
            future = submit(run)
        except BaseException:
            self._end(job)
            raise
        future.add_done_callback(lambda _: self._end(job))
        return future

    def _end(self, job: object) -> None:
        self.jobs.discard(job)
        self._set_busy(job, False)

    def call_soon_threadsafe(
        self,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        handle = super().call_soon_threadsafe(callback, *args, context=context)
        if (job := getattr(self._thread, "job", None)) is not None:
            self._set_busy(job, False)
        return handle

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In a job: await it in the loop, as with ``async_to_sync(function)(*arguments)``."""
        job = getattr(self._thread, "job", None)  # none in a thread that it does not follow

        async def run() -> Any:
            try:
                return await function(*arguments)
            finally:
                if job is not None:
                    self._set_busy(job, True)

        return async_to_sync(run)()

    def wait_for_threads(self) -> None:
        with self._change:
            if not self._change.wait_for(lambda: not self._busy, GRACE):
                self._busy.clear()

    def _set_busy(self, job: object, busy: bool) -> None:
        with self._change:
            (self._busy.add if busy else self._busy.discard)(job)
            self._change.notify()


class _Turns(selectors.DefaultSelector):
    def __init__(self, loop: Lockstep) -> None:
        super().__init__()
        self.loop = loop

    def select(self, timeout: float | None = None) -> Any:
        self.loop.wait_for_threads()
        events = super().select(0)
        if events or timeout == 0:
            return events
        # Threads that the loop did not start, or has ceased to wait for, may yet have a word.
        if events := super().select(PATIENCE if timeout is None else 0.01):
            return events
        if timeout is None:
            raise Hang
        self.loop.advance(timeout)
        return events


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


def observe(at_suspension: Callable[[Any], None]) -> Callable[..., "asyncio.Task[Any]"]:
    """A task factory: calls back with the task's coroutine each time that a task suspends."""

    async def run(coroutine: Any) -> Any:
        return await counted(coroutine, lambda: at_suspension(coroutine))

    def factory(
        loop: asyncio.AbstractEventLoop, coroutine: Any, **kwargs: Any
    ) -> "asyncio.Task[Any]":
        task = asyncio.Task(run(coroutine), loop=loop, **kwargs)
        task.add_done_callback(lambda _: coroutine.close())  # cancelled before its first step
        return task

    return factory


async def tick() -> None:
    """Suspend once, at a future: cancelling that is what a cancellation of the task does."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.call_soon(lambda: future.done() or future.set_result(None))
    await future
