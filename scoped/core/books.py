"""
``Books``: which resource is in which state, in one scope, and who may come.

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

import sys
from threading import get_ident
from typing import TYPE_CHECKING, Any

from scoped.core.current import current
from scoped.core.errors import LifetimeError, ScopeClosedError
from scoped.core.place import Thread
from scoped.core.record import ENDING, GONE, HELD, RESPONSE_FIRST, Outcome, Record, next_number
from scoped.core.resource import RESPONSE
from scoped.core.waits import current_task, fork_safe_lock

if TYPE_CHECKING:
    import asyncio

    from scoped.core.resource import Resource

__all__ = ["Books"]

# Held while a table is made that more than one thread may want to make, and while a record that
# has failed is taken out of one.
_lock = fork_safe_lock()

# Held while a record is taken, where Python has no global lock.
_taking = fork_safe_lock()


class Books:
    """One half of a scope: what it holds. The other is its life, ``Scope``, which opens them."""

    __slots__ = (
        "_state",
        "ending",
        "has_responded",
        "is_open",
        "owner",
        "records",
        "thread",
        "version",
    )

    _state: str  # "new", "open", "closing" or "closed"
    is_open: bool  # which is asked for all the time
    has_responded: bool
    thread: int  # that of its event loop, or of the sync code that opened it
    owner: "asyncio.Task[Any] | None"  # which runs async factories inline
    records: "dict[Resource[Any], Record]"
    # What is being torn down and must be waited for. Made when it is needed.
    ending: dict[Record, None] | None
    version: int  # another one when, during a release, anything is complete or used

    @property
    def is_over(self) -> bool:
        """Whether all that it held has been torn down."""
        return self._state == "closed"

    def takes(self, resource: "Resource[Any]") -> bool:
        """Whether it can be set up here, still."""
        return self.is_open and not (self.has_responded and resource.lifetime is RESPONSE)

    def begin(self, resource: "Resource[Any]", asker: Record | None) -> tuple[Record, bool]:
        """
        Its record, and whether that is new: then whoever has asked is to set it up. Atomic between
        threads. Raises ScopeClosedError where the scope takes it no more, LifetimeError where it
        would end before what asks for it.
        """
        if asker is not None and asker.state == ENDING:
            asker = None  # what a teardown asks for goes after it, or has nothing to do with it
        record = self.records.get(resource)
        if (not self.is_open or self.has_responded) and (
            not self.takes(resource) and (record is None or record.state != HELD)
        ):
            raise self.closed_error(resource)
        if asker is not None and asker.resource.lifetime > resource.lifetime:
            raise LifetimeError(
                asker.resource, resource, str(asker.resource.lifetime), str(resource.lifetime)
            )
        is_new = False
        if record is None:
            new = Record(resource, self)  # type: ignore[arg-type] # these are a Scope's
            record = self.records.setdefault(resource, new)
            is_new = record is new
        if asker is not None:  # of this scope, or of a request that uses the lifespan's
            asker.use(record)
            if self.ending is not None:
                self.version = next_number()
            # Noted before the look: either the end waits for the thread, or the thread sees the
            # end, and uses nothing that goes meanwhile.
            if isinstance(asker.place, Thread) and not asker.scope.takes(asker.resource):
                error = asker.scope.closed_error(asker.resource)
                if is_new:
                    self.fail(record, error)
                raise error
        return record, is_new

    def begin_alone(self, resource: "Resource[Any]", asker: Record | None) -> Record:
        """
        As ``begin()``, for an async resource that has no record, which the owner asks for: so
        nobody else can come.
        """
        if not self.is_open or (self.has_responded and resource.lifetime is RESPONSE):
            raise self.closed_error(resource)
        record = self.records[resource] = Record(resource, self)  # type: ignore[arg-type]
        if asker is not None:
            asker.use(record)
        return record

    def complete(self, record: Record, generator: Any, value: Any) -> bool:
        """
        Its value is there. False where the scope has closed meanwhile: then whoever has set it up
        tears it down.
        """
        record.generator = generator
        record.number = next_number()
        if record.resource.lifetime is RESPONSE:
            record.number += RESPONSE_FIRST
        record.value = value
        record.state = HELD
        if self.ending is not None:
            self.version = next_number()
        # Looked at when it is in: either the teardown finds it, or this finds the scope closed.
        if (not self.is_open or self.has_responded) and (
            not self.takes(record.resource) and self.take_and_tell(record)
        ):
            return False
        if record.waiters is not None:
            record.settle(Outcome(value))
        return True

    def fail(self, record: Record, error: BaseException) -> None:
        """It could not be set up. Nothing of it stays behind."""
        record.state = GONE
        self.forget(record)
        record.settle(Outcome(None, error, error.__traceback__))
        record.gone()

    def forget(self, record: Record) -> None:
        """
        Where it has failed. Also by who finds it in the table, still: at the end of the stack
        (RecursionError) who has set it up could mark it as failed, and call nothing more.
        """
        if record.state == GONE:
            with _lock:  # of two that look at once none is to take away the next one's record
                try:
                    if self.records.get(record.resource) is record:
                        del self.records[record.resource]
                except Exception:
                    self._take_out(record)

    def take(self, record: Record) -> bool:
        """
        From HELD to ENDING, for one taker alone, who then tears it down. All that there is to know
        goes with the record, so no lock holds several tables together.
        """
        try:
            value = record.value  # its finalizer may ask for anything, so it comes last
            del record.value
        except AttributeError:
            return False
        record.state = ENDING
        try:
            self.records.pop(record.resource, None)  # a fork empties them
        except Exception:
            self._take_out(record)
        del value
        return True

    if not getattr(sys, "_is_gil_enabled", lambda: True)():  # pragma: no cover (free threads)
        # There a slot can be deleted twice, and nobody is told (CPython's issue 146270).
        _take_unlocked = take

        def take(self, record: Record) -> bool:
            value = getattr(record, "value", None)  # whose finalizer is not for under the lock
            with _taking:
                taken = self._take_unlocked(record)
            del value
            return taken

    def _take_out(self, record: Record) -> None:
        """Where another key cannot be compared with its own, as one of the same hash is."""
        object.__setattr__(record.resource, "is_leaving", True)
        self.records.pop(record.resource, None)

    def take_and_tell(self, record: Record) -> bool:
        """
        As ``take()``, where others may come meanwhile: threads, or the end of the scope. They wait
        for what is in ``ending``, where it is from before the claim on, until it has gone.
        """
        (ending := self.table_of_ending())[record] = None
        if self.take(record):
            return True
        if record.state == GONE:  # else it goes from there when whoever has taken it is done
            ending.pop(record, None)
        return False

    def table_of_ending(self) -> dict[Record, None]:
        if (ending := self.ending) is None:
            with _lock:
                if (ending := self.ending) is None:  # pragma: no branch (another thread has, since)
                    ending = self.ending = {}
        return ending

    def closed_error(self, resource: "Resource[Any]") -> ScopeClosedError:
        if not (self.has_responded and resource.lifetime is RESPONSE):
            here = current.get()
            in_teardown = (isinstance(here, Record) and here.state == ENDING) or (
                self._state == "closing"
                and self.owner is current_task()
                and self.thread == get_ident()
            )
            return ScopeClosedError(resource, self, in_teardown=in_teardown)
        return ScopeClosedError(
            resource,
            f"{self} until its response",
            "It lives until the response, so it is torn down before the first byte: use it in "
            "the view or in middleware, not in a streaming body; or declare it without "
            'until="response".',
        )
