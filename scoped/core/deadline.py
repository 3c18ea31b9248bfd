"""
A bound for teardowns, and for what else of the project's runs at the end. Most teardowns are over
in one go and need none, so one is watched from when it first suspends.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from scoped.core.errors import teardown_timed_out

if TYPE_CHECKING:
    from scoped.core.resource import Resource
    from scoped.core.scope import Scope

__all__ = ["Bound", "finish_in_time", "warn_if_slow"]

logger = logging.getLogger("scoped")


def warn_if_slow(resource: object, scope: "Scope", seconds: float) -> None:
    if seconds > scope.slow_teardown:
        logger.warning("%s of %s took %.1f seconds to be torn down.", resource, scope, seconds)


async def finish_in_time(rest: Awaitable[None], resource: "Resource[Any]", scope: "Scope") -> None:
    """Await the rest of a teardown. Bounded by the scope's ``teardown_timeout``."""
    text = "%s of %s is still being torn down after %g seconds: cancelling that."
    began = perf_counter()
    with Bound(scope.teardown_timeout, partial(logger.error, text, resource, scope)) as bound:
        await rest
    if bound.overdue:
        raise teardown_timed_out(resource, scope.teardown_timeout, scope.in_use_by())
    warn_if_slow(resource, scope, perf_counter() - began)


class Bound:
    """
    Around what a task awaits: after so many seconds it is cancelled, and cancelled again each time
    that it has taken as long once more. ``say`` is called before, with how many they are by then.
    Such a cancellation is not raised: ``overdue`` counts them.
    """

    __slots__ = ("before", "due", "overdue", "say", "seconds", "task", "watch")

    def __init__(self, seconds: float, say: Callable[[float], None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.watch = _watch_of(task.get_loop())
        self.seconds = seconds
        self.say = say
        self.due = self.watch.loop.time() + seconds
        self.before = task.cancelling()
        self.overdue = 0

    def __enter__(self) -> Self:
        self.watch.add(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        del self.watch.bounds[self]
        overdue, cancelling = self.overdue, self.task.cancelling()
        for _ in range(overdue):
            self.task.uncancel()
        # Else it is somebody else's.
        is_ours = overdue > 0 and cancelling <= self.before + overdue
        return is_ours and isinstance(exc, asyncio.CancelledError)

    def expire(self) -> None:
        self.overdue += 1
        self.due += self.seconds
        self.say(self.seconds * self.overdue)
        self.task.cancel()


class _Watch:
    """
    Cancels what takes too long in an event loop. One timer serves all bounds: one for
    each would cost as much as a whole small scope.
    """

    __slots__ = ("bounds", "loop", "timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.bounds: dict[Bound, None] = {}
        self.timer: asyncio.TimerHandle | None = None

    def add(self, bound: Bound) -> None:
        self.bounds[bound] = None
        if self.timer is None or self.timer.when() > bound.due:
            self.set_timer(bound.due)

    def set_timer(self, due: float) -> None:
        if self.timer is not None:
            self.timer.cancel()
        # In a Context of its own, or it would keep somebody's alive.
        self.timer = self.loop.call_at(due, self.look, context=Context())

    def look(self) -> None:
        self.timer, now = None, self.loop.time()
        for bound in list(self.bounds):
            if bound.due <= now:
                bound.expire()
        if self.bounds:
            self.set_timer(min(bound.due for bound in self.bounds))


_watches: dict[asyncio.AbstractEventLoop, _Watch] = {}


def _watch_of(loop: asyncio.AbstractEventLoop) -> _Watch:
    try:
        return _watches[loop]
    except KeyError:
        for other in list(_watches):  # here, as nobody tells us when a loop ends
            if other.is_closed():
                _watches.pop(other, None)
        return _watches.setdefault(loop, _Watch(loop))
