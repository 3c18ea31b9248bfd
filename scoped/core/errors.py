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

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, cast

from scoped.core.names import printable_repr

__all__ = [
    "AsyncResourceError",
    "CircularResourceError",
    "FactoryError",
    "LifetimeError",
    "NoScopeError",
    "ScopeClosedError",
    "ScopedError",
    "TeardownError",
    "nobodys_cancellation",
    "note",
    "notes_of",
    "set_traceback",
    "teardown_timed_out",
]


class ScopedError(Exception):
    """
    The base of every error in this package. Pickled, for another process, and copied it has the
    same words, and texts where it names resources.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by calling the class, which would make other words of these; and no resource, which
        # holds the user's function.
        state = dict(vars(self))
        for name in state.keys() & {"resource", "needed"}:
            state[name] = None if state[name] is None else str(state[name])
        if "circle" in state:
            state["circle"] = tuple(map(str, state["circle"]))
        return _again, (type(self), *self.args), state


def _again(kind: Any, *args: Any) -> ScopedError:
    error: ScopedError = kind.__new__(kind, *args)
    return error


class NoScopeError(ScopedError, LookupError):
    """A resource was used, or a scope asked for, where none is open."""

    def __init__(
        self, resource: object = None, hint: str = "", *, in_lifespan: bool = False
    ) -> None:
        self.resource = resource
        what = f"{resource} was used" if resource is not None else "current_scope() was called"
        lifespan = _lifetime_of(resource) == "lifespan"
        which = "such" if hint else "lifespan" if lifespan else "request"
        if in_lifespan:
            hint = (
                "In a `lifespan_scope()` block the request around it does not count: ask for it "
                f"before the block, or open one in it with {_opening(resource, 'request_scope')}. "
                f"For a request that is served meanwhile: serve the project with {_SERVE}."
            )
        super().__init__(f"{what} where no {which} scope is open. {hint or _remedy(resource)}")


_SERVE = "scoped.asgi.get_asgi_application()"


def _is_async(resource: object) -> bool:
    return getattr(getattr(resource, "factory", None), "is_async", False)


def _opening(resource: object, scope: str) -> str:
    if _is_async(resource):
        return f"`async with {scope}():`"
    return f"`with {scope}():`, or `async with` in async code"


def _remedy(resource: object) -> str:
    is_of_lifespan = _lifetime_of(resource) == "lifespan"
    opening = _opening(resource, "lifespan_scope" if is_of_lifespan else "request_scope")
    if is_of_lifespan:
        return (
            f"A server opens the lifespan: serve the project with {_SERVE}. Anywhere else (a "
            f"command, a script, a test): open it with {opening}, or with a request scope, which "
            "has one."
        )
    anywhere_else = f"Anywhere else (a command, a task, a test): open one with {opening}."
    thread = threading.current_thread()
    if thread is threading.main_thread():
        return (
            f"In a request: serve the project with {_SERVE}. If it is, this was started by what "
            "does not know of the request, as asyncio.run_coroutine_threadsafe() in a thread of "
            f"your own: start it in the request's own tasks. {anywhere_else}"
        )
    if _is_async(resource):
        way = (
            "run your sync code with sync_to_async(), in which async_to_sync() leads back to the "
            "request's event loop; or await it before, and hand on the value"
        )
    else:
        way = (
            "use asyncio.to_thread() or sync_to_async(), or let it run "
            "`contextvars.copy_context().run`"
        )
    return (
        f'In a request: serve the project with {_SERVE} or scoped.wsgi\'s, and list "scoped" in '
        f"INSTALLED_APPS. A thread that you or an executor of yours has started, as "
        f"{printable_repr(thread.name)} may be, does not know of the request: {way}. "
        f"{anywhere_else}"
    )


def _lifetime_of(thing: object) -> str:
    """That of a resource or a scope."""
    return str(getattr(thing, "lifetime", ""))


class ScopeClosedError(ScopedError, RuntimeError):
    """A resource was used after its scope had closed, or while it closes."""

    def __init__(
        self, resource: object, scope: object, hint: str = "", *, in_teardown: bool = False
    ) -> None:
        self.resource = resource
        self.scope = str(scope)  # its name, not the scope: an error keeps nothing alive
        if in_teardown:
            hint = (
                "A teardown can use what is set up, and set up nothing more: ask for it before "
                "the `yield`."
            )
        elif _lifetime_of(scope) == "lifespan":
            hint = (
                "The server shuts down: what is still at work can use what is set up, and set up "
                "nothing more. Where it must, ask for it earlier."
            )
        super().__init__(
            f"{resource} was used after its scope, {scope}, had begun to close. "
            + (
                hint
                or "What outlives a request cannot use the request's resources: finish the work "
                "before the request ends, start it with `spawn()`, which gives it a scope of its "
                "own, or open one in it with `async with request_scope():`."
            )
        )


class CircularResourceError(ScopedError, RuntimeError):
    """A resource needs itself, straight or through others."""

    def __init__(self, circle: Sequence[object]) -> None:
        self.circle = tuple(circle)
        super().__init__(
            "Resources need each other in a circle, so none of them can be set up first: "
            + _arrows(circle)
            + ". Break the circle: move what both need into a resource of its own."
        )


def _arrows(circle: Sequence[object]) -> str:
    """Of a long one (keys may make it so), where it begins and where it closes."""
    steps = list(map(str, circle))
    if len(steps) > 12:
        steps[6:-6] = [f"... {len(steps) - 12} more ..."]
    return " -> ".join(steps)


class LifetimeError(ScopedError, RuntimeError):
    """
    A resource needs one that does not live as long as it does. Where it is set up already
    (``left_running``), a task that its factory has started needs it, or its teardown
    (``in_teardown``).
    """

    def __init__(
        self,
        resource: object,
        needed: object,
        lifetime: str,
        shorter: str,
        *,
        left_running: bool = False,
        in_teardown: bool = False,
    ) -> None:
        self.resource = resource
        self.needed = needed
        if left_running:
            text = (
                f"A task that the factory of {resource} has left running asked for {needed}, whose "
                f"lifetime is the {shorter}'s: it is part of none. Open a scope in it for each "
                "piece of its work, with `async with request_scope():`."
            )
        elif in_teardown:
            text = (
                f"The teardown of {resource} asked for {needed}, whose lifetime is the "
                f"{shorter}'s: it is part of none. Open a scope in it, with "
                f"{_opening(needed, 'request_scope')}."
            )
        else:
            text = (
                f"{resource}, whose lifetime is the {lifetime}'s, asked for {needed}, whose "
                f"lifetime is the {shorter}'s, and so ends before. Give both the same lifetime, or "
                "ask for the second where the first is used."
            )
        super().__init__(text)


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

    def __reduce__(self) -> tuple[Any, ...]:
        again, _, state = super().__reduce__()
        return again, (type(self), self.scope, self.exceptions), state

    def derive(self, errors: Sequence[Exception]) -> "TeardownError":  # type: ignore[override]
        return TeardownError(self.scope, errors)


def teardown_timed_out(resource: object, seconds: float, in_use_by: str = "") -> TimeoutError:
    """For a resource of a lifespan, with whose requests are open in it, or may yet use it."""
    if _lifetime_of(resource) != "lifespan":
        remedy = 'Make it faster, or raise SCOPED["TEARDOWN_TIMEOUT"].'
    else:
        remedy = (
            "A pool waits like that for what has been taken out of it and not been given back"
            + (f", by {in_use_by}: " if in_use_by else ": ")
            + "by a task that outlives its request, say. End those before the server does "
            "(`spawn()` has them waited for), or let the factory close it without waiting, or "
            'raise SCOPED["TEARDOWN_TIMEOUT"].'
        )
    return TimeoutError(
        f"{resource} took longer than {seconds:g} seconds to be torn down. {remedy}"
    )


def nobodys_cancellation(what: str, cancellation: BaseException) -> RuntimeError:
    """For one that nobody has asked for from outside: so it is a failure. It keeps its notes."""
    error = RuntimeError(f"{what}. Catch CancelledError where that is meant to be.")
    error.__cause__ = cancellation
    for text in notes_of(cancellation):
        note(error, text)
    return error


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
