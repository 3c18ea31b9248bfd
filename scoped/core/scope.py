"""``Scope``: the life of what a request, or a server's lifespan, holds: from opening to end."""

import asyncio
import logging
import warnings
from collections.abc import Awaitable, Iterable, Iterator
from contextvars import Context, copy_context
from threading import get_ident
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from scoped.core import noted, observer
from scoped.core.abandoned import dismiss, guards
from scoped.core.books import Books
from scoped.core.current import current
from scoped.core.errors import AsyncResourceError, TeardownError
from scoped.core.names import printable_repr
from scoped.core.resource import LIFESPAN, Lifetime
from scoped.core.teardown import (
    end_all,
    raise_all,
    stop_keepers,
    wait_for_others,
    wait_for_threads,
)
from scoped.core.waits import current_task, is_cancelled, running_loop

if TYPE_CHECKING:
    from django.http import HttpRequest  # for users' type checkers: nothing of it is used

    from scoped.core.lifespan import LifespanScope
    from scoped.core.record import Record
    from scoped.core.resource import Resource

__all__ = ["Scope"]

logger = logging.getLogger("scoped")


class Scope(Books):
    """
    What ``request_scope()`` and ``current_scope()`` return. ``name`` says whose it is,
    ``is_open`` whether resources can be set up in it, ``request`` is Django's request
    where it is that of one, else None.
    """

    __slots__ = (
        "__weakref__",
        "around",
        "failure",
        "lifespan",
        "loop",
        "name",
        "opened",
        "request",
        "sync_only",
    )

    # From its opening on.
    loop: asyncio.AbstractEventLoop | None
    opened: float  # by perf_counter(), in seconds

    lifetime: ClassVar[Lifetime]
    owns_set_ups: ClassVar[bool] = False  # whether its owner runs factories inline
    # Whether a factory whose keeper was cancelled, by its own timeout say, is told so at the end.
    tells_own_cancellation: ClassVar[bool] = False
    served: bool = False  # opened by a server's handler, so not the last of its process
    # Seconds that one resource's teardown may take before it is cancelled.
    teardown_timeout: ClassVar[float] = 10.0
    # Seconds after which a teardown is said to be slow.
    slow_teardown: ClassVar[float] = 1.0
    # Seconds that a closing lifespan waits for requests that are still open.
    shutdown_timeout: ClassVar[float] = 10.0

    def __init__(self, name: str) -> None:
        self.name = name
        self._state = "new"
        self.is_open = self.has_responded = self.sync_only = False
        self.records = {}
        self.ending = None
        self.version = 0
        # What was current where it was opened, while that is open.
        self.around: Scope | Record | None = None
        self.failure: BaseException | None = None  # what ended it, for factories to see
        self.lifespan: LifespanScope | None = None
        self.request: HttpRequest | None = None

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}, {self._state}>"

    @property
    def scope(self) -> "Scope":
        """Itself, as a record's scope is what the record belongs to."""
        return self

    def note_failure(self, failure: BaseException) -> None:
        """
        Let the factories see at their ``yield`` that the work has failed, though nothing
        is raised that shows it: as when a framework makes a response of an exception. The
        first failure counts.
        """
        if self.is_open and self.failure is None:
            self.failure = failure

    # Who may come

    def check_loop(self, resource: "Resource[Any]") -> None:
        """Raises AsyncResourceError where its event loop is not the one that runs."""
        if self.sync_only:
            raise AsyncResourceError(
                resource,
                self,
                "its scope was opened by sync code, which has no event loop to keep it in",
                "Open the scope with `async with request_scope():`; serve the project over ASGI, "
                "`uvicorn project.asgi:application` say, for `manage.py runserver` is a WSGI "
                "server; in a test, use scoped.testing.AsyncClient; or give sync code a resource "
                "of its own with a plain `def`.",
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

    def is_owner_here(self) -> bool:
        """Whether what is set up here is set up, and torn down, with the owner."""
        return self.owns_set_ups and self.thread == get_ident() and self.owner is current_task()

    def context(self) -> Context:
        """The Context for a factory that somebody else than the owner asked for."""
        return copy_context()

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
        self.is_open = True
        previous = current.get()
        if previous is not None and previous.is_open:
            self.around = previous
        current.set(self)
        if noted.scopes is not None:
            noted.note(self)

    def tell_of_opening(self) -> None:
        """Once all is in place: whoever hears of it may use it."""
        if (told := observer.observer) is not None:
            told.scope_opened(self)

    def leave(self) -> None:
        """Make the scope around this one current again, if it is still open."""
        previous = self.around
        self.around = None
        if current.get() is self:
            # Not by token: those are bound to one Context, and this may be another.
            current.set(previous if previous is not None and previous.is_open else None)

    async def close(self, failure: BaseException | None = None) -> None:
        """
        Tear down everything, last complete first, whatever fails or is cancelled on
        the way. Does nothing where the scope is closing or closed. The factories
        see ``failure``, if any, at their ``yield``.

        Raises the cancellation, if the task was cancelled, bare; else TeardownError if any
        teardown failed, or was cancelled all the same.
        """
        for rest in self.begin_close(failure):
            await rest

    def begin_close(self, failure: BaseException | None = None) -> Iterable[Awaitable[None]]:
        """
        Close it. Returns what is to be awaited then, one after the other: nothing where nothing
        has used it, or somebody else closes it.
        """
        if not self.is_open:
            return ()
        # From now on nothing new is kept; so what is found after this, and not before it, is all.
        self.is_open = False
        self._state = "closing"
        if self.records or self.ending:
            return self._close(failure)
        self._let_go(failure if self.failure is None else self.failure)
        if self.lifespan is None or (rest := self._closed()) is None:
            return ()
        return (self._end_of_lifespan(rest, []),)

    def _close(self, failure: BaseException | None) -> Iterator[Awaitable[None]]:
        """What is to be awaited, one after the other; what fails is raised at its end."""
        if self.failure is None:
            self.failure = failure
        failure = self.failure
        problems: list[BaseException] = []
        yield from end_all(self, LIFESPAN, failure, problems)
        self._let_go(failure)
        del failure  # no cycle of it and this frame
        if self.lifespan is not None and (rest := self._closed()) is not None:
            yield self._end_of_lifespan(rest, problems)
        elif problems:
            raise_all(self, problems)

    async def _end_of_lifespan(self, rest: Awaitable[None], problems: list[BaseException]) -> None:
        """Which ends with this scope, its last: so their problems are raised as one."""
        try:
            await rest
        except TeardownError as error:
            problems.extend(error.exceptions)
        except BaseException as error:
            problems.append(error)
        if problems:
            raise_all(self, problems)

    async def stop(self, lifetime: Lifetime, problems: list[BaseException]) -> None:
        """Let set-ups, and what is being released, come to their end."""
        in_loop = not self.sync_only and running_loop() is not None  # else there is no keeper
        cancellation = await stop_keepers(self, lifetime) if in_loop else None
        deadline = monotonic() + self.teardown_timeout
        while True:
            try:
                await wait_for_threads(self, lifetime, deadline, in_loop=in_loop)
                await wait_for_others(self, in_loop=in_loop)
            except asyncio.CancelledError as error:
                cancellation = error
            else:
                break
        if cancellation is not None:
            problems.append(cancellation)

    def _let_go(self, failure: BaseException | None) -> None:
        """Closed; of what has been, nothing is kept."""
        self._state = "closed"
        if (told := observer.observer) is not None:
            told.scope_closed(self, perf_counter() - self.opened, failure)
        self.failure = self.owner = self.request = None
        if guards:
            dismiss(self)
        if self.served:
            # Nobody leaves it for the one around it: its Context ends with the request. Kept, a
            # server that begins each request in the Context of the last would make a chain of all.
            self.around = None

    def __del__(self) -> None:
        if getattr(self, "_state", "new") == "open" and self.records:
            names = ", ".join(str(resource) for resource in list(self.records))
            warnings.warn(
                f"{self} was never closed, and so neither was what it held: {names}. Open a scope "
                "with `async with` or `with`.",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    def in_use_by(self) -> str:
        """Who is known to use what it holds, though it closes; else the empty string."""
        return ""

    def _closed(self) -> Awaitable[None] | None:
        """
        What is left to do when nothing is held any more: with its lifespan. Returns what is to be
        awaited, if that is the end of another scope.
        """
        return None  # pragma: no cover (each kind of scope has its own)

    def give_up(self) -> "asyncio.Task[Any] | None":
        """Its lifespan does not wait any longer. Returns a task that it has cancelled."""
        return None

    async def close_abandoned(self, failure: BaseException) -> None:
        """The event loop ends, and whoever was to close it has gone."""
        self.owner = asyncio.current_task()
        await self.end(failure)

    async def end(self, failure: BaseException | None) -> None:
        """
        Close; a failure that is no mere error goes before the teardown's. But a cancellation
        that nobody has asked for from outside does not: a timeout, or task group, that a factory
        holds across its ``yield`` takes its own back as it is left, and most say why.
        """
        was_cancelled = isinstance(failure, asyncio.CancelledError) and is_cancelled()
        try:
            await self.close(failure)
        except TeardownError as error:
            if failure is None or isinstance(failure, Exception):
                raise
            if isinstance(failure, asyncio.CancelledError) and not is_cancelled():
                raise
            self.log(error)
        if was_cancelled and not is_cancelled():
            raise RuntimeError(
                f"{self} was cut off by one of its factories, which has cancelled the task and "
                "taken that back without a word, as anyio.move_on_after() does. Have it raise an "
                "error of its own after its `yield`."
            ) from failure

    def log(self, error: BaseException) -> None:
        logger.error("While %s was closed: %s", self, printable_repr(error), exc_info=error)

    def log_late(self, task: "asyncio.Future[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log(error)
