"""Waits that no cancellation cuts short, and work that need not wait at all."""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextvars import Context, ContextVar
from functools import partial
from threading import RLock
from typing import Any

from asgiref.sync import AsyncToSync, sync_to_async

from scoped.core.names import printable_repr

__all__ = [
    "begin_hop",
    "current_task",
    "do_for",
    "fork_safe_lock",
    "hop",
    "is_cancelled",
    "outlast",
    "run_without_loop",
    "running_loop",
    "set_done",
    "sync_parent",
]

logger = logging.getLogger("scoped")


def fork_safe_lock() -> RLock:
    """
    Between threads. In a forked process it is free, though a thread of the parent, which
    is not there, may have held it. May be taken again by the thread that holds it: a
    finalizer (PEP 442) or a signal's handler may run there at any time.
    """
    lock = RLock()
    # As Python's own modules do it: another lock in its place would have to be looked up each time.
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]
    return lock


# None where no loop runs. What asyncio exports for loops; `get_running_loop()` raises, which costs
# sync code more than all else that opens its scope.
running_loop: Callable[[], asyncio.AbstractEventLoop | None] = asyncio._get_running_loop


def current_task() -> "asyncio.Task[Any] | None":
    return None if (loop := running_loop()) is None else asyncio.current_task(loop)


def is_cancelled() -> bool:
    """Whether somebody has cancelled the task at hand, and has not taken that back."""
    return (task := current_task()) is not None and task.cancelling() > 0


# The ContextVar beneath that Local of asgiref's, as far as this is known: where nothing is in it, a
# look at the Local makes an error, and a text for it, which takes a twentieth of a small request.
_stored: Any = getattr(AsyncToSync.executors, "__dict__", {}).get("_storage")
_beneath: Any = getattr(_stored, "_data", None)
_is_known = type(_beneath) is ContextVar


def sync_parent() -> Executor | None:
    """The executor of the sync code that waits for the code at hand, whose thread that is."""
    if _is_known and _beneath.get(None) is None:
        return None
    executor: Executor | None = getattr(AsyncToSync.executors, "current", None)
    return executor


async def outlast(
    *futures: "asyncio.Future[Any]", seconds: float | None = None
) -> asyncio.CancelledError | None:
    """
    Wait until all of the futures are done, or the time is up, however often the
    caller is cancelled meanwhile. Returns the last cancellation, for the caller to
    raise in its time.
    """
    loop = asyncio.get_running_loop()
    time_is_up = loop.create_future()
    timer = None
    if seconds is not None:
        # In a Context of its own: a timer that is cancelled keeps its Context for as long.
        timer = loop.call_later(seconds, set_done, time_is_up, context=Context())
    cancellation = None
    for future in futures:
        while not future.done() and not time_is_up.done():
            # Not asyncio.wait(), which is several times as slow.
            woken = loop.create_future()
            callback = partial(set_done, woken)
            future.add_done_callback(callback)
            time_is_up.add_done_callback(callback)
            try:
                await woken
            except asyncio.CancelledError as error:
                cancellation = error
            finally:
                future.remove_done_callback(callback)
                time_is_up.remove_done_callback(callback)
    if timer is not None:
        timer.cancel()
    return cancellation


def set_done(future: "asyncio.Future[None]", _: object = None) -> None:
    """Also for ``add_done_callback``, which gives the other one that is done."""
    if not future.done():
        future.set_result(None)


async def hop(work: Callable[[], None], *, seconds: float | None = None) -> None:
    """
    Run it in the thread for sync code, once; and see to it that it is run, whoever cancels
    this task meanwhile. A cancellation is raised when it is done.

    Raises TimeoutError where that takes longer than ``seconds``, if given. It is run all the
    same, and what it then raises is logged.
    """
    claims = [work]  # whoever takes it does it: asgiref may be asked twice, and may do both
    cancellation: BaseException | None = None
    while True:
        # In a task, as asgiref drops what a cancelled one's thread has not got to. Who cancels all
        # tasks, at an event loop's end, may have cancelled this one before its first step.
        task = asyncio.create_task(_hop(claims))
        cancellation = await outlast(task, seconds=seconds) or cancellation
        if not (task.cancelled() and claims):
            break
    try:
        if not task.done():
            _late.add(task)
            task.add_done_callback(_ended_late)
            raise cancellation or TimeoutError
        if task.cancelled():
            raise cancellation or asyncio.CancelledError
        if (error := task.exception() or cancellation) is not None:
            raise error
    finally:
        del cancellation


def begin_hop(work: Callable[[], None]) -> "asyncio.Future[None]":
    """As ``hop()``, in the background. Returns no task, which somebody might cancel."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[None] = loop.create_future()
    claims = [work]

    def once() -> None:
        claims.pop()()

    def begin() -> None:
        task = loop.create_task(hop(once))
        _begun.add(task)
        task.add_done_callback(ended)

    def ended(task: "asyncio.Task[None]") -> None:
        _begun.discard(task)
        if task.cancelled() and claims:  # before its first step
            begin()
        elif task.cancelled():
            result.cancel()
        elif (error := task.exception()) is not None:
            result.set_exception(error)
        else:
            result.set_result(None)

    begin()
    return result


# Event loops hold tasks weakly.
_begun: set[asyncio.Task[None]] = set()
_late: set[asyncio.Task[None]] = set()


def _ended_late(task: "asyncio.Task[None]") -> None:
    _late.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("In the thread for sync code, late: %s", printable_repr(error), exc_info=error)


def do_for(done: "Future[None]", work: Callable[[], None]) -> None:
    """Do it, and tell who waits in another thread how it went."""
    try:
        work()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)


async def _hop(claims: list[Callable[[], None]]) -> None:
    done: Future[None] = Future()
    while claims:
        try:
            await _do_once(claims, done)
        except asyncio.CancelledError:
            if asyncio.current_task() in _late:
                raise  # the event loop ends
            # Of this very task: not before it is done.
        except RuntimeError:
            # A cancelled async_to_sync() has left its executor, which has ended, in the Context.
            if sync_parent() is None:
                raise
            AsyncToSync.executors.current = None
    if done.done():  # as ever, but where a cancellation has come between
        done.result()
        return
    ended = asyncio.wrap_future(done)
    while not ended.done():
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError:
            if asyncio.current_task() in _late:
                raise
    ended.result()


@sync_to_async  # once, as asgiref looks into what it is given
def _do_once(claims: list[Callable[[], None]], done: "Future[None]") -> None:
    try:
        claimed = claims.pop()
    except IndexError:  # pragma: no cover (which of the two is first is asgiref's affair)
        return
    do_for(done, claimed)


def run_without_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that is known not to suspend: one body serves sync and async callers."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise AssertionError("a scope without async resources suspended")
