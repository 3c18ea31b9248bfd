"""
``Scope`` holds the values of one request, or of one lifespan: it sets each up
on first use and tears all of them down, in reverse order, when it closes.

One ContextVar holds one object, the current scope, which child tasks and
threads share by reference. While a factory runs, its set-up stands in for the
scope there, so that who asks for what is known, across tasks too.

Who runs a factory
    The scope's *owner* task (the request's own) runs it inline: no task, no
    hop. Asked for in any other task, an async factory runs in a *keeper*: a
    task that sets it up, waits for the scope to close, and tears it down. So
    both happen in one task and one Context, whoever asked first. What a
    lifespan holds always has a keeper, in a Context no request has touched.

What a request's scope holds while a view asks for ``db``, whose factory asks
for ``user``::

    values               generators             pending
    {}                   None                   None          opened
    {}                   None                   {db}          db's factory runs
    {}                   None                   {db, user}    and asks for user
    {user: ..}           user                   {db}          user's factory has yielded
    {user: .., db: ..}   db, user               None          db's factory has yielded
    {user: ..}           user                   None          closing: db is torn down
    {}                   None                   None          closed

A value enters ``values`` when its set-up is complete, so after everything that
its factory used; they are taken out again last in, first out.
"""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from threading import get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeAlias

from scoped.core import noted, observer
from scoped.core.errors import (
    AsyncResourceError,
    CircularResourceError,
    ScopeClosedError,
    ScopedError,
    TeardownError,
)
from scoped.core.record import Latch, SetUp
from scoped.core.resource import Lifetime
from scoped.core.teardown import Elsewhere, Keeper, finish, finish_elsewhere
from scoped.core.waits import ForkSafeLock, current_task, outlast, running_loop

if TYPE_CHECKING:
    from scoped.core.lifespan import LifespanScope
    from scoped.core.release import Release
    from scoped.core.resource import Resource

__all__ = ["Scope", "asker_here", "current", "scope_here"]

_Generators: TypeAlias = "tuple[Resource[Any], Any, _Generators | None]"

logger = logging.getLogger("scoped")


# The open scope; while a factory runs, its set-up, which knows the scope. A factory's child tasks
# copy it, so circles show through them too.
current: ContextVar["Scope | SetUp | None"] = ContextVar("scoped.current", default=None)

# Held while a table is made that more than one thread may want to make, and while a value is taken
# out together with what is to finish it: or another thread might set it up anew in between.
_lock = ForkSafeLock()

# Seconds for which sync code in the event loop's thread waits for another
# thread, which may itself be waiting for that loop.
_LOOP_PATIENCE = 10.0


def scope_here() -> "Scope | None":
    """The scope that is current, be it open or closed."""
    here = current.get()
    return here.scope.visible if isinstance(here, SetUp) else here


def asker_here() -> SetUp | None:
    """The unfinished set-up that the code at hand is a part of."""
    asker = current.get()
    return asker if type(asker) is SetUp and not asker.done else None


def _explained(resource: "Resource[Any]", error: BaseException) -> BaseException:
    """What a set-up failed with, for its user to read."""
    if isinstance(error, StopAsyncIteration) and resource.factory.is_generator:
        return resource.factory.never_yielded()
    if isinstance(error, Exception) and not isinstance(error, ScopedError):
        error.add_note(f"while {resource} was set up")
    return error


async def _gather_problems(
    closing: Coroutine[Any, Any, None], problems: list[BaseException]
) -> None:
    try:
        await closing
    except TeardownError as error:
        problems.extend(error.exceptions)
    except BaseException as error:
        problems.append(error)


def _graver(one: BaseException | None, other: BaseException) -> BaseException:
    """Of two reasons to stop the later one, but no cancellation hides a KeyboardInterrupt."""
    if one is None or isinstance(one, asyncio.CancelledError):
        return other
    return one


class Scope:
    """
    What ``request_scope()`` and ``current_scope()`` return. ``name`` says whose it is,
    ``is_open`` whether resources can be set up in it, ``request`` is Django's request
    where it is that of one, else None.
    """

    __slots__ = (
        "__weakref__",
        "_previous",
        "_state",
        "failure",
        "generators",
        "has_responded",
        "latched",
        "lifespan",
        "loop",
        "name",
        "opened",
        "others",
        "owner",
        "pending",
        "releases",
        "request",
        "response",
        "sync_only",
        "thread",
        "uses",
        "values",
    )

    lifetime: ClassVar[Lifetime]
    owns_set_ups: ClassVar[bool] = False  # whether its owner runs factories inline
    served: bool = False  # opened by a server's handler, so not the last of its process
    # What to do for whom it closes too early.
    closed_hint: ClassVar[str] = ""
    # Seconds that one resource's teardown may take before it is cancelled.
    teardown_timeout: ClassVar[float] = 10.0
    # Seconds after which a teardown is said to be slow.
    slow_teardown: ClassVar[float] = 1.0
    # Seconds that a closing lifespan waits for requests that are still open.
    shutdown_timeout: ClassVar[float] = 10.0

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[Resource[Any], Any] = {}
        # The rest is made when it is needed: a dict is a fifth of what a small scope takes.
        # Generators that the owner has started: a resource, its generator, and those before.
        self.generators: _Generators | None = None
        # What keepers and other threads are to finish.
        self.others: dict[Resource[Any], Keeper | Elsewhere] | None = None
        # Async set-ups under way, which only the event loop's thread changes; and sync ones.
        self.pending: dict[Resource[Any], SetUp] | None = None
        self.latched: dict[Resource[Any], SetUp] | None = None
        # What each used that was set up, where it used any; and what is released right now.
        self.uses: dict[Resource[Any], list[Resource[Any]]] | None = None
        self.releases: list[Release] | None = None
        self._state = "new"
        self._previous: Scope | SetUp | None = None
        self.sync_only = False
        self.failure: BaseException | None = None  # what ended it, for factories to see
        self.lifespan: LifespanScope | None = None
        self.response: Scope | None = None  # holds what lives until the response
        self.has_responded = False
        self.request: Any = None  # Django's, where there is one
        self.loop: asyncio.AbstractEventLoop | None = None
        self.owner: asyncio.Task[Any] | None = None
        self.opened = 0.0  # by perf_counter(), in seconds
        self.thread = 0  # that of its event loop, or of the sync code that opened it

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}, {self._state}>"

    @property
    def is_open(self) -> bool:
        return self._state == "open"

    @property
    def visible(self) -> "Scope":
        """What is current when this one is at work."""
        return self

    @property
    def parts(self) -> "list[Scope]":
        """Itself, and what holds the values that live until the response, if there are any."""
        return [self] if self.response is None else [self, self.response]

    def note_failure(self, failure: BaseException) -> None:
        """
        Let the factories see at their ``yield`` that the work has failed, though nothing
        is raised that shows it: as when a framework makes a response of an exception. The
        first failure counts.
        """
        if self.is_open and self.failure is None:
            self.failure = failure

    def set_ups(self) -> list[SetUp]:
        """Those under way."""
        return [*(self.pending or {}).values(), *(self.latched or {}).values()]

    # First use

    def get(self, resource: "Resource[Any]") -> Coroutine[Any, Any, Any]:
        """For ``await``: the value of an async resource, set up now if need be."""
        if (
            self._state == "open"
            and self.owns_set_ups
            and (self.pending is None or resource not in self.pending)
            and resource not in self.values
            and self.owner is asyncio.current_task()
        ):
            return self._set_up_here(resource)
        return self._get(resource)

    async def _get(self, resource: "Resource[Any]") -> Any:
        asker = asker_here()
        while True:
            self._check_open(resource)
            self.check_loop(resource)
            if resource in self.values:
                return self.values[resource]
            set_up, first = (self.pending or {}).get(resource), False
            if set_up is None:
                if self.owns_set_ups and self.owner is asyncio.current_task():
                    return await self._set_up_here(resource)
                set_up, first = SetUp(resource, self), True
            error = await self._wait(set_up, asker, first)
            # Innocent of a cancellation are those who did not start the set-up: they try again.
            if error is not None and (first or isinstance(error, Exception)) and self.is_open:
                try:
                    raise error
                finally:
                    del error  # no cycle with this frame

    def _check_open(self, resource: "Resource[Any]") -> None:
        if self._state != "open" and not (self._state == "closing" and resource in self.values):
            raise ScopeClosedError(resource, self, self.closed_hint)

    def check_loop(self, resource: "Resource[Any]") -> None:
        if self.sync_only:
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

    async def _wait(self, set_up: SetUp, asker: SetUp | None, first: bool) -> BaseException | None:
        """Wait for a set-up, which the first to do so starts. Returns its error, if any."""
        if asker is not None:
            asker.need(set_up)
            if first:
                set_up.asked_by = asker.resource
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

    async def _set_up_here(self, resource: "Resource[Any]") -> Any:
        set_up = SetUp(resource, self)
        if self.pending is None:
            self.pending = {resource: set_up}
        else:
            self.pending[resource] = set_up
        outer = current.get()
        asker = outer if type(outer) is SetUp and not outer.done else None
        if asker is not None:
            asker.need_new(set_up)
        error: BaseException | None = None
        began = 0.0 if observer.observer is None else perf_counter()
        current.set(set_up)
        try:
            generator, coming = resource.factory.start()
            value = await coming
            if self._state != "open":
                await self._refuse(resource, generator)
            if generator is not None:
                self.generators = resource, generator, self.generators
            if set_up.uses is not None:
                (self.uses or self._table("uses"))[resource] = set_up.uses
            self.values[resource] = value
        except BaseException as raised:
            error = _explained(resource, raised)
            if error is raised:
                raise
            raise error from None
        finally:
            current.set(outer)
            if asker is not None:
                asker.got(set_up)
            pending = self.pending
            if len(pending) == 1:
                self.pending = None
            else:
                del pending[resource]
            set_up.done = True
            if set_up.waiters is not None:
                set_up.settle(error)
            if began:
                self._tell_of_set_up(set_up, began, error, asker)
            del error
        return value

    def _tell_of_set_up(
        self, set_up: SetUp, began: float, error: BaseException | None, asker: SetUp | None
    ) -> None:
        if (told := observer.observer) is not None:
            asked_by = set_up.asked_by if asker is None else asker.resource
            seconds = perf_counter() - began
            told.resource_set_up(set_up.resource, self.visible, seconds, error, asked_by)

    def _begin(self, set_up: SetUp) -> None:
        if self.pending is None:
            self.pending = {set_up.resource: set_up}
        else:
            self.pending[set_up.resource] = set_up

    def _no_longer(self, resource: "Resource[Any]") -> None:
        if self.pending is not None:
            self.pending.pop(resource, None)
            self.pending = self.pending or None

    def _table(self, name: str) -> "dict[Resource[Any], Any]":
        """For what is not the event loop's alone: threads may come at the same time."""
        new: dict[Resource[Any], Any] = {}
        with _lock:
            table: dict[Resource[Any], Any] | None = getattr(self, name)
            if table is None:
                setattr(self, name, new)
                return new
            return table

    async def _refuse(self, resource: "Resource[Any]", generator: Any) -> NoReturn:
        """What is set up only after the scope has begun to close is torn down at once."""
        if generator is not None:
            try:
                rest = finish(resource, self, generator, self.failure)
                if rest is not None:
                    await rest
            except Exception as error:
                self.log(error)  # perhaps nobody waits any more to be told
        raise ScopeClosedError(resource, self, self.closed_hint)

    def _hand_to_keeper(self, set_up: SetUp) -> None:
        self._begin(set_up)
        context = self._context()
        keeper = context.run(asyncio.create_task, self._keep(set_up))
        if set_up.done:  # an eager task factory has run it to its end
            return
        set_up.keeper = keeper

        def forget(_: asyncio.Task[None]) -> None:
            if not set_up.done:  # cancelled before its first step
                self._no_longer(set_up.resource)
                set_up.settle(asyncio.CancelledError())

        # Else the Context of the asker, a request's, would live as long as a lifespan's keeper.
        keeper.add_done_callback(forget, context=context)

    def _context(self) -> Context:
        """The Context for a factory that somebody else than the owner asked for."""
        return copy_context()

    async def _keep(self, set_up: SetUp) -> None:
        resource = set_up.resource
        error: BaseException | None = None
        keeper: Keeper | None = None
        began = 0.0 if observer.observer is None else perf_counter()
        current.set(set_up)
        try:
            generator, coming = resource.factory.start()
            value = await coming
            if self._state != "open":
                await self._refuse(resource, generator)
            if generator is not None:
                keeper = self._table("others")[resource] = Keeper(generator)
            if set_up.uses is not None:
                (self.uses or self._table("uses"))[resource] = set_up.uses
            self.values[resource] = value
            del value, generator, coming
        except BaseException as raised:
            error = _explained(resource, raised)
            if not isinstance(raised, Exception | asyncio.CancelledError):
                raise
            return
        finally:
            current.set(self.visible)
            self._no_longer(resource)
            set_up.settle(error)
            if began:
                self._tell_of_set_up(set_up, began, error, None)
            del error
        if keeper is not None:
            cancellation = await self._await_verdict(resource, keeper)
            if keeper.verdict.done():
                failure = keeper.verdict.result()
                # A timeout or task group across the `yield` has cancelled this task, to be told so.
                if failure is None and self.lifetime is not Lifetime.LIFESPAN:
                    failure = cancellation
                rest = finish(resource, self, keeper.generator, failure)
                if rest is not None:
                    await rest

    async def _await_verdict(
        self, resource: "Resource[Any]", keeper: Keeper
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
                if self.is_open and (self.owner is None or self.owner.done()):
                    self.owner = keeper.task
                    with suppress(asyncio.CancelledError):
                        await self._close_abandoned(error, loop_ends=True)
                    # Still there, if somebody else has begun to close: then that one's turn comes.
                    if self.others is None or resource not in self.others:
                        break
        return cancellation

    async def _close_abandoned(self, failure: BaseException, *, loop_ends: bool) -> None:  # noqa: ARG002
        await self._end(failure)

    def get_nowait(self, resource: "Resource[Any]") -> Any:
        """The value of an async resource, for sync code, where it is set up already."""
        self._check_open(resource)
        if self.sync_only:
            self.check_loop(resource)  # says that there is none
        try:
            return self.values[resource]
        except KeyError:
            pass
        raise AsyncResourceError(
            resource,
            self,
            "it has not been set up yet, and sync code cannot wait for that",
            "Await it before, in a middleware, say; or use `async_to_sync(...)()`.",
        )

    def get_sync(self, resource: "Resource[Any]") -> Any:
        """The value of a sync resource, set up now if need be, in this thread."""
        asker = asker_here()
        while True:
            self._check_open(resource)
            try:
                return self.values[resource]
            except KeyError:
                pass
            set_up = SetUp(resource, self, Latch())
            latched = self._table("latched") if self.latched is None else self.latched
            other = latched.setdefault(resource, set_up)
            if other is set_up:
                # Since the look, another thread may have set it up, and the scope may be closing.
                if resource not in self.values and self._state == "open":
                    return self._set_up_sync(set_up, asker)
                del latched[resource]
                set_up.settle()
            elif (latch := other.latch) is not None:
                self._wait_for_thread(other, latch, asker)
                if isinstance(latch.error, Exception):
                    try:
                        raise latch.error
                    finally:
                        del latch  # no cycle of the error and this frame

    def _wait_for_thread(self, set_up: SetUp, latch: Latch, asker: SetUp | None) -> None:
        if asker is not None:
            asker.need(set_up)
        elif latch.thread == get_ident() and not set_up.done:
            # Called, through the event loop, by the very factory that it would wait for.
            raise CircularResourceError([set_up.resource, set_up.resource])
        patience = -1 if running_loop() is None else _LOOP_PATIENCE
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

    def _set_up_sync(self, set_up: SetUp, asker: SetUp | None) -> Any:
        resource = set_up.resource
        inline = self.owns_set_ups and self.thread == get_ident() and self.owner is current_task()
        context = None if inline else self._context()
        if asker is not None:
            asker.need(set_up)
        outer = current.get()
        error: BaseException | None = None
        began = 0.0 if observer.observer is None else perf_counter()
        try:
            if context is None:
                current.set(set_up)
                generator, value = resource.factory.start()
            else:
                context.run(current.set, set_up)
                generator, value = context.run(resource.factory.start)
                context.run(current.set, self.visible)
            if generator is not None and context is None:
                self.generators = resource, generator, self.generators
            elif generator is not None:
                assert context is not None
                self._table("others")[resource] = Elsewhere(generator, context)
            if set_up.uses is not None:
                (self.uses or self._table("uses"))[resource] = set_up.uses
            self.values[resource] = value
            # Looked at after the value is in, for another thread may be closing the scope:
            # either its teardown still finds the value, or this finds the scope closed.
            if self._state != "open":
                self._take_back(resource)
                raise ScopeClosedError(resource, self, self.closed_hint)
        except BaseException as raised:
            error = _explained(resource, raised)
            raise
        finally:
            if context is None:
                current.set(outer)
            if asker is not None:
                asker.got(set_up)
            assert self.latched is not None
            del self.latched[resource]
            set_up.settle(error)
            if began:
                self._tell_of_set_up(set_up, began, error, asker)
            del error
        return value

    def _take_back(self, resource: "Resource[Any]") -> None:
        try:
            other = self.take_out(resource)
        except KeyError:
            return  # the teardown has it
        if isinstance(other, Elsewhere):
            other.context.run(resource.factory.finish, other.generator, self.failure)
        elif resource.factory.is_generator:
            resource.factory.finish(self._take_generator(resource), self.failure)

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
        self.opened = perf_counter()
        previous = current.get()
        if previous is not None and previous.is_open:
            self._previous = previous
        current.set(self)
        if noted.scopes is not None:
            noted.note(self)

    def tell_of_opening(self) -> None:
        """Once all is in place: whoever hears of it may use it."""
        if (told := observer.observer) is not None:
            told.scope_opened(self)

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
        problems: list[BaseException] = []
        if self.pending and (cancellation := await self._stop_set_ups()) is not None:
            problems.append(cancellation)
        if self.releases:
            overs = [release.over for release in self.releases]
            if (cancellation := await outlast(*overs)) is not None:
                problems.append(cancellation)
        if self.response is not None:
            await _gather_problems(self.response.close(failure), problems)
        while self.values:
            try:
                resource = self.values.popitem()[0]
            except KeyError:  # a thread that was setting it up took it back, since the look
                continue
            other = None if self.others is None else self.others.pop(resource, None)
            rest = self.tear_down(resource, other, failure, problems)
            if rest is not None:
                await rest
        self._let_go(failure)
        del failure
        if self.lifespan is not None:
            await _gather_problems(self._closed(), problems)
        if problems:
            self.raise_all(problems)

    def raise_all(self, problems: list[BaseException]) -> NoReturn:
        """A reason to stop bare, if there is one; else the errors, as a group."""
        errors = [problem for problem in problems if isinstance(problem, Exception)]
        fatal: BaseException | None = None
        for problem in problems:
            if not isinstance(problem, Exception):
                fatal = _graver(fatal, problem)
        try:
            if fatal is None:
                raise TeardownError(self, errors)
            if errors:
                self.log(TeardownError(self, errors))
            raise fatal
        finally:
            del fatal, errors, problems

    def tear_down(
        self,
        resource: "Resource[Any]",
        other: Keeper | Elsewhere | None,
        failure: BaseException | None,
        problems: list[BaseException],
    ) -> Coroutine[Any, Any, None] | None:
        """
        Begin to, with what ``take_out()`` has returned. Returns what is to be awaited for
        the rest, if that was not all. What it raises is added to the problems, a
        cancellation too: others follow.
        """
        rest: Coroutine[Any, Any, None] | None
        began = 0.0 if observer.observer is None else perf_counter()
        generators = self.generators
        try:
            if other is not None:
                rest = finish_elsewhere(resource, self, other, failure)
            elif generators is not None and generators[0] is resource:
                self.generators = generators[2]
                rest = finish(resource, self, generators[1], failure)
            elif resource.factory.is_generator:
                rest = finish(resource, self, self._take_generator(resource), failure)
            else:
                return None
        except BaseException as error:
            self._torn_down(resource, began, error, problems)
            return None
        if rest is not None:
            return self._tear_down_rest(resource, rest, began, problems)
        if began:
            self._torn_down(resource, began, None, problems)
        return None

    def take_out(self, resource: "Resource[Any]") -> Keeper | Elsewhere | None:
        """
        Let go of its value. Returns who else than the owner is to finish it, if so. Raises
        KeyError where there is none.
        """
        with _lock:
            del self.values[resource]
            return None if self.others is None else self.others.pop(resource, None)

    def _take_generator(self, resource: "Resource[Any]") -> Any:
        later: list[_Generators] = []  # set up after it, and yet it goes first: it is released
        link = self.generators
        assert link is not None
        while link[0] is not resource:
            later.append(link)
            link = link[2]
            assert link is not None
        self.generators = link[2]
        for one in reversed(later):
            self.generators = one[0], one[1], self.generators
        return link[1]

    async def _tear_down_rest(
        self,
        resource: "Resource[Any]",
        rest: Awaitable[None],
        began: float,
        problems: list[BaseException],
    ) -> None:
        raised: BaseException | None = None
        try:
            await rest
        except BaseException as error:
            raised = error
        self._torn_down(resource, began, raised, problems)
        del raised

    def _torn_down(
        self,
        resource: "Resource[Any]",
        began: float,
        error: BaseException | None,
        problems: list[BaseException],
    ) -> None:
        if error is not None:
            if isinstance(error, Exception):
                error.add_note(f"while {resource} was torn down")
            problems.append(error)
        if began and (told := observer.observer) is not None:
            seconds = perf_counter() - began
            told.resource_torn_down(resource, self.visible, seconds, error)

    def _let_go(self, failure: BaseException | None = None) -> None:
        """Closed; of what has been, nothing is kept."""
        self._state = "closed"
        if (told := observer.observer) is not None and self.visible is self:
            told.scope_closed(self, perf_counter() - self.opened, failure)
        self.failure = self.owner = self.uses = self.request = self.response = None
        if self.served:
            # Nobody leaves it for the one around it: its Context ends with the request. Kept, a
            # server that begins each request in the Context of the last would make a chain of all.
            self._previous = None

    async def _stop_set_ups(self) -> asyncio.CancelledError | None:
        """
        What is being set up in a keeper is cancelled, and cancelled again each time
        that its end takes as long as a teardown may. A thread that sets up finds out
        itself.
        """
        cancellation = None
        while keepers := [
            set_up.keeper
            for set_up in (self.pending or {}).values()
            if set_up.keeper is not None and not set_up.keeper.done()
        ]:
            for keeper in keepers:
                keeper.cancel()
            cancellation = await outlast(*keepers, seconds=self.teardown_timeout) or cancellation
        return cancellation

    def give_up(self) -> "asyncio.Task[Any] | None":
        """Its lifespan does not wait any longer. Returns a task that it has cancelled."""
        return None

    async def _closed(self) -> None:
        """What is left to do when nothing is held any more."""

    async def _end(self, failure: BaseException | None) -> None:
        """Close; a failure that is no mere error (a cancellation) goes before the teardown's."""
        try:
            await self.close(failure)
        except TeardownError as error:
            if failure is None or isinstance(failure, Exception):
                raise
            self.log(error)

    def log(self, error: BaseException) -> None:
        logger.error("While %s was closed: %s", self, error, exc_info=error)

    def log_late(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log(error)
