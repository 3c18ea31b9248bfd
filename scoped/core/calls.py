"""``@request_scope()``: a new scope for each call of a function."""

import asyncio
import inspect
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, Protocol, Self, TypeVar, cast

from asgiref.sync import iscoroutinefunction

from scoped.core.names import printable_repr

__all__ = ["in_scope"]

P = ParamSpec("P")
R = TypeVar("R")


class _Scope(Protocol):
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def in_scope(new: Callable[[str], _Scope], function: Callable[P, R]) -> Callable[P, R]:
    """
    The function, each call of which has a scope of its own: ``new()``, given a name for it.
    Raises TypeError for what is none, and for a generator function: between two of its
    steps the scope would be open for whoever takes them.
    """
    if isinstance(function, staticmethod):  # in a class's body
        return cast(Callable[P, R], staticmethod(in_scope(new, cast(Any, function).__func__)))
    if not callable(function) or inspect.isclass(function) or _makes_generators(function):
        raise TypeError(
            f"@request_scope() was put on {printable_repr(function)}. It decorates functions and "
            "coroutine functions, of which each call has a scope. In anything else, a generator "
            "function too, write `async with request_scope():` or `with request_scope():`."
        )
    name = f"the call of {getattr(function, '__qualname__', None) or printable_repr(function)}"

    if iscoroutinefunction(function):  # pyright: ignore[reportDeprecated] (asgiref's is not)

        @wraps(function)
        async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
            async with new(name):
                return await cast(Any, function(*args, **kwargs))

        return cast(Callable[P, R], call_async)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with new(name):
            result = function(*args, **kwargs)
            _refuse_unfinished(name, result)
            return result

    return call


def _makes_generators(function: Callable[..., Any]) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _refuse_unfinished(name: str, result: object) -> None:
    """What would run after the end of the scope that is meant for it."""
    if inspect.iscoroutine(result) or inspect.isgenerator(result):
        result.close()
    elif asyncio.isfuture(result):
        result.cancel()
    elif not inspect.isasyncgen(result):
        return
    raise TypeError(
        f"@request_scope() opened a scope for {name}, and closed it when that returned "
        f"{type(result).__name__!r}, which was yet to run. Put the decorator on what runs: on the "
        "`async def`, say."
    )
