"""
``Record``: one resource in one scope, from the start of its set-up to the end of its teardown::

    STARTING ──complete──> HELD ──take──> ENDING ──gone──> GONE
        └──────fail─────────────────────────────────────────┘

``value`` is there, as a slot, exactly while the record is HELD. So the short way of an access,
``scope.records[resource].value``, needs no look at the state; and to take the record is to
``del record.value``: one step, which of several tasks and threads succeeds for one.
"""

import asyncio
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from scoped.core.errors import CircularResourceError, set_traceback
from scoped.core.waits import fork_safe_lock, set_done

if TYPE_CHECKING:
    from scoped.core.place import Keeper, Thread
    from scoped.core.resource import Resource
    from scoped.core.scope import Scope

__all__ = [
    "ENDING",
    "GONE",
    "HELD",
    "RESPONSE_FIRST",
    "STARTING",
    "Latch",
    "LoopLatch",
    "Outcome",
    "Record",
    "next_number",
]

STARTING, HELD, ENDING, GONE = range(4)

# The order of completion in this process, which threads may ask for at the same time.
next_number = count(1).__next__

# Added where a resource lives until the response: it is torn down before all others.
RESPONSE_FIRST = 1 << 62

# Held while a record's notes are made, which several threads of one factory may want to make.
_lock = fork_safe_lock()


class Record:
    """
    While its factory runs it is what the ContextVar holds in place of the scope: so what
    the factory's code and its child tasks ask for is known to be asked by it.
    """

    __slots__ = (
        *("generator", "needs", "number", "place", "resource", "scope", "state", "uses", "value"),
        "waiters",
    )

    number: int  # in the order of completion
    value: Any

    # An access that finds a record in place of a scope takes the long way, which notes who asks.
    loop: ClassVar[None] = None
    thread: ClassVar[int] = 0
    lifespan: ClassVar[None] = None
    records: ClassVar[Mapping["Resource[Any]", "Record"]] = {}

    def __init__(self, resource: "Resource[Any]", scope: "Scope") -> None:
        self.resource = resource
        self.scope = scope
        self.state = STARTING
        self.generator: Any = None
        # Where the generator lives, if not with the scope's owner.
        self.place: Keeper | Thread | None = None
        # All that its factory has asked for; what its set-up or teardown waits for right now, by
        # what waits. Noted on who asks: what lives long would else know every user it ever had.
        self.uses: dict[Record, None] | None = None
        self.needs: dict[object, Record] | None = None
        # Who waits for its set-up, or for its end: futures of tasks, latches of threads.
        self.waiters: dict[asyncio.Future[Any] | Latch, None] | None = None

    def __repr__(self) -> str:
        return f"<Record of {self.resource}, {_STATES[self.state]}>"

    @property
    def is_open(self) -> bool:
        """Whether its factory's code may be at work: also while its scope closes."""
        return self.scope.is_open or self.state == ENDING

    # Who waits

    def wait(self, waiter: "asyncio.Future[Any] | Latch") -> None:
        """To be told. Whoever waits looks at the state after this, so that nobody is missed."""
        if self.waiters is None:
            with _lock:
                if self.waiters is None:  # pragma: no branch (another thread has, since)
                    self.waiters = {}
        self.waiters[waiter] = None

    def forget(self, waiter: "asyncio.Future[Any] | Latch") -> None:
        """It waits no more, if it still does."""
        assert self.waiters is not None
        self.waiters.pop(waiter, None)

    def settle(self, outcome: "Outcome | None") -> None:
        """Tell those who wait, after the state has changed; None: it has gone."""
        if (waiters := self.waiters) is None:
            return
        for waiter in list(waiters):
            try:
                del waiters[waiter]  # whoever completes it and whoever takes it may come at once
            except KeyError:  # pragma: no cover (a race of two threads)
                continue
            if isinstance(waiter, Latch):
                waiter.wake(outcome)
            elif not waiter.done():
                with suppress(RuntimeError):  # its event loop has ended, and so has who waits
                    waiter.set_result(outcome)

    def gone(self) -> None:
        """
        Told of no more as what is being torn down. Nothing is kept: the Context of a stray task
        may hold the record for ever.
        """
        self.state = GONE
        self.generator = self.place = self.uses = self.needs = None
        if self.resource.is_keyed:
            self.resource = getattr(self.resource, "keyed", self.resource)  # without its key
        if self.waiters is not None:
            self.settle(None)
        if (ending := self.scope.ending) is not None:
            ending.pop(self, None)

    # Who asks for what

    def use(self, other: "Record") -> None:
        if (uses := self.uses) is None:
            with _lock:
                if (uses := self.uses) is None:  # pragma: no branch (another thread has, since)
                    uses = self.uses = {}
        uses[other] = None

    @property
    def used(self) -> "list[Record]":
        """As it is now: another thread may go on with it, or be done."""
        return list(self.uses or ())

    def note_need(self, other: "Record", waiter: object) -> None:
        """Its factory, or its teardown, waits for the other's set-up or end: until ``got()``."""
        if (needs := self.needs) is None:
            with _lock:
                if (needs := self.needs) is None:  # pragma: no branch (another thread has, since)
                    needs = self.needs = {}
        needs[waiter] = other

    def need(self, other: "Record", waiter: object) -> None:
        """
        As above, for what is being set up. Raises CircularResourceError where that waits for
        this; noted before the look, so that of two threads which close a circle one sees it.
        """
        self.note_need(other, waiter)
        if other.needs and (circle := other.way_to(self)):
            self.got(waiter)
            raise CircularResourceError([step.resource for step in [self, *circle]])
        for record in list(self.scope.ending or ()):
            record.settle(None)  # who waits for its end may be what it now waits for, and looks

    def got(self, waiter: object) -> None:
        if (needs := self.needs) is not None:
            needs.pop(waiter, None)

    def way_to(self, goal: "Record") -> "list[Record] | None":
        """The records that wait for each other from this one to the goal, if they do."""
        if self is goal:
            return [self]
        came_from: dict[Record, Record] = {}
        ahead: list[Record] = [self]
        while ahead:
            here = ahead.pop()
            for needed in list((here.needs or {}).values()):
                if needed is self or needed in came_from:
                    continue
                came_from[needed] = here
                if needed is goal:
                    return list(_back(goal, self, came_from))[::-1]
                ahead.append(needed)
        return None


_STATES = ("STARTING", "HELD", "ENDING", "GONE")


def _back(goal: Record, start: Record, came_from: dict[Record, Record]) -> Iterator[Record]:
    step = goal
    while step is not start:
        yield step
        step = came_from[step]
    yield start


class Outcome(NamedTuple):
    """Of a set-up, for those who wait for it."""

    value: Any = None
    error: BaseException | None = None
    # Who waits raises the error with this: else each of many would leave its frames on it.
    traceback: TracebackType | None = None

    def result(self) -> Any:
        if self.error is None:
            return self.value
        set_traceback(self.error, self.traceback)
        raise self.error


class Latch:
    """Lets a thread wait."""

    __slots__ = ("__weakref__", "lock", "outcome")

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.lock = threading.Lock()
        self.lock.acquire()

    def wake(self, outcome: "Outcome | None") -> None:
        self.outcome = outcome
        self.lock.release()

    async def opened(self, seconds: float) -> bool:
        """Wait so long at most; this one does so at once. Returns whether it has been opened."""
        return self.lock.acquire(timeout=max(0, seconds))


class LoopLatch(Latch):
    """Lets an event loop wait for what another thread does."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.outcome = None
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self, outcome: "Outcome | None") -> None:  # noqa: ARG002
        with suppress(RuntimeError):  # the event loop has ended
            self.future.get_loop().call_soon_threadsafe(set_done, self.future)

    async def opened(self, seconds: float) -> bool:
        timeout = None if seconds == math.inf else max(0, seconds)
        await asyncio.wait([self.future], timeout=timeout)
        return self.future.done()
