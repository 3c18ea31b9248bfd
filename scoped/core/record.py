"""One attempt to set up one resource: who asked, who waits, and whether they go in a circle."""

import asyncio
import threading
from collections.abc import Mapping
from threading import get_ident
from typing import TYPE_CHECKING, Any, ClassVar

from scoped.core.errors import CircularResourceError

if TYPE_CHECKING:
    from scoped.core.resource import Resource
    from scoped.core.scope import Scope

__all__ = ["Latch", "SetUp"]


class SetUp:
    """
    While the factory runs, this is what the ContextVar holds in place of the
    scope: so what its code and its child tasks ask for is known to be asked by it.
    """

    __slots__ = (
        *("asked_by", "done", "keeper", "latch", "needs", "resource", "scope", "uses", "waiters"),
    )

    # An access finds these, and takes the long way, which notes who asks.
    loop: ClassVar[None] = None
    thread: ClassVar[int] = 0
    lifespan: ClassVar[None] = None
    values: ClassVar[Mapping["Resource[Any]", Any]] = {}

    def __init__(
        self, resource: "Resource[Any]", scope: "Scope", latch: "Latch | None" = None
    ) -> None:
        self.resource = resource
        self.scope = scope
        self.asked_by: Resource[Any] | None = None
        self.done = False
        self.keeper: asyncio.Task[None] | None = None
        # What its factory waits for right now, and all that it has asked for.
        self.needs: list[SetUp] | None = None
        self.uses: list[Resource[Any]] | None = None
        # Tasks that wait for it, where it is async; threads wait for the latch, where it is sync.
        self.waiters: list[asyncio.Future[BaseException | None]] | None = None
        self.latch = latch

    @property
    def is_open(self) -> bool:
        return self.scope.is_open

    def settle(self, error: BaseException | None = None) -> None:
        """Tell those who wait. Keeps nothing: a stray task's Context may hold this for ever."""
        self.done = True
        self.keeper = None
        if self.waiters is not None:
            for waiter in self.waiters:
                if not waiter.done():
                    waiter.set_result(error)
        if self.latch is not None:
            latch, self.latch = self.latch, None
            latch.error = error
            latch.lock.release()

    def use(self, resource: "Resource[Any]") -> None:
        if self.uses is None:
            self.uses = [resource]
        else:
            self.uses.append(resource)

    def need_new(self, other: "SetUp") -> None:
        """What has just begun can close no circle yet."""
        if self.needs is None:
            self.needs = [other]
        else:
            self.needs.append(other)

    def need(self, other: "SetUp") -> None:
        # Noted before the look, so that of two threads closing a circle one sees it.
        self.need_new(other)
        if circle := _way(other, self, set()):
            self.got(other)
            raise CircularResourceError([step.resource for step in [self, *circle]])

    def waits_for(self, other: "SetUp | None") -> bool:
        return other is not None and _way(self, other, set()) is not None

    def got(self, other: "SetUp") -> None:
        if self.needs is not None:
            self.needs.remove(other)  # once: it may be needed in several child tasks


def _way(start: SetUp, goal: SetUp, seen: set[SetUp]) -> list[SetUp] | None:
    if start is goal:
        return [start]
    seen.add(start)
    for needed in list(start.needs or ()):
        if needed not in seen and (rest := _way(needed, goal, seen)):
            return [start, *rest]
    return None


class Latch:
    """Lets threads wait for a sync set-up in another one."""

    __slots__ = ("error", "lock", "thread")

    def __init__(self) -> None:
        self.thread = get_ident()
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        self.lock.acquire()
