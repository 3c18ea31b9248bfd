"""
A bound for teardowns. Most are over in one go and need none, so one is watched from when it
first suspends.
"""

import asyncio
import logging
from collections.abc import Awaitable
from contextvars import Context
from typing import TYPE_CHECKING, Any

from scoped.core.errors import teardown_timed_out

if TYPE_CHECKING:
    from scoped.core.resource import Resource
    from scoped.core.scope import Scope

__all__ = ["finish_in_time", "warn_if_slow"]

logger = logging.getLogger("scoped")


def warn_if_slow(resource: object, scope: "Scope", seconds: float) -> None:
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
        raise teardown_timed_out(resource, scope.teardown_timeout, scope.in_use_by())
    warn_if_slow(resource, scope, loop.time() - began)


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
