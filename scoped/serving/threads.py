"""
The thread that runs a request's sync code, kept and lent again.

Stock Django makes a thread for each request, and joins it in yet another one:
most of the time of a small request. Here it is lent when the first sync code
comes, and a request without any takes none.

Stock Django also throws away, with the thread, whatever a request has left in it. A thread
that is lent again is lent *clean*:

==================================================  ===========================================
What may be left in it                              What becomes of it
==================================================  ===========================================
anything at all, by a request that was cut off      the thread ends, and is not lent again
a transaction that nobody ended                     the connection is closed and forgotten
a connection that is broken or too old              closed, by Django's close_old_connections
the Context of a request                            none: each work runs in its request's own
a ``threading.local`` of a request that ended well  it stays, as under WSGI
==================================================  ===========================================

A thread that ends closes its database connections, which nobody else can reach.
"""

import asyncio
import atexit
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from contextvars import Context
from functools import partial
from itertools import count
from queue import SimpleQueue
from threading import RLock, Thread
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext

from scoped.core.names import printable_repr
from scoped.core.place import thread_here
from scoped.core.scope import Scope
from scoped.core.waits import do_for, outlast

__all__ = ["LentThread", "connection_made", "end_idle", "idle_ended", "lent_here", "tidy"]

T = TypeVar("T")
_Work = Callable[[], Any]

logger = logging.getLogger("scoped")

_numbers = count(1)


class _Worker:
    """A thread, and what it is to do: an end of its own to ``ThreadPoolExecutor``'s much."""

    def __init__(self) -> None:
        # What is to be done, and who waits for it; at the end None. To put something there takes
        # no lock of Python's, so a finalizer may do it in the midst of anything.
        self.queue: SimpleQueue[tuple[_Work, asyncio.Future[Any] | None] | None] = SimpleQueue()
        # Of the work that somebody waits for; each changed in one thread only. It is done in order.
        self.given = self.done = 0
        self.is_connected = False  # to a database, when it last had done such work
        # How many generators of a lifespan wait in it for their end; whether it ends after that.
        self.kept, self.is_over = 0, False
        self._lock = RLock()  # which a finalizer may take again
        self.thread = Thread(target=self._run, name=f"scoped-{next(_numbers)}", daemon=True)
        # Python may be told to let a thread inherit the Context that starts it
        # (``thread_inherit_context``, 3.14): here the first request's.
        Context().run(self.thread.start)
        _workers.add(self)

    @property
    def is_busy(self) -> bool:
        return self.given != self.done

    def give(self, work: _Work, future: "asyncio.Future[Any] | None" = None) -> None:
        if future is not None:
            self.given += 1
        self.queue.put((work, future))

    def end(self) -> None:
        """When it has done its work, and nothing waits in it for its end."""
        with self._lock:
            self.is_over = True
            if self.kept:
                return
        self.queue.put(None)

    # The way back to this thread, for what a lifespan has set up in it

    def keep(self) -> None:
        with self._lock:
            self.kept += 1

    def let_go(self) -> None:
        with self._lock:
            self.kept -= 1
            ends = self.is_over and not self.kept
        if ends:
            self.queue.put(None)

    def submit(self, work: Callable[[], None], /) -> "Future[None]":
        if not self.thread.is_alive():
            raise RuntimeError(f"{self.thread.name} has ended")
        done: Future[None] = Future()
        self.give(partial(do_for, done, work))
        return done

    def _run(self) -> None:
        thread_here.way = self
        while self._do(self.queue.get()):
            pass
        _close_connections()
        _workers.discard(self)

    # What it has done is forgotten on return, and not kept by a thread that waits.
    def _do(self, item: tuple[_Work, "asyncio.Future[Any] | None"] | None) -> bool:
        if item is None:
            return False
        work, future = item
        del item
        result, failure = None, None
        try:
            if future is None or not future.cancelled():
                result = work()
        except BaseException as error:
            failure = error
        if future is not None:
            # Else it has been told of no connection since; of one that failed it may not have been.
            if self.is_connected or failure is not None:
                self.is_connected = _is_connected()
            self.done += 1  # before anybody hears of it, who may then give the thread back
        try:
            if future is not None:
                _answer(future, result, failure)
            elif failure is not None:
                logger.error(
                    "In the thread for sync code: %s", printable_repr(failure), exc_info=failure
                )
        finally:
            del work, future, failure  # no cycle with this frame
        return True


def _answer(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    with suppress(RuntimeError):  # the event loop has been closed: nobody waits
        future.get_loop().call_soon_threadsafe(_settle, future, result, error)


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
        return
    try:
        future.set_exception(error)
    except TypeError:  # Python 3.11, of a StopIteration; later ones do as much by themselves
        future.set_exception(RuntimeError(f"sync code raised {printable_repr(error)}"))


def connection_made(**kwargs: Any) -> None:
    """For Django's signal ``connection_created``, which is sent in the thread."""
    if isinstance(worker := getattr(thread_here, "way", None), _Worker):
        worker.is_connected = True


# Those whose threads live.
_workers: set[_Worker] = set()
_idle: deque[_Worker] = deque()


def _forked() -> None:
    """Their threads are the parent's."""
    _workers.clear()
    _idle.clear()


os.register_at_fork(after_in_child=_forked)


class LentThread(Executor):
    """
    One thread for one request, taken at the first ``submit()``. ``tidy`` is
    called in the thread before that first work. ``with thread:`` is for a task of its own, in
    which ``sync_to_async`` then uses it; at the end it is given back, and not lent again
    where the block was left by an exception, or ``lend_again`` has become False.
    """

    # How many threads are kept when nobody uses them: as many as a thread pool of Python's has.
    max_idle: ClassVar[int] = min(32, (os.cpu_count() or 1) + 4)

    def __init__(self, tidy: _Work | None = None, *, lend_again: bool = True) -> None:
        self.tidy = tidy
        self.lend_again = lend_again
        self._worker: _Worker | None = None
        self._context: ThreadSensitiveContext | None = None

    def __enter__(self) -> Self:
        # What `async with ThreadSensitiveContext(executor=self)` does, but for the end: asgiref
        # then refuses the sync work of tasks that outlive the request. Left to itself it gives
        # them a thread of their own, as in stock Django.
        self._context = ThreadSensitiveContext()
        SyncToAsync.context_to_thread_executor[self._context] = self
        SyncToAsync.thread_sensitive_context.set(self._context)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        context, self._context = self._context, None
        assert context is not None
        SyncToAsync.context_to_thread_executor.pop(context, None)
        if exc is not None:
            self.lend_again = False
        self.give_back()

    @property
    def is_taken(self) -> bool:
        return self._worker is not None

    @property
    def is_busy(self) -> bool:
        return self._worker is not None and self._worker.is_busy

    def submit(  # type: ignore[override]
        self, work: Callable[..., T], /, *args: Any, **kwargs: Any
    ) -> "asyncio.Future[T]":
        """
        For the event loop's ``run_in_executor()``: a future of that loop, which
        an executor of the library makes by wrapping one of its own.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        bound: _Work = partial(work, *args, **kwargs) if args or kwargs else work
        if (worker := self._worker) is None:
            try:
                worker = _idle.pop()  # the one used last: its caches are warm
            except IndexError:
                worker = _Worker()
            self._worker = worker
            # asgiref looks for it at each hop: where it was never set that takes four times as long
            AsyncToSync.executors.current = None
            # As one work, for each wakes the thread: it costs more than what is done there.
            bound = partial(_first, self.tidy, bound)
        worker.give(bound, future)
        return future

    @property
    def can_be_tidied_later(self) -> bool:
        """Whether nobody could tell: that a database is connected to, or that it ends with it."""
        worker = self._worker
        return (
            worker is not None
            and self.lend_again
            and not worker.is_busy
            and not worker.is_connected
        )

    def tidy_later(self, tidy: _Work) -> None:
        """To be called after all else: it is done before whoever is next finds the thread."""
        assert self._worker is not None
        self._worker.give(partial(_last, tidy))

    def leave(self) -> None:
        """To be called in the thread, after all else: no idle thread holds what others wait for."""
        if not self.lend_again:
            _close_connections()
        elif self._worker is not None and self._worker.is_connected:
            _drop_transactions()

    def give_back(self) -> None:
        """To be called when the request has ended. What is still running there may go on."""
        self.tidy = None  # a stray task's Context may hold this for ever: keep nothing
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if not self.lend_again:
            worker.end()
        elif worker.is_busy:
            # A task that outlives the request is at work there: not to be lent before that is done.
            worker.give(partial(_take_back, worker))
        else:
            _take_back(worker)


def lent_here() -> LentThread | None:
    """The one that is lent to the task at hand."""
    context = SyncToAsync.thread_sensitive_context.get(None)
    executors = SyncToAsync.context_to_thread_executor
    executor: Executor | None = None if context is None else executors.get(context)
    return executor if isinstance(executor, LentThread) else None


def _first(tidy: _Work | None, work: Callable[[], T]) -> T:
    for before in (_drop_transactions, tidy):
        try:
            if before is not None:
                before()
        except Exception as error:
            logger.error("Before a request's sync code: %s", printable_repr(error), exc_info=error)
    return work()


def _last(tidy: _Work) -> None:
    try:
        tidy()
    finally:
        _drop_transactions()


def _take_back(worker: _Worker) -> None:
    if len(_idle) < LentThread.max_idle:
        _idle.append(worker)
    else:
        worker.end()


def _drop_transactions() -> None:
    """
    Close connections that are in a transaction, and forget them: Django never
    reconnects one that was closed in there, and `close_old_connections` leaves it alone.
    """
    for connection in _connections():
        if connection.in_atomic_block or connection.closed_in_transaction:
            _close(connection)


def _close_connections() -> None:
    """Those of this thread, which is about to end."""
    for connection in _connections():
        _close(connection)


def _is_connected() -> bool:
    try:
        return any(connection.connection is not None for connection in _connections())
    except Exception:  # the project's settings are wrong, as whoever uses them is told
        return False


def _connections() -> Sequence[Any]:
    from django.conf import settings  # noqa: PLC0415 (`import scoped` imports no Django)
    from django.db import connections  # noqa: PLC0415

    if not settings.configured:  # nobody can have used one
        return ()
    return connections.all(initialized_only=True)


def _close(connection: Any) -> None:
    from django.db import connections  # noqa: PLC0415 (as above)

    del connections[connection.alias]
    try:
        connection.close()
    except Exception as error:
        logger.warning(
            "A database connection could not be closed: %s", printable_repr(error), exc_info=error
        )


def tidy() -> None:
    """What Django does before and after a request, for work that is none."""
    from django.conf import settings  # noqa: PLC0415 (as above)
    from django.db import close_old_connections  # noqa: PLC0415 (as above)

    if settings.configured:
        close_old_connections()


def end_idle() -> None:
    """Let go of the threads that nobody uses. They close their connections."""
    while _idle:
        _idle.pop().end()


async def idle_ended() -> None:
    """As ``end_idle()``; when this returns, they have closed them. At a server's shutdown."""
    closed: list[asyncio.Future[Any]] = []
    while _idle:
        worker = _idle.pop()
        closed.append(asyncio.get_running_loop().create_future())
        worker.give(_close_connections, closed[-1])
        worker.end()
    if (cancellation := await outlast(*closed, seconds=Scope.teardown_timeout)) is not None:
        raise cancellation


@atexit.register
def _end_all() -> None:
    """Wait, as the library's executors do: what is done there may not be cut off."""
    for worker in list(_workers):
        worker.kept = 0  # whoever was to end what waits in it has not
        worker.end()
        worker.thread.join()
