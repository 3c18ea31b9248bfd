"""
The lifespan: what lives as long as the server, one for each event loop.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from contextvars import Context, copy_context
from types import TracebackType
from typing import Any, Self
from weakref import ReferenceType, ref

from scoped.core.current import current
from scoped.core.names import few
from scoped.core.record import ENDING, STARTING, Record
from scoped.core.resource import LIFESPAN
from scoped.core.scope import Scope
from scoped.core.unserved import Stay
from scoped.core.waits import (
    current_task,
    fork_safe_lock,
    outlast,
    run_without_loop,
    running_loop,
    set_done,
)

__all__ = ["LifespanScope", "eager", "lifespan_scope", "lifespans", "of_whose_factory"]

logger = logging.getLogger("scoped")

# The lifespan of each event loop; under None, that of code without a loop.
lifespans: dict[asyncio.AbstractEventLoop | None, "LifespanScope"] = {}

# Held while it is decided whether a lifespan is still in use.
_lock = fork_safe_lock()

# What the decorators made of those that are set up as soon as a lifespan opens.
eager: list[Any] = []


class LifespanScope(Scope):
    """
    In use as long as somebody holds it (a server, ``lifespan_scope()``) or, where
    nobody does, as long as requests are open in it. Whoever finds, under the lock, that neither is
    so has claimed it: nobody can join it any more, and that one closes it.
    """

    __slots__ = (
        *("_base", "_holders", "_idle", "_is_claimed", "_requests", "_stay"),
        "is_parents",
    )

    lifetime = LIFESPAN

    def __init__(self, base: Context) -> None:
        super().__init__("the lifespan")
        self._base = base
        self._holders = 0
        # By their addresses, and weakly: one that is never closed may be collected.
        self._requests: dict[int, ReferenceType[Scope]] = {}
        self._is_claimed = False
        self._stay: Stay | None = None
        # What each who has held it, and leaves, waits for; and the requests around that one, for
        # which it does not wait.
        self._idle: dict[asyncio.Future[None], set[Scope]] = {}
        self.is_parents = False  # that of the process which this one was forked from
        self.lifespan = self
        base.run(self._open, running_loop(), current_task())
        self.around = None  # nobody leaves it: its Context is its own

    def tell_of_opening(self) -> None:
        self._base.run(super().tell_of_opening)

    def context(self) -> Context:
        return self._base.copy()

    @classmethod
    def implied_by(cls, request: Scope) -> Self:
        self = cls(Context())
        self.owner, self.loop, self.thread = None, request.loop, request.thread
        self.sync_only = request.loop is None
        return self

    def withdraw(self) -> None:
        """Another thread's is the lifespan: nobody is to see this one among what is open."""
        self.is_open, self._state = False, "closed"

    @classmethod
    def hold(cls) -> "LifespanScope":
        """The lifespan of the running event loop, or of sync code, opened now if need be."""
        loop, is_new = running_loop(), False
        with _lock:
            self = lifespans.get(loop)
            if self is None or not self.can_be_joined:
                self, is_new = cls(copy_context()), True
                self.sync_only = loop is None
                lifespans[loop] = self
            self._holders += 1
        if is_new:  # not under the lock, which requests need that are opened then
            self.tell_of_opening()
        return self

    @property
    def is_held(self) -> bool:
        """Whether it is a server's, say, for which start-up is over or under way."""
        return self._holders > 0 and self.is_open

    @property
    def can_be_joined(self) -> bool:
        return self.is_open and not self._is_claimed

    def in_use_by(self) -> str:
        with _lock:
            return few(sorted(map(str, self._open_requests())))

    def _open_requests(self) -> set[Scope]:
        """With the lock held. From a copy: they may be collected at any step."""
        return {request for one in list(self._requests.values()) if (request := one()) is not None}

    def _claim(self) -> bool:
        """With the lock held. Where several wait for its requests, it is for the last of them."""
        if self._holders or self._idle or not self.can_be_joined:
            return False
        self._is_claimed = True
        return True

    async def drop(
        self, failure: BaseException | None = None, around: Iterable[Scope] = ()
    ) -> None:
        """
        Undo ``hold()``. The last one waits for the open requests, but for those ``around`` it,
        and closes; where there are any around it, the last of them does. Sync code waits for
        none, as those of other threads may have yet to come to it: the last of all does.
        """
        with _lock:
            self._holders -= 1
            if self._holders:
                return
        cancellation = None
        if self.loop is not None:
            cancellation = await self._requests_ended(set(around))
        with _lock:
            left = self._open_requests()
            if self.loop is not None:
                left &= set(around)
            # Else somebody has taken it over meanwhile.
            closes = not left and self._claim()
        if closes:
            await self.end(failure)
        if cancellation is not None:
            raise cancellation

    async def close_abandoned(self, failure: BaseException) -> None:
        self.owner = asyncio.current_task()
        with _lock:
            self._holders = 0  # they have gone
        cancellation = await self._requests_ended(set())
        with _lock:
            self._is_claimed = True
        await self.end(failure)
        if cancellation is not None:
            raise cancellation

    async def _requests_ended(self, around: set[Scope]) -> asyncio.CancelledError | None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.shutdown_timeout
        cancellation, is_late = None, False
        while True:
            with _lock:
                left = self._open_requests() - around
                # Of several who hold it, or wait, the last one sees to those who are left.
                if not left or self._holders or (is_late and self._idle):
                    return cancellation
                if is_late:
                    break
                idle = loop.create_future()
                self._idle[idle] = around
            del left  # which would keep what nobody closes
            seconds = deadline - loop.time()
            cancellation = await outlast(idle, seconds=seconds) or cancellation
            # Done, it may have been joined since, as by who handles one message after the other.
            is_late = not idle.done() or loop.time() >= deadline
            with _lock:
                del self._idle[idle]
        logger.error(
            "%d request(s) still open after %g seconds, and the lifespan closes: %s.",
            len(left),
            self.shutdown_timeout,
            few(sorted(map(str, left))),
        )
        tasks = [task for request in left if (task := request.give_up())]
        return await outlast(*tasks, seconds=self.teardown_timeout) or cancellation

    def join(self, request: Scope) -> bool:
        with _lock:
            if self.can_be_joined:
                self._requests[id(request)] = ref(request, self._lost)
                return True
            return False

    def part(self, request: Scope, *, can_wait: bool) -> Coroutine[Any, Any, None] | None:
        """
        The request leaves. Returns what is to be awaited, if that is the end of the lifespan, too;
        where its caller cannot wait, that of an event loop goes on by itself.
        """
        with _lock:
            self._requests.pop(id(request), None)  # its own factories' are not there
            if self._idle:
                self._tell_of_end()
            if self._requests or not self._claim():
                return None
            _forget(self)
        if can_wait or self.loop is None:
            return self.close()
        self.in_loop(self._close_later)
        return None

    def _lost(self, gone: ReferenceType[Scope]) -> None:
        """
        One that nobody has closed is collected, anywhere: so this closes nothing. Where it was the
        last, the next one does, or the end of the event loop.
        """
        with _lock:
            for address in list(self._requests):
                if self._requests.get(address) is gone:
                    self._requests.pop(address, None)
            with suppress(RuntimeError):  # the event loop has ended
                self._tell_of_end()

    def _tell_of_end(self) -> None:
        """Those who wait for requests that have all ended. With the lock held."""
        for idle, around in self._idle.items():
            # Counted before: to look at all as each of them leaves would be work without bound.
            if len(self._requests) <= len(around) and self._open_requests() <= around:
                self.in_loop(set_done, idle)

    def in_loop(self, callback: Callable[..., None], *arguments: Any) -> None:
        if running_loop() is self.loop:
            callback(*arguments)
        else:
            assert self.loop is not None
            self.loop.call_soon_threadsafe(callback, *arguments)

    def _close_later(self) -> None:
        self.owner = asyncio.create_task(self.close())

    def stay(self) -> None:
        """Outlive the requests, where no server says when it ends."""
        with _lock:
            self._holders += 1
        self._stay = Stay(self)

    def _closed(self) -> None:
        if self._stay is not None:
            self._stay.over()
        with _lock:
            _forget(self)

    def leave_to_parent(self) -> None:
        """
        In a process that was forked: what it holds is in use in the other one, and a
        connection, say, must neither be used from both nor be closed here.
        """
        if self._stay is not None:
            self._stay.over()
        _keep_for_ever(list(self.records.values()))
        self.records, self.ending = {}, None
        self.is_open, self._state = False, "closed"
        self.is_parents = True


_parents: list[object] = []


def _keep_for_ever(thing: object) -> None:
    """
    Not even at its exit may Python let go of it: a generator that is let go of is
    closed, and what it has around its `yield` with it.
    """
    _parents.append(thing)
    with suppress(ImportError):  # some builds of Python have none
        import ctypes  # noqa: PLC0415 (for forks alone)

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _forked() -> None:
    for lifespan in lifespans.values():
        lifespan.leave_to_parent()
    lifespans.clear()


os.register_at_fork(after_in_child=_forked)


def of_whose_factory(
    here: Scope | Record | None, loop: asyncio.AbstractEventLoop | None
) -> Record | None:
    """
    The lifespan's resource in whose factory the code is for which that is current. A scope that is
    opened there uses the lifespan, and does not join or hold it: the factory may keep the scope
    across its ``yield``, and who waits for what it holds would wait for the teardown, which comes
    after that.
    """
    while here is not None:
        if (
            isinstance(here, Record)
            and here.state in (STARTING, ENDING)  # its code runs
            and isinstance(lifespan := here.scope, LifespanScope)
            and loop in (None, lifespan.loop)
            and not lifespan.is_parents
        ):
            return here
        here = here.scope.around
    return None


def _forget(lifespan: LifespanScope) -> None:
    if lifespans.get(lifespan.loop) is lifespan:
        del lifespans[lifespan.loop]


class lifespan_scope:  # noqa: N801 (it is used as a function)
    """
    Hold the lifespan of the running event loop open: lifespan-scoped resources are
    kept until the end of the ``async with``, when the requests still open are waited
    for and all is torn down. Inside another one it is the same lifespan. With plain
    ``with``, where no event loop runs, it is that of sync code, and holds sync resources.

    Entering it sets up what is declared with ``eager=True``, and raises what that raises;
    leaving it raises TeardownError where a teardown failed.
    """

    def __init__(self) -> None:
        self._here: Scope | Record | None = None  # what is current in it, while it is open
        self._previous: Scope | Record | None = None
        self._sets_up = True

    async def __aenter__(self) -> Scope:
        scope = self._hold()
        try:
            for access in eager if self._sets_up else ():
                value = access()
                if access.resource.factory.is_async:
                    await value
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return scope

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope, around = self._leave()
        if scope is not None:
            await scope.drop(exc, around)

    def __enter__(self) -> Scope:
        if running_loop() is not None:
            raise RuntimeError("An event loop runs here: write `async with lifespan_scope():`.")
        scope = self._hold()
        try:
            for access in eager if self._sets_up else ():
                if not access.resource.factory.is_async:
                    access()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return scope

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope, around = self._leave()
        if scope is not None:
            run_without_loop(scope.drop(exc, around))

    def _hold(self) -> Scope:
        if self._here is not None:
            raise RuntimeError("This lifespan_scope() is open: make a new one for each use.")
        self._previous = current.get()
        loop = running_loop()
        mine = of_whose_factory(self._previous, loop)
        # A factory may be one of those, and open one as it ends.
        self._sets_up = mine is None
        if mine is not None and mine.scope.is_open and mine.scope.loop is loop:
            self._here = mine
        else:
            self._here = LifespanScope.hold()
        current.set(self._here)
        return self._here.scope

    def _leave(self) -> tuple[LifespanScope | None, list[Scope]]:
        """
        The lifespan that it has held, and the requests in which this block stands: they cannot end
        before it.
        """
        held, self._here = self._here, None
        if current.get() is held:
            current.set(self._previous)
        previous, self._previous = self._previous, None
        around: list[Scope] = []
        while previous is not None:
            around.append(previous.scope)
            previous = previous.scope.around
        return held if isinstance(held, LifespanScope) else None, around
