"""
``Scope``: the books of one request, or of one lifespan. Which resource is in which state, who
may come, and the end of all of it.

What a request's scope holds while a view asks for ``db``, whose factory asks for ``user``::

    records
    {}                                     opened
    {db: STARTING}                         db's factory runs
    {db: STARTING, user: STARTING}         and asks for user
    {db: STARTING, user: HELD (1)}         user's factory has yielded
    {db: HELD (2), user: HELD (1)}         db's factory has yielded
    {user: HELD (1)}                       closing: db is taken, and torn down
    {}                                     closed

The numbers are the order of completion: so a resource comes after all that its factory used, and
the highest is torn down first.
"""

import asyncio
import logging
import warnings
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from contextvars import Context, copy_context
from threading import get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from scoped.core import noted, observer
from scoped.core.abandoned import dismiss
from scoped.core.current import current
from scoped.core.errors import AsyncResourceError, LifetimeError, ScopeClosedError, TeardownError
from scoped.core.record import ENDING, GONE, HELD, Outcome, Record, next_number
from scoped.core.resource import Lifetime
from scoped.core.teardown import (
    end_all,
    raise_all,
    stop_set_ups,
    stop_set_ups_sync,
    wait_for_others,
    wait_for_others_sync,
)
from scoped.core.waits import ForkSafeLock, current_task, running_loop

if TYPE_CHECKING:
    from scoped.core.lifespan import LifespanScope
    from scoped.core.resource import Resource

__all__ = ["Scope"]

logger = logging.getLogger("scoped")

# Held while a table is made that more than one thread may want to make.
_lock = ForkSafeLock()


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
        "ending",
        "failure",
        "has_responded",
        "lifespan",
        "loop",
        "name",
        "opened",
        "owner",
        "records",
        "request",
        "sync_only",
        "thread",
        "version",
    )

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
        self.records: dict[Resource[Any], Record] = {}
        # What is being torn down and must be waited for, each with the record whose own teardown
        # has released it, if so. Made when it is needed.
        self.ending: dict[Record, Record | None] | None = None
        self.version = 0  # changes when, during a release, anything is complete or used
        self._state = "new"
        self._previous: Scope | Record | None = None
        self.sync_only = False
        self.failure: BaseException | None = None  # what ended it, for factories to see
        self.lifespan: LifespanScope | None = None
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
    def scope(self) -> "Scope":
        """Itself, as a record's scope is what the record belongs to."""
        return self

    @property
    def around(self) -> "Scope | Record | None":
        """What was current where it was opened, while that is open."""
        return self._previous

    def note_failure(self, failure: BaseException) -> None:
        """
        Let the factories see at their ``yield`` that the work has failed, though nothing
        is raised that shows it: as when a framework makes a response of an exception. The
        first failure counts.
        """
        if self.is_open and self.failure is None:
            self.failure = failure

    # The books

    def takes(self, resource: "Resource[Any]") -> bool:
        """Whether it can be set up here, still."""
        return self._state == "open" and not (
            self.has_responded and resource.lifetime is Lifetime.RESPONSE
        )

    def begin(self, resource: "Resource[Any]", asker: Record | None) -> tuple[Record, bool]:
        """
        Its record, and whether that is new: then whoever has asked is to set it up. Atomic between
        threads. Raises ScopeClosedError where the scope takes it no more, LifetimeError where it
        would end before what asks for it.
        """
        record = self.records.get(resource)
        if not self.takes(resource) and (record is None or record.state != HELD):
            raise self.closed_error(resource)
        if asker is not None and asker.resource.lifetime > resource.lifetime:
            raise LifetimeError(
                asker.resource, resource, str(asker.resource.lifetime), str(resource.lifetime)
            )
        is_new = False
        if record is None:
            new = Record(resource, self)
            record = self.records.setdefault(resource, new)
            is_new = record is new
        if asker is not None and asker.scope is self:
            asker.use(record)
            if self.ending is not None:
                self.version += 1
        return record, is_new

    def complete(self, record: Record, generator: Any, value: Any) -> bool:
        """
        Its value is there. False where the scope has closed meanwhile: then whoever has set it up
        tears it down.
        """
        record.generator = generator
        record.number = next_number()
        record.value = value
        record.state = HELD
        if self.ending is not None:
            self.version += 1
        # Looked at when it is in: either the teardown finds it, or this finds the scope closed.
        if (self._state != "open" or self.has_responded) and (
            not self.takes(record.resource) and self.take_and_tell(record)
        ):
            return False
        if record.waiters is not None:
            record.settle(Outcome(value))
        return True

    def fail(self, record: Record, error: BaseException) -> None:
        """It could not be set up. Nothing of it stays behind."""
        if self.records.get(record.resource) is record:
            del self.records[record.resource]
        record.state = GONE
        record.settle(Outcome(None, error, error.__traceback__))
        record.gone()

    def take(self, record: Record) -> bool:
        """
        From HELD to ENDING, for one taker alone, who then tears it down. All that there is to know
        goes with the record, so no lock holds several tables together.
        """
        try:
            del record.value
        except AttributeError:
            return False
        record.state = ENDING
        if self.records.get(record.resource) is record:
            del self.records[record.resource]
        return True

    def take_and_tell(self, record: Record, released_by: Record | None = None) -> bool:
        """
        As ``take()``, where others may come meanwhile: threads, or the end of the scope. They wait
        for what is in ``ending``, where it is from before the claim on, until ``told_of_end()``.
        """
        self._table_of_ending()[record] = released_by
        if self.take(record):
            return True
        if record.state == GONE:  # else whoever has taken it takes it out of there, in its time
            self.told_of_end(record)
        return False

    def told_of_end(self, record: Record) -> None:
        """Its teardown is over."""
        if self.ending is not None:
            self.ending.pop(record, None)

    def _table_of_ending(self) -> dict[Record, Record | None]:
        if (ending := self.ending) is None:
            with _lock:
                if (ending := self.ending) is None:
                    ending = self.ending = {}
        return ending

    @contextmanager
    def ending_now(self, record: Record) -> Generator[None]:
        """While it is being torn down: others wait for that, but not its own code."""
        self._table_of_ending().setdefault(record, None)  # ``take_and_tell()`` may know more
        try:
            yield
        finally:
            self.told_of_end(record)

    def closed_error(self, resource: "Resource[Any]") -> ScopeClosedError:
        if not (self.has_responded and resource.lifetime is Lifetime.RESPONSE):
            here = current.get()
            in_teardown = (isinstance(here, Record) and here.state == ENDING) or (
                self._state == "closing" and self.owner is current_task()
            )
            return ScopeClosedError(resource, self, in_teardown=in_teardown)
        return ScopeClosedError(
            resource,
            f"{self} until its response",
            "It lives until the response, so it is torn down before the first byte: use it in "
            "the view or in middleware, not in a streaming body; or declare it without "
            'until="response".',
        )

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
                "server; or give sync code a resource of its own with a plain `def`.",
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
        Tear down everything, last complete first, whatever fails or is cancelled on
        the way. Does nothing where the scope is closing or closed. The factories
        see ``failure``, if any, at their ``yield``.

        Raises the cancellation, if there was one, bare; else TeardownError if any
        teardown failed.
        """
        if (rest := self.begin_close(failure)) is not None:
            await rest

    def begin_close(self, failure: BaseException | None = None) -> Coroutine[Any, Any, None] | None:
        """
        Close it, without a coroutine where nothing has used it. Returns what is to be awaited for
        the rest, if that was not all.
        """
        if not self.begin_to_close():
            return None
        if self.records or self.ending or self.lifespan:
            return self._close(failure)
        self._let_go(failure if self.failure is None else self.failure)
        return None

    def begin_to_close(self) -> bool:
        """
        Whether it is for the caller to close it. From now on nothing new is kept; so what is
        found after this, and not before it, is all.
        """
        if self._state != "open":
            return False
        self._state = "closing"
        return True

    async def _close(self, failure: BaseException | None) -> None:
        if self.failure is None:
            self.failure = failure
        failure = self.failure
        problems: list[BaseException] = []
        if self.records or self.ending:
            if self._is_busy() and (cancellation := await self.stop(Lifetime.LIFESPAN)):
                problems.append(cancellation)
            await end_all(self, Lifetime.LIFESPAN, failure, problems)
        self._let_go(failure)
        del failure
        if self.lifespan is not None:
            try:
                await self._closed()
            except TeardownError as error:
                problems.extend(error.exceptions)
            except BaseException as error:
                problems.append(error)
        if problems:
            raise_all(self, problems)

    def _is_busy(self) -> bool:
        """Whether anything is being set up or torn down, which the end has to wait for."""
        if self.ending:
            return True
        for record in list(self.records.values()):  # noqa: SIM110 (any() is slower)
            if record.state != HELD:
                return True
        return False

    async def stop(self, lifetime: Lifetime) -> BaseException | None:
        """Let set-ups, and what is being released, come to their end."""
        if self.sync_only or running_loop() is None:
            stop_set_ups_sync(self, lifetime)
            wait_for_others_sync(self, self.teardown_timeout)
            return None
        cancellation: BaseException | None = await stop_set_ups(self, lifetime)
        while self.ending:
            try:
                await wait_for_others(self)
            except asyncio.CancelledError as error:
                cancellation = error
            else:
                break
        return cancellation

    def _let_go(self, failure: BaseException | None = None) -> None:
        """Closed; of what has been, nothing is kept."""
        self._state = "closed"
        if (told := observer.observer) is not None:
            told.scope_closed(self, perf_counter() - self.opened, failure)
        self.failure = self.owner = self.request = None
        dismiss(self)
        if self.served:
            # Nobody leaves it for the one around it: its Context ends with the request. Kept, a
            # server that begins each request in the Context of the last would make a chain of all.
            self._previous = None

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

    async def _closed(self) -> None:
        """What is left to do when nothing is held any more."""

    def give_up(self) -> "asyncio.Task[Any] | None":
        """Its lifespan does not wait any longer. Returns a task that it has cancelled."""
        return None

    async def close_abandoned(self, failure: BaseException) -> None:
        """The event loop ends, and whoever was to close it has gone."""
        self.owner = asyncio.current_task()
        await self._end(failure)

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

    def log_late(self, task: "asyncio.Future[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log(error)
