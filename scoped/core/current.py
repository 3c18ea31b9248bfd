"""The one ContextVar, and what it says of the code at hand."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from scoped.core.record import ENDING, STARTING, Record

if TYPE_CHECKING:
    from scoped.core.scope import Scope

__all__ = ["as_current", "asker_here", "current", "scope_here"]

# The open scope; while a factory runs, its record, which knows the scope. A factory's child tasks
# copy it, so circles show through them too.
current: ContextVar["Scope | Record | None"] = ContextVar("scoped.current", default=None)


def scope_here() -> "Scope | None":
    """The scope that is current, be it open or closed."""
    here = current.get()
    return here.scope if isinstance(here, Record) else here


@contextmanager
def as_current(scope: "Scope") -> Generator[None]:
    """For code of one request that another one's may have called, or another thread."""
    if (around := current.get()) is scope:
        yield
        return
    current.set(scope)
    try:
        yield
    finally:
        current.set(around)


def asker_here() -> Record | None:
    """The resource whose set-up or teardown the code at hand is a part of."""
    here = current.get()
    return here if type(here) is Record and here.state in (STARTING, ENDING) else None
