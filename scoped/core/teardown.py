"""
Tears down one resource: in the task or thread that set it up, and in time. Most are
over in one go and need no bound, so a teardown is watched from when it first suspends.
"""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from contextvars import Context
from threading import get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any

from scoped.core.errors import teardown_timed_out
from scoped.core.waits import hop, outlast

if TYPE_CHECKING:
    from scoped.core.resource import Resource
    from scoped.core.scope import Scope

__all__ = ["Elsewhere", "Keeper", "finish", "finish_elsewhere", "finish_in_time"]

logger = logging.getLogger("scoped")


class Keeper:
    """Tears down, in the task that set it up, what some other task than the owner asked for."""

    __slots__ = ("generator", "task", "verdict")

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[None] = task
        self.verdict: asyncio.Future[BaseException | None] = task.get_loop().create_future()


class Elsewhere:
    """Where a sync generator was started, if not by the owner."""

    __slots__ = ("context", "generator", "thread")

    def __init__(self, generator: Any, context: Context) -> None:
        self.generator = generator
        self.context = context
        self.thread = get_ident()


def finish(
    resource: "Resource[Any]", scope: "Scope", generator: Any, failure: BaseException | None
) -> Coroutine[Any, Any, None] | None:
    """
    Begin to tear it down, where its generator was started. Returns what is to be awaited
    for the rest, if that was not all.
    """
    rest = resource.factory.finish(generator, failure)
    return None if rest is None else finish_in_time(rest, resource, scope)


def finish_elsewhere(
    resource: "Resource[Any]",
    scope: "Scope",
    place: "Keeper | Elsewhere",
    failure: BaseException | None,
) -> Coroutine[Any, Any, None]:
    """Tear it down where its generator was started, if that is not here."""
    if isinstance(place, Keeper):
        return _finish_in_keeper(resource, scope, place, failure)
    return _finish_in_thread(resource, scope, place, failure)


async def _finish_in_keeper(
    resource: "Resource[Any]", scope: "Scope", keeper: Keeper, failure: BaseException | None
) -> None:
    if keeper.task is asyncio.current_task():  # it closes an abandoned scope
        rest = finish(resource, scope, keeper.generator, failure)
        if rest is not None:
            await rest
        return
    if not keeper.verdict.done():
        keeper.verdict.set_result(failure)
    for release in scope.visible.releases or ():
        if asyncio.current_task() in release.tasks:
            release.tasks.append(keeper.task)
    await _finish_in_task(resource, scope, keeper.task)


async def _finish_in_thread(
    resource: "Resource[Any]", scope: "Scope", elsewhere: Elsewhere, failure: BaseException | None
) -> None:
    def finish_there() -> None:
        elsewhere.context.run(resource.factory.finish, elsewhere.generator, failure)

    if scope.sync_only or elsewhere.thread == get_ident():
        finish_there()
    else:
        began = perf_counter()
        # In a task, as asgiref drops what is cancelled before the thread gets to it. In
        # time, as nothing ends a thread that hangs.
        task = asyncio.create_task(hop(finish_there))
        await _finish_in_task(resource, scope, task, scope.teardown_timeout)
        _warn_if_slow(resource, scope, perf_counter() - began)


async def _finish_in_task(
    resource: "Resource[Any]",
    scope: "Scope",
    task: "asyncio.Task[None]",
    seconds: float | None = None,
) -> None:
    """Wait for the task in which it is torn down, whoever cancels this one meanwhile."""
    cancellation: BaseException | None = await outlast(task, seconds=seconds)
    error: BaseException | None = None
    if not task.done():
        task.add_done_callback(scope.log_late)
        error = teardown_timed_out(resource, scope.teardown_timeout)
    elif task.cancelled():
        cancellation = cancellation or asyncio.CancelledError()
    else:
        error = task.exception()
    try:
        if cancellation is not None:
            if error is not None:
                scope.log(error)
            raise cancellation
        if error is not None:
            raise error
    finally:
        del cancellation, error


def _warn_if_slow(resource: object, scope: "Scope", seconds: float) -> None:
    if seconds > scope.slow_teardown:
        logger.warning("%s of %s took %.1f seconds to be torn down.", resource, scope, seconds)


async def finish_in_time(rest: Awaitable[None], resource: "Resource[Any]", scope: "Scope") -> None:
    """
    Await the rest of a teardown. Bounded by the scope's ``teardown_timeout``: then
    cancelled, and cancelled again each time that it has taken as long once more.
    """
    task = asyncio.current_task()
    assert task is not None
    loop = task.get_loop()
    watch, before = _watch_of(loop), task.cancelling()
    began = loop.time()
    watched = _Watched(task, resource, scope, began + scope.teardown_timeout)
    watch.add(watched)
    try:
        await rest
    except asyncio.CancelledError:
        if not watched.overdue or task.cancelling() > before + watched.overdue:
            raise  # somebody else's
    finally:
        del watch.teardowns[watched]
        for _ in range(watched.overdue):
            task.uncancel()
    if watched.overdue:
        raise teardown_timed_out(resource, scope.teardown_timeout)
    _warn_if_slow(resource, scope, loop.time() - began)


class _Watched:
    """A teardown under way in a task."""

    __slots__ = ("due", "overdue", "resource", "scope", "task")

    def __init__(
        self, task: "asyncio.Task[Any]", resource: "Resource[Any]", scope: "Scope", due: float
    ) -> None:
        self.task = task
        self.resource = resource
        self.scope = scope
        self.due = due
        self.overdue = 0

    def expire(self) -> None:
        seconds = self.scope.teardown_timeout
        self.overdue += 1
        self.due += seconds
        logger.error(
            "%s of %s is still being torn down after %g seconds: cancelling that.",
            self.resource,
            self.scope,
            seconds * self.overdue,
        )
        self.task.cancel()


class _Watch:
    """
    Cancels those of an event loop's teardowns that take too long. One timer
    serves them all: one for each would cost as much as a whole small scope.
    """

    __slots__ = ("loop", "teardowns", "timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.teardowns: dict[_Watched, None] = {}
        self.timer: asyncio.TimerHandle | None = None

    def add(self, teardown: _Watched) -> None:
        self.teardowns[teardown] = None
        if self.timer is None or self.timer.when() > teardown.due:
            self.set_timer(teardown.due)

    def set_timer(self, due: float) -> None:
        if self.timer is not None:
            self.timer.cancel()
        # In a Context of its own, or it would keep somebody's alive.
        self.timer = self.loop.call_at(due, self.look, context=Context())

    def look(self) -> None:
        self.timer, now = None, self.loop.time()
        for teardown in list(self.teardowns):
            if teardown.due <= now:
                teardown.expire()
        if self.teardowns:
            self.set_timer(min(teardown.due for teardown in self.teardowns))


_watches: dict[asyncio.AbstractEventLoop, _Watch] = {}


def _watch_of(loop: asyncio.AbstractEventLoop) -> _Watch:
    try:
        return _watches[loop]
    except KeyError:
        for other in list(_watches):  # here, as nobody tells us when a loop ends
            if other.is_closed():
                _watches.pop(other, None)
        return _watches.setdefault(loop, _Watch(loop))
