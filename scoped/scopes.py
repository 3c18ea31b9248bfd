"""
``Scope`` holds the values of one request, or of one lifespan: it sets each up
on first use and tears all of them down, in reverse order, when it closes.

One ContextVar holds one object, the current scope. Child tasks and threads
copy the Context and so share the scope by reference.

Who runs a factory
    The scope's *owner* task (the request's own) runs it inline: no task, no
    hop. Asked for in any other task, an async factory runs in a *keeper*: a
    task that sets it up, waits for the scope to close, and tears it down. So
    both happen in one task and one Context, whoever asked first. What a
    lifespan holds always has a keeper, in a Context no request has touched.

What a request's scope holds while a view asks for ``db``, whose factory asks
for ``user``::

    values               finalizers             pending
    {}                   {}                     {}            opened
    {}                   {}                     {db}          db's factory runs
    {}                   {}                     {db, user}    and asks for user
    {user: ..}           {user: ..}             {db}          user's factory has yielded
    {user: .., db: ..}   {user: .., db: ..}     {}            db's factory has yielded
    {user: ..}           {user: ..}             {}            closing: db is torn down
    {}                   {}                     {}            closed

A value enters ``values`` when its set-up is complete, so after everything that
its factory used; they are taken out again last in, first out.
"""

import asyncio
import atexit
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from enum import Enum
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from asgiref.sync import AsyncToSync, sync_to_async

from scoped.exceptions import (
    AsyncResourceError,
    CircularResourceError,
    LifetimeError,
    NoScopeError,
    ScopeClosedError,
    TeardownError,
)

if TYPE_CHECKING:
    from scoped.resources import Resource

__all__ = ["Lifetime", "Scope", "current_scope", "lifespan_scope", "request_scope"]

logger = logging.getLogger("scoped")


class Lifetime(Enum):
    REQUEST = "request"
    LIFESPAN = "lifespan"


current: ContextVar["Scope | None"] = ContextVar("scoped.current", default=None)

# The set-up in whose factory the code at hand runs, or the last one in this
# Context. A factory's child tasks copy it, so circles show through them too.
_setting_up: ContextVar["_SetUp | None"] = ContextVar("scoped.setting_up", default=None)

# The lifespan of each event loop; under None, that of code without a loop.
_lifespans: dict[asyncio.AbstractEventLoop | None, "LifespanScope"] = {}

# Held while it is decided whether a lifespan is still in use.
_lifespans_lock = threading.Lock()

# Resources that are set up as soon as a lifespan opens.
eager: list["Resource[Any]"] = []

# Seconds for which sync code in the event loop's thread waits for another
# thread, which may itself be waiting for that loop.
_LOOP_PATIENCE = 10.0


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _current_task() -> "asyncio.Task[Any] | None":
    return asyncio.current_task() if _running_loop() is not None else None


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
    timer = None if seconds is None else loop.call_later(seconds, _set_done, time_is_up)
    cancellation = None
    for future in futures:
        while not future.done() and not time_is_up.done():
            # Not asyncio.wait(), which is several times as slow.
            woken = loop.create_future()
            wake = partial(_wake, woken)
            future.add_done_callback(wake)
            time_is_up.add_done_callback(wake)
            try:
                await woken
            except asyncio.CancelledError as error:
                cancellation = error
            finally:
                future.remove_done_callback(wake)
                time_is_up.remove_done_callback(wake)
    if timer is not None:
        timer.cancel()
    return cancellation


def _wake(woken: "asyncio.Future[None]", _: object) -> None:
    _set_done(woken)


def _set_done(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def hop(work: Callable[[], None]) -> None:
    """
    Run it in the thread for sync code; and see to it that it is run, though this
    task is cancelled, or a cancelled ``async_to_sync()`` has left its executor,
    which has ended, behind in the Context.
    """
    begun, cancellation = False, None

    def run() -> None:
        nonlocal begun
        begun = True
        work()

    while not begun:
        try:
            await sync_to_async(run)()
        except asyncio.CancelledError as error:
            cancellation = error  # asgiref drops what the thread has not got to
        except RuntimeError:
            if begun or getattr(AsyncToSync.executors, "current", None) is None:
                raise
            AsyncToSync.executors.current = None
    if cancellation is not None:
        raise cancellation


def run_without_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that is known not to suspend: one body serves sync and async callers."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise AssertionError("a scope without async resources suspended")


class _SetUp:
    """One attempt to set up one resource, and those who wait for it."""

    __slots__ = ("done", "keeper", "latch", "needs", "resource", "waiters")

    def __init__(self, resource: "Resource[Any]", latch: "_Latch | None" = None) -> None:
        self.resource = resource
        self.done = False
        self.keeper: asyncio.Task[None] | None = None
        # What its factory waits for right now.
        self.needs: list[_SetUp] | None = None
        # Tasks that wait for it, where it is async; threads wait for the latch, where it is sync.
        self.waiters: list[asyncio.Future[BaseException | None]] | None = None
        self.latch = latch

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

    def need(self, other: "_SetUp") -> None:
        if self.needs is None:
            self.needs = []
        # Noted before the look, so that of two threads closing a circle one sees it.
        self.needs.append(other)
        if circle := _way(other, self, set()):
            self.needs.remove(other)
            raise CircularResourceError([step.resource for step in [self, *circle]])

    def got(self, other: "_SetUp") -> None:
        if self.needs is not None:
            self.needs.remove(other)


class _Latch:
    """Lets threads wait for a sync set-up in another one."""

    __slots__ = ("error", "lock", "thread")

    def __init__(self) -> None:
        self.thread = get_ident()
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        self.lock.acquire()


def _way(start: _SetUp, goal: _SetUp, seen: set[_SetUp]) -> list[_SetUp] | None:
    if start is goal:
        return [start]
    seen.add(start)
    for needed in list(start.needs or ()):
        if needed not in seen and (rest := _way(needed, goal, seen)):
            return [start, *rest]
    return None


def _asker() -> _SetUp | None:
    """The unfinished set-up that the code at hand is a part of."""
    asker = _setting_up.get()
    return None if asker is None or asker.done else asker


def _graver(one: BaseException | None, other: BaseException) -> BaseException:
    """Of two reasons to stop the later one, but no cancellation hides a KeyboardInterrupt."""
    if one is None or isinstance(one, asyncio.CancelledError):
        return other
    return one


def _timed_out(resource: object, seconds: float) -> TimeoutError:
    return TimeoutError(
        f"{resource} took longer than {seconds:g} seconds to be torn down. "
        'Make it faster, or raise SCOPED["TEARDOWN_TIMEOUT"].'
    )


class _Teardown:
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
        self.teardowns: dict[_Teardown, None] = {}
        self.timer: asyncio.TimerHandle | None = None

    def add(self, teardown: _Teardown) -> None:
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


class _Keeper:
    """Tears down, in the task that set it up, what some other task than the owner asked for."""

    __slots__ = ("task", "verdict")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[None] = task
        self.verdict: asyncio.Future[BaseException | None] = task.get_loop().create_future()


def _call(function: Callable[..., None], *arguments: Any) -> None:
    function(*arguments)


class _Elsewhere:
    """Where a sync generator was started, if not by the owner."""

    __slots__ = ("context", "thread")

    def __init__(self, context: Context) -> None:
        self.context = context
        self.thread = get_ident()


class Scope:
    """
    What ``request_scope()`` and ``current_scope()`` return. ``name`` says whose
    it is, ``is_open`` whether resources can be set up in it.
    """

    __slots__ = (
        "__weakref__",
        "_closer",
        "_finalizers",
        "_pending",
        "_previous",
        "_state",
        "_sync_only",
        "failure",
        "lifespan",
        "loop",
        "name",
        "owner",
        "served",
        "thread",
        "values",
    )

    lifetime: ClassVar[Lifetime]
    owns_set_ups: ClassVar[bool] = False  # whether its owner runs factories inline
    # Seconds that one resource's teardown may take before it is cancelled.
    teardown_timeout: ClassVar[float] = 10.0
    # Seconds that a closing lifespan waits for requests that are still open.
    shutdown_timeout: ClassVar[float] = 10.0

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[Resource[Any], Any] = {}
        self._finalizers: dict[Resource[Any], tuple[Any, _Keeper | _Elsewhere | None]] = {}
        self._pending: dict[Resource[Any], _SetUp] = {}
        self._state = "new"
        self._previous: Scope | None = None
        self._sync_only = False
        self._closer: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None  # what ended it, for factories to see
        self.lifespan: LifespanScope | None = None
        self.served = False  # opened by a server's handler, so not the last of its process
        self.loop: asyncio.AbstractEventLoop | None = None
        self.owner: asyncio.Task[Any] | None = None
        self.thread = 0  # that of its event loop, or of the sync code that opened it

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}, {self._state}>"

    @property
    def is_open(self) -> bool:
        return self._state == "open"

    # First use

    def sets_up_here(self, resource: "Resource[Any]") -> bool:
        """Whether the caller, in this scope's thread, is the one to run the factory, inline."""
        owner = self.owner
        return (
            owner is not None
            and owner is asyncio.current_task(self.loop)
            and self.owns_set_ups
            and self._state == "open"
            and resource not in self._pending
        )

    async def get(self, resource: "Resource[Any]") -> Any:
        """The value of an async resource, set up now if need be."""
        asker = _asker()
        while True:
            self._check(resource)
            if resource in self.values:
                return self.values[resource]
            set_up, first = self._pending.get(resource), False
            if set_up is None:
                if self.sets_up_here(resource):
                    return await self.set_up_here(resource)
                set_up, first = _SetUp(resource), True
            error = await self._wait(set_up, asker, first)
            # Innocent of a cancellation are those who did not start the set-up: they try again.
            if error is not None and (first or isinstance(error, Exception)) and self.is_open:
                try:
                    raise error
                finally:
                    del error  # no cycle with this frame

    def _check(self, resource: "Resource[Any]") -> None:
        if self._state != "open" and not (self._state == "closing" and resource in self.values):
            raise ScopeClosedError(resource, self)
        if not resource.factory.is_async:
            return
        if self._sync_only:
            raise AsyncResourceError(
                resource,
                self,
                "its scope was opened by sync code, which has no event loop to keep it in",
                "Open the scope with `async with request_scope():`, serve the project over ASGI, "
                "or give sync code a resource of its own with a plain `def`.",
            )
        loop = asyncio.get_running_loop()
        if self.loop is None:
            self.loop = loop
        elif self.loop is not loop:
            raise AsyncResourceError(
                resource,
                self,
                "it belongs to the event loop of its scope, and this is another one",
                "Sync code reaches the scope's event loop with `async_to_sync` when it was itself "
                "called with `sync_to_async`; asyncio.to_thread and new event loops do not lead "
                "there.",
            )
        self.thread = get_ident()

    async def _wait(
        self, set_up: _SetUp, asker: _SetUp | None, first: bool
    ) -> BaseException | None:
        """Wait for a set-up, which the first to do so starts. Returns its error, if any."""
        if asker is not None:
            asker.need(set_up)
        if set_up.waiters is None:
            set_up.waiters = []
        waiter: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        set_up.waiters.append(waiter)
        try:
            if first:
                self._hand_to_keeper(set_up)
            return await waiter
        finally:
            set_up.waiters.remove(waiter)
            if asker is not None:
                asker.got(set_up)
            if not set_up.waiters and not set_up.done and set_up.keeper is not None:
                set_up.keeper.cancel()  # nobody wants it any more

    async def set_up_here(self, resource: "Resource[Any]") -> Any:
        set_up = self._pending[resource] = _SetUp(resource)
        asker = outer = _setting_up.get()
        if asker is not None:
            if asker.done:
                asker = None
            else:
                asker.need(set_up)
        _setting_up.set(set_up)
        error: BaseException | None = None
        try:
            value, generator = await resource.factory.start()
            if self._state != "open":
                await self._refuse(resource, generator)
            if generator is not None:
                self._finalizers[resource] = (generator, None)
            self.values[resource] = value
        except BaseException as raised:
            error = raised
            raise
        finally:
            _setting_up.set(outer)
            if asker is not None:
                asker.got(set_up)
            del self._pending[resource]
            set_up.settle(error)
            del error
        return value

    async def _refuse(self, resource: "Resource[Any]", generator: Any) -> NoReturn:
        """What is set up only after the scope has begun to close is torn down at once."""
        if generator is not None:
            try:
                await self._finish_in_time(resource, generator, self.failure)
            except Exception as error:
                self._log(error)  # perhaps nobody waits any more to be told
        raise ScopeClosedError(resource, self)

    def _hand_to_keeper(self, set_up: _SetUp) -> None:
        self._pending[set_up.resource] = set_up
        context = self._context()
        keeper = context.run(asyncio.create_task, self._keep(set_up))
        if set_up.done:  # an eager task factory has run it to its end
            return
        set_up.keeper = keeper

        def forget(_: asyncio.Task[None]) -> None:
            if not set_up.done:  # cancelled before its first step
                del self._pending[set_up.resource]
                set_up.settle(asyncio.CancelledError())

        # Else the Context of the asker, a request's, would live as long as a lifespan's keeper.
        keeper.add_done_callback(forget, context=context)

    def _context(self) -> Context:
        """The Context for a factory that somebody else than the owner asked for."""
        return copy_context()

    async def _keep(self, set_up: _SetUp) -> None:
        resource = set_up.resource
        _setting_up.set(set_up)
        keeper = _Keeper()
        error: BaseException | None = None
        try:
            value, generator = await resource.factory.start()
            if self._state != "open":
                await self._refuse(resource, generator)
            if generator is not None:
                self._finalizers[resource] = (generator, keeper)
            self.values[resource] = value
            del value
        except BaseException as raised:
            error = raised
            if not isinstance(raised, Exception | asyncio.CancelledError):
                raise
            return
        finally:
            self._pending.pop(resource, None)
            set_up.settle(error)
            del error
        if generator is not None:
            cancellation = await self._await_verdict(resource, keeper)
            if keeper.verdict.done():
                failure = keeper.verdict.result()
                # A timeout or task group across the `yield` has cancelled this task, to be told so.
                if failure is None and self.lifetime is Lifetime.REQUEST:
                    failure = cancellation
                await self._finish_in_time(resource, generator, failure)

    async def _await_verdict(
        self, resource: "Resource[Any]", keeper: _Keeper
    ) -> asyncio.CancelledError | None:
        """
        A keeper that is cancelled (its event loop shuts down, say) still waits for
        its turn: order is a promise. Where nobody is left to close the scope, it
        does so itself, and tears down its own resource on the way.
        """
        cancellation = None
        while not keeper.verdict.done():
            try:
                await asyncio.wait([keeper.verdict])
            except asyncio.CancelledError as error:
                cancellation = error
                keeper.task.uncancel()
                nobody_else = self.owner is None or self.owner.done()
                if self.is_open and self._closer is None and nobody_else:
                    self._closer = keeper.task
                    with suppress(asyncio.CancelledError):
                        await self._close_abandoned(error)
                    self._closer = None
                    # Still there, if somebody else has begun to close: then that one's turn comes.
                    if resource not in self._finalizers:
                        break
        return cancellation

    async def _close_abandoned(self, failure: BaseException) -> None:
        await self._end(failure)

    def get_sync(self, resource: "Resource[Any]") -> Any:
        """The value of a sync resource, set up now if need be, in this thread."""
        asker = _asker()
        while True:
            self._check(resource)
            try:
                return self.values[resource]
            except KeyError:
                pass
            set_up = _SetUp(resource, _Latch())
            other = self._pending.setdefault(resource, set_up)
            if other is set_up:
                if resource not in self.values:  # by a thread that came first, since the look
                    return self._set_up_sync(set_up, asker)
                del self._pending[resource]
                set_up.settle()
            elif (latch := other.latch) is not None:
                self._wait_for_thread(other, latch, asker)
                if isinstance(latch.error, Exception):
                    try:
                        raise latch.error
                    finally:
                        del latch  # no cycle of the error and this frame

    def _wait_for_thread(self, set_up: _SetUp, latch: _Latch, asker: _SetUp | None) -> None:
        if asker is not None:
            asker.need(set_up)
        elif latch.thread == get_ident() and not set_up.done:
            # Called, through the event loop, by the very factory that it would wait for.
            raise CircularResourceError([set_up.resource, set_up.resource])
        patience = -1 if _running_loop() is None else _LOOP_PATIENCE
        try:
            if not latch.lock.acquire(timeout=patience):
                raise AsyncResourceError(
                    set_up.resource,
                    self,
                    f"another thread has been setting it up for {patience:g} seconds, and may be "
                    "waiting for this event loop",
                    "In async code use `await sync_to_async(...)()` for it.",
                )
            latch.lock.release()
        finally:
            if asker is not None:
                asker.got(set_up)

    def _set_up_sync(self, set_up: _SetUp, asker: _SetUp | None) -> Any:
        resource = set_up.resource
        inline = self.owns_set_ups and self.thread == get_ident() and self.owner is _current_task()
        context = None if inline else self._context()
        if asker is not None:
            asker.need(set_up)
        outer = _setting_up.get()
        error: BaseException | None = None
        try:
            if context is None:
                _setting_up.set(set_up)
                value, generator = resource.factory.start()
            else:
                context.run(_setting_up.set, set_up)
                value, generator = context.run(resource.factory.start)
            if generator is not None:
                holder = None if context is None else _Elsewhere(context)
                self._finalizers[resource] = (generator, holder)
            self.values[resource] = value
            # Looked at after the value is in, for another thread may be closing the scope:
            # either its teardown still finds the value, or this finds the scope closed.
            if self._state != "open":
                self._take_back(resource, context)
                raise ScopeClosedError(resource, self)
        except BaseException as raised:
            error = raised
            raise
        finally:
            if context is None:
                _setting_up.set(outer)
            if asker is not None:
                asker.got(set_up)
            del self._pending[resource]
            set_up.settle(error)
            del error
        return value

    def _take_back(self, resource: "Resource[Any]", context: Context | None) -> None:
        if self.values.pop(resource, self) is self:
            return  # the teardown has it
        generator, _ = self._finalizers.pop(resource, (None, None))
        if generator is not None:
            run = _call if context is None else context.run
            run(resource.factory.finish, generator, self.failure)

    # Opening and closing

    def _open(
        self, loop: asyncio.AbstractEventLoop | None, owner: "asyncio.Task[Any] | None"
    ) -> None:
        """Make this the current scope. The owner is the task at hand, if any."""
        if self._state != "new":
            raise RuntimeError(f"{self} has been opened before: make a new scope for each use.")
        self._state = "open"
        self.loop = loop
        self.owner = owner
        self.thread = get_ident()
        previous = current.get()
        if previous is not None and previous._state == "open":
            self._previous = previous
        current.set(self)

    def leave(self) -> None:
        """Make the scope around this one current again, if it is still open."""
        previous = self._previous
        self._previous = None
        if current.get() is self:
            # Not by token: those are bound to one Context, and this may be another.
            current.set(previous if previous is not None and previous.is_open else None)

    async def close(self, failure: BaseException | None = None) -> None:
        """
        Tear down everything, last set up first, whatever fails or is cancelled on
        the way. Does nothing where the scope is closing or closed. The factories
        see ``failure``, if any, at their ``yield``.

        Raises the cancellation, if there was one, bare; else TeardownError if any
        teardown failed.
        """
        if self._state != "open":
            return
        self._state = "closing"
        if self.failure is None:
            self.failure = failure
        failure = self.failure
        errors: list[Exception] = []
        fatal: BaseException | None = await self._stop_set_ups() if self._pending else None
        while self.values:
            try:
                resource = self.values.popitem()[0]
            except KeyError:  # a thread that was setting it up took it back, since the look
                continue
            generator, holder = self._finalizers.pop(resource, (None, None))
            if generator is None:
                continue
            try:
                if holder is None and resource.factory.is_async:
                    await self._finish_in_time(resource, generator, failure)
                else:
                    await self._finish(resource, generator, holder, failure)
            except Exception as error:
                error.add_note(f"while {resource} was torn down")
                errors.append(error)
            except BaseException as error:
                fatal = _graver(fatal, error)
            del generator, holder
        self._state = "closed"
        self.failure = failure = self.owner = self._closer = None
        if self.served:
            # Nobody leaves it for the one around it: its Context ends with the request. Kept, a
            # server that begins each request in the Context of the last would make a chain of all.
            self._previous = None
        if self.lifespan is not None:
            try:
                await self._closed()
            except Exception as error:
                errors.append(error)
            except BaseException as error:
                fatal = _graver(fatal, error)
        try:
            if fatal is not None:
                if errors:
                    self._log(TeardownError(self, errors))
                raise fatal
            if errors:
                raise TeardownError(self, errors)
        finally:
            del fatal, errors

    async def _stop_set_ups(self) -> asyncio.CancelledError | None:
        """
        What is being set up in a keeper is cancelled, and cancelled again each time
        that its end takes as long as a teardown may. A thread that sets up finds out
        itself.
        """
        cancellation = None
        while keepers := [
            set_up.keeper
            for set_up in list(self._pending.values())  # threads may change it meanwhile
            if set_up.keeper is not None and not set_up.keeper.done()
        ]:
            for keeper in keepers:
                keeper.cancel()
            cancellation = await outlast(*keepers, seconds=self.teardown_timeout) or cancellation
        return cancellation

    async def _finish(
        self,
        resource: "Resource[Any]",
        generator: Any,
        holder: "_Keeper | _Elsewhere | None",
        failure: BaseException | None,
    ) -> None:
        if holder is None:
            resource.factory.finish(generator, failure)
        elif isinstance(holder, _Keeper):
            if holder.task is asyncio.current_task():  # it closes an abandoned scope
                await self._finish_in_time(resource, generator, failure)
                return
            if not holder.verdict.done():
                holder.verdict.set_result(failure)
            await self._finish_elsewhere(resource, holder.task)
        else:
            context = holder.context

            def finish() -> None:
                context.run(resource.factory.finish, generator, failure)

            if self._sync_only or holder.thread == get_ident():
                finish()
            else:
                # In a task, as asgiref drops what is cancelled before the thread gets to it. In
                # time, as nothing ends a thread that hangs.
                await self._finish_elsewhere(
                    resource, asyncio.create_task(hop(finish)), self.teardown_timeout
                )

    async def _finish_elsewhere(
        self, resource: "Resource[Any]", task: "asyncio.Task[None]", seconds: float | None = None
    ) -> None:
        """Wait for the task in which it is torn down, whoever cancels this one meanwhile."""
        cancellation: BaseException | None = await outlast(task, seconds=seconds)
        error: BaseException | None = None
        if not task.done():
            task.add_done_callback(self._log_late)
            error = _timed_out(resource, self.teardown_timeout)
        elif task.cancelled():
            cancellation = cancellation or asyncio.CancelledError()
        else:
            error = task.exception()
        try:
            if cancellation is not None:
                if error is not None:
                    self._log(error)
                raise cancellation
            if error is not None:
                raise error
        finally:
            del cancellation, error

    def _log_late(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log(error)

    async def _finish_in_time(
        self, resource: "Resource[Any]", generator: Any, failure: BaseException | None
    ) -> None:
        """
        Bounded by ``teardown_timeout``: then cancelled, and cancelled again each
        time that it has taken as long once more.
        """
        loop = self.loop
        assert loop is not None
        task = asyncio.current_task(loop)
        assert task is not None
        watch, before = _watch_of(loop), task.cancelling()
        teardown = _Teardown(task, resource, self, loop.time() + self.teardown_timeout)
        watch.add(teardown)
        try:
            await resource.factory.finish(generator, failure)
        except asyncio.CancelledError:
            if not teardown.overdue or task.cancelling() > before + teardown.overdue:
                raise  # somebody else's
        finally:
            del watch.teardowns[teardown]
            for _ in range(teardown.overdue):
                task.uncancel()
        if teardown.overdue:
            raise _timed_out(resource, self.teardown_timeout)

    async def _closed(self) -> None:
        """What is left to do when nothing is held any more."""

    async def _end(self, failure: BaseException | None) -> None:
        """Close; a failure that is no mere error (a cancellation) goes before the teardown's."""
        try:
            await self.close(failure)
        except TeardownError as error:
            if failure is None or isinstance(failure, Exception):
                raise
            self._log(error)

    def _log(self, error: BaseException) -> None:
        logger.error("While %s was closed: %s", self, error, exc_info=error)


class RequestScope(Scope):
    __slots__ = ()

    lifetime = Lifetime.REQUEST
    owns_set_ups = True

    def open(
        self,
        *,
        sync_only: bool = False,
        served: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Self:
        running = _running_loop()
        self._open(running, None if running is None else asyncio.current_task(running))
        self._sync_only = sync_only
        self.served = served
        if loop is not None:  # that of the sync code which opens it, and owns it no further
            self.loop, self.owner, self.thread = loop, None, 0
        self._find_lifespan()
        return self

    def _find_lifespan(self) -> None:
        lifespan = None if self._previous is None else self._previous.lifespan
        if (
            lifespan is None
            or not lifespan.is_open
            # Sync code may share its caller's; another event loop has one of its own.
            or (self.loop is not None and lifespan.loop is not self.loop)
        ):
            lifespan = _lifespans.get(self.loop)
        if lifespan is not None and lifespan.join(self):
            self.lifespan = lifespan

    def need_lifespan(self, resource: "Resource[Any]") -> "LifespanScope":
        """The lifespan of this request; where nobody has opened one, one that ends with it."""
        while self.lifespan is None:
            new = LifespanScope.implied_by(self)
            lifespan = _lifespans.setdefault(self.loop, new)
            if lifespan.join(self):
                self.lifespan = lifespan
                if lifespan is new and self.served:
                    lifespan.stay()
            elif _lifespans.get(self.loop) is lifespan:  # the server shuts down
                raise ScopeClosedError(resource, lifespan)
        return self.lifespan

    async def _closed(self) -> None:
        if self.lifespan is not None:
            await self.lifespan.part(self, by_sync_code=self._sync_only or self.loop is None)

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._open(task.get_loop(), task)
        if _lifespans:
            self._find_lifespan()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.close(exc)
        except TeardownError as error:
            if exc is None or isinstance(exc, Exception):
                raise
            self._log(error)
        finally:
            self.leave()

    def __enter__(self) -> Self:
        return self.open(sync_only=True)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            run_without_loop(self._end(exc))
        finally:
            self.leave()


class LifespanScope(Scope):
    """
    In use as long as somebody holds it (a server, ``lifespan_scope()``) or, where
    nobody does, as long as requests are open in it.
    """

    __slots__ = ("_base", "_holders", "_idle", "_requests")

    lifetime = Lifetime.LIFESPAN

    def __init__(self, base: Context) -> None:
        super().__init__("the lifespan")
        self._base = base
        self._holders = 0
        self._requests: set[RequestScope] = set()
        self._idle: asyncio.Future[None] | None = None
        self.lifespan = self
        loop = _running_loop()
        base.run(self._open, loop, None if loop is None else asyncio.current_task(loop))
        self._previous = None  # nobody leaves it: its Context is its own

    @classmethod
    def implied_by(cls, request: RequestScope) -> Self:
        self = cls(Context())
        self.owner, self.loop, self.thread = None, request.loop, request.thread
        self._sync_only = request.loop is None
        return self

    @classmethod
    def hold(cls) -> Self:
        """The lifespan of the running event loop, opened now if need be."""
        loop = asyncio.get_running_loop()
        with _lifespans_lock:
            self = _lifespans.get(loop)
            if self is None or not self.is_open:
                self = _lifespans[loop] = cls(copy_context())
            self._holders += 1
        return self  # type: ignore[return-value]

    async def release(self, failure: BaseException | None = None) -> None:
        """Undo ``hold()``; the last one closes, when the open requests have ended."""
        with _lifespans_lock:
            self._holders -= 1
            if self._holders:
                return
        await self._close_abandoned(failure)

    async def _close_abandoned(self, failure: BaseException | None) -> None:
        cancellation = await self._requests_ended()
        if not self._holders:  # else somebody has taken it over meanwhile
            await self._end(failure)
        if cancellation is not None:
            raise cancellation

    async def _requests_ended(self) -> asyncio.CancelledError | None:
        with _lifespans_lock:
            if not self._requests:
                return None
            self._idle = asyncio.get_running_loop().create_future()
        cancellation = await outlast(self._idle, seconds=self.shutdown_timeout)
        self._idle = None
        if self._requests:
            logger.error(
                "%d request(s) still open after %g seconds, and the lifespan closes: %s.",
                len(self._requests),
                self.shutdown_timeout,
                ", ".join(sorted(map(str, self._requests))),
            )
        return cancellation

    def join(self, request: RequestScope) -> bool:
        if self._holders:  # then it does not close just because the last request parts
            self._requests.add(request)
            return self.is_open
        with _lifespans_lock:
            if self.is_open:
                self._requests.add(request)
            return self.is_open

    async def part(self, request: RequestScope, *, by_sync_code: bool) -> None:
        if self._holders and self._idle is None:
            self._requests.discard(request)
            return
        with _lifespans_lock:
            self._requests.discard(request)
            if self._requests:
                return
            if not self._holders:
                _forget(self)
            idle = self._idle
        if idle is not None:
            self._in_loop(_set_done, idle)
        elif not self._holders:
            if by_sync_code and self.loop is not None:
                self._in_loop(self._close_later)
            else:
                await self.close()

    def _in_loop(self, callback: Callable[..., None], *arguments: Any) -> None:
        if _running_loop() is self.loop:
            callback(*arguments)
        else:
            assert self.loop is not None
            self.loop.call_soon_threadsafe(callback, *arguments)

    def _close_later(self) -> None:
        self._closer = asyncio.create_task(self._close_abandoned(None))

    def stay(self) -> None:
        """
        Outlive the requests: the server has no lifespan protocol to say when it
        ends (daphne, WSGI). Ends with the event loop's tasks, or the process.
        """
        self._holders += 1
        if self.loop is None:
            atexit.register(lambda: run_without_loop(self.close()))
        else:
            self._in_loop(self._wait_for_the_end)
            atexit.register(self._close_at_exit)

    def _close_at_exit(self) -> None:
        """
        daphne stops the event loop without a word to its tasks. Run it on, for the
        requests that were cancelled and for what the lifespan holds.
        """
        loop, waiting = self.loop, self.owner
        assert loop is not None
        if waiting is None or waiting.done() or loop.is_closed() or loop.is_running():
            return
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(waiting)

    def _wait_for_the_end(self) -> None:
        self.owner = self._context().run(asyncio.create_task, self._close_at_end())

    async def _close_at_end(self) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await self.release()

    async def _closed(self) -> None:
        atexit.unregister(self._close_at_exit)
        with _lifespans_lock:
            _forget(self)

    def _context(self) -> Context:
        return self._base.copy()


def _forget(lifespan: LifespanScope) -> None:
    if _lifespans.get(lifespan.loop) is lifespan:
        del _lifespans[lifespan.loop]


def scope_for(resource: "Resource[Any]") -> Scope:
    """The open scope that holds, or is to hold, the resource's value."""
    scope = current.get()
    if resource.lifetime is Lifetime.LIFESPAN:
        return _lifespan_for(resource, scope)
    if scope is None:
        raise NoScopeError(resource)
    if scope.lifetime is Lifetime.LIFESPAN:
        asker = _setting_up.get()
        if asker is not None and asker.resource.lifetime is Lifetime.LIFESPAN:
            raise LifetimeError(asker.resource, resource)
        raise NoScopeError(resource)
    return scope


def _lifespan_for(resource: "Resource[Any]", scope: Scope | None) -> Scope:
    if isinstance(scope, RequestScope) and scope.is_open:
        return scope.need_lifespan(resource)
    if isinstance(scope, LifespanScope) and scope.is_open:
        return scope
    # Code that has outlived a request, or never had one, may use what is there.
    if (lifespan := _lifespans.get(_running_loop())) is not None:
        return lifespan
    if scope is not None:
        raise ScopeClosedError(resource, scope)
    raise NoScopeError(resource)


def current_scope() -> Scope:
    """
    The scope that is open here: the request's, or the lifespan's outside any
    request. Raises NoScopeError where there is none.
    """
    scope = current.get()
    if scope is None or not scope.is_open:
        raise NoScopeError
    return scope


def request_scope() -> RequestScope:
    """
    A new scope, to be opened with ``async with`` around what is not a request
    and yet wants request-scoped resources: a command, a task, a consumer, a
    test. With plain ``with`` it holds sync resources only.

    Leaving it raises TeardownError where a teardown failed; a cancellation, or
    another exception that is no Exception, comes first and the failure is logged.
    """
    return RequestScope("the request scope")


@asynccontextmanager
async def lifespan_scope() -> AsyncGenerator[Scope, None]:
    """
    Hold the lifespan of the running event loop open: lifespan-scoped resources
    are kept until the end of the ``async with``, when the requests still open are
    waited for and all is torn down. Inside another one it is the same lifespan.

    Sets up what is declared with ``eager=True``, and raises what that raises.
    """
    scope = LifespanScope.hold()
    previous = current.get()
    current.set(scope)
    failure: BaseException | None = None
    try:
        for resource in eager:
            await _set_up_eagerly(scope, resource)
        yield scope
    except BaseException as error:
        failure = error
        raise
    finally:
        if current.get() is scope:
            current.set(previous)
        await scope.release(failure)
        del failure


async def _set_up_eagerly(scope: Scope, resource: "Resource[Any]") -> None:
    try:
        if resource.factory.is_async:
            await scope.get(resource)
        else:
            scope.get_sync(resource)
    except Exception as error:
        error.add_note(f"while {resource} was set up at start-up")
        raise
