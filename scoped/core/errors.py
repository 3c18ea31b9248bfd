"""
Every error that scoped raises::

    ScopedError
    ├── NoScopeError            (LookupError)     used where no scope is open
    ├── ScopeClosedError        (RuntimeError)    used after its scope has closed
    ├── CircularResourceError   (RuntimeError)    needs itself
    ├── LifetimeError           (RuntimeError)    needs something shorter-lived
    ├── AsyncResourceError      (RuntimeError)    used where its event loop is not
    ├── FactoryError            (TypeError)       the factory is not one
    └── TeardownError           (ExceptionGroup)  one or more teardowns failed

Each says what happened, then what to do.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, cast

__all__ = [
    "AsyncResourceError",
    "CircularResourceError",
    "FactoryError",
    "LifetimeError",
    "NoScopeError",
    "ScopeClosedError",
    "ScopedError",
    "TeardownError",
    "note",
    "notes_of",
    "set_traceback",
]


class ScopedError(Exception):
    """The base of every error in this package."""


class NoScopeError(ScopedError, LookupError):
    """A resource was used, or a scope asked for, where none is open."""

    def __init__(self, resource: object = None, hint: str = "") -> None:
        self.resource = resource
        what = f"{resource} was used" if resource is not None else "current_scope() was called"
        super().__init__(
            f"{what} where no {'such' if hint else 'request'} scope is open. "
            + (
                hint
                or "In a request: serve the project with scoped.asgi.get_asgi_application(). "
                "Anywhere else (a command, a task, a test): open one with "
                "`async with request_scope():`."
            )
        )


class ScopeClosedError(ScopedError, RuntimeError):
    """A resource was used after its scope had closed, or while it closes."""

    def __init__(self, resource: object, scope: object, hint: str = "") -> None:
        self.resource = resource
        self.scope = str(scope)  # its name, not the scope: an error keeps nothing alive
        super().__init__(
            f"{resource} was used after its scope, {scope}, had begun to close. "
            + (
                hint
                or "What outlives a request cannot use the request's resources: finish the work "
                "before the request ends, or open a scope of its own with "
                "`async with request_scope():`."
            )
        )


class CircularResourceError(ScopedError, RuntimeError):
    """A resource needs itself, straight or through others."""

    def __init__(self, circle: Sequence[object]) -> None:
        self.circle = tuple(circle)
        super().__init__(
            "Resources need each other in a circle, so none of them can be set up first: "
            + " -> ".join(map(str, circle))
            + ". Break the circle: move what both need into a resource of its own."
        )


class LifetimeError(ScopedError, RuntimeError):
    """A resource needs one that does not live as long as it does."""

    def __init__(self, resource: object, needed: object, lifetime: str, shorter: str) -> None:
        self.resource = resource
        self.needed = needed
        super().__init__(
            f"{resource}, whose lifetime is the {lifetime}'s, asked for {needed}, whose lifetime "
            f"is the {shorter}'s, and so ends before. Give both the same lifetime, or ask for the "
            "second where the first is used."
        )


class AsyncResourceError(ScopedError, RuntimeError):
    """An async resource was used where its event loop is not running."""

    def __init__(self, resource: object, scope: object, reason: str, remedy: str) -> None:
        self.resource = resource
        self.scope = str(scope)
        self.reason = reason
        super().__init__(f"{resource} cannot be used here: {reason} ({scope}). {remedy}")


class FactoryError(ScopedError, TypeError):
    """What was decorated is not a factory, or does not behave like one."""

    def __init__(self, resource: object, problem: str, remedy: str) -> None:
        self.resource = resource
        self.problem = problem
        super().__init__(f"{resource} {problem}. {remedy}")


class TeardownError(ScopedError, ExceptionGroup[Exception]):
    """
    One or more resources of a scope failed while they were torn down. All of
    them were tried. The failures are in ``exceptions``, each with a note that
    names its resource.
    """

    def __new__(cls, scope: object, errors: Sequence[Exception]) -> Self:
        message = (
            f"{len(errors)} resource(s) of {scope} failed while they were torn down; the others "
            "were torn down. See each error's note for its resource"
        )
        return super().__new__(cls, message, errors)

    def __init__(self, scope: object, errors: Sequence[Exception]) -> None:  # noqa: ARG002
        self.scope = str(scope)

    def derive(self, errors: Sequence[Exception]) -> "TeardownError":  # type: ignore[override]
        return TeardownError(self.scope, errors)


# Somebody else's exception may refuse what we do to it: a frozen dataclass every attribute, others
# have an ``add_note()`` or ``__setattr__()`` that raises, or ``__notes__`` that are no list. And it
# may be one and the same object that is raised again and again: nothing must pile up on it.


def note(error: BaseException, text: str) -> None:
    """Add a note to an exception, once. Never raises: it does without where that cannot be."""
    try:
        notes: Any = getattr(error, "__notes__", None)
        if notes is None:
            # Not add_note(), which asks the class's own __setattr__().
            object.__setattr__(error, "__notes__", [text])
        elif isinstance(notes, list) and text not in notes_of(error):
            cast("list[str]", notes).append(text)
    except Exception:  # noqa: S110 (it may be anything, and a note is not worth a word)
        pass


def notes_of(error: BaseException) -> list[str]:
    """Its notes, as far as they are any."""
    try:
        return [one for one in getattr(error, "__notes__", ()) if isinstance(one, str)]
    except Exception:
        return []


def set_traceback(error: BaseException, traceback: TracebackType | None) -> None:
    """Set it as ``raise`` does, past what the exception's class makes of attributes."""
    BaseException.with_traceback(error, traceback)
