"""
The thread that runs a request's sync code, kept and lent again.

Stock Django makes a thread for each request, and joins it in yet another one:
most of the time of a small request. Here it is lent when the first sync code
comes, and a request without any takes none.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

__all__ = ["LentThread", "end_idle", "tidiers", "tidy"]

T = TypeVar("T")

# What is called in a thread before and after work that is no request, as closing connections.
tidiers: list[Callable[[], None]] = []

_idle: deque[ThreadPoolExecutor] = deque()
# Their threads are the parent's.
os.register_at_fork(after_in_child=_idle.clear)


class LentThread(Executor):
    """
    One thread for one request, taken at the first ``submit()``. ``tidy`` is
    called in the thread before that first work.
    """

    # How many threads are kept when nobody uses them: as many as a thread pool of Python's has.
    max_idle: ClassVar[int] = min(32, (os.cpu_count() or 1) + 4)

    def __init__(self, tidy: Callable[[], None] | None = None) -> None:
        self.tidy = tidy
        self.thread: ThreadPoolExecutor | None = None
        self.last: Future[Any] | None = None

    @property
    def is_taken(self) -> bool:
        return self.thread is not None

    @property
    def is_busy(self) -> bool:
        # Work is done in order. What was cancelled was never begun, so it says nothing.
        return self.last is not None and (not self.last.done() or self.last.cancelled())

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        if self.thread is None:
            try:
                self.thread = _idle.pop()  # the one used last: its caches are warm
            except IndexError:
                self.thread = ThreadPoolExecutor(1, thread_name_prefix="scoped")
            if self.tidy is not None:
                self.thread.submit(self.tidy)
        future = self.last = self.thread.submit(work, *args, **kwargs)
        return future

    def give_back(self) -> None:
        """To be called when the request has ended. What is still running there may go on."""
        self.tidy = None  # a stray task's Context may hold this for ever: keep nothing
        thread, self.thread = self.thread, None
        if thread is None:
            return
        if self.is_busy:
            # Its client has gone, and a sync view runs on: not to be lent before that is done.
            thread.submit(_take_back, thread)
        else:
            _take_back(thread)
        self.last = None


def _take_back(thread: ThreadPoolExecutor) -> None:
    if len(_idle) < LentThread.max_idle:
        _idle.append(thread)
    else:
        thread.shutdown(wait=False)


def tidy() -> None:
    for tidier in tidiers:
        tidier()


def end_idle() -> None:
    """Let go of the threads that nobody uses, as at a server's shutdown."""
    while True:
        try:
            _idle.pop().shutdown(wait=False)
        except IndexError:
            return
