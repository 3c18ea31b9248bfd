"""``override``: another factory, or a value, in a resource's place, in a test."""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial, wraps
from threading import Lock
from types import CoroutineType, TracebackType
from typing import Any, Self, TypeVar, cast

from asgiref.sync import iscoroutinefunction

from scoped.core.declare import (
    AsyncResource,
    KeyedAsyncResource,
    KeyedSyncResource,
    SyncResource,
    is_resource,
)
from scoped.core.errors import FactoryError
from scoped.core.factory import UNFINISHED, Factory, is_function
from scoped.core.names import printable_repr
from scoped.core.resource import Resource

__all__ = ["during_each_call", "overridden", "override"]

F = TypeVar("F", bound=Callable[..., Any])

_AnyResource = (
    AsyncResource[Any]
    | SyncResource[Any]
    | KeyedAsyncResource[..., Any]
    | KeyedSyncResource[..., Any]
)

# What stands in for what, the last one in force.
_in_force: dict[Any, list[Resource[Any]]] = {}
_lock = Lock()


class override:  # noqa: N801 (it is used as a function)
    """
    ``with override(db, stand_in):`` puts ``stand_in`` in the place of a resource,
    everywhere in this process, whoever uses it and whether it is set up already or
    not. At the end the resource is back, and so is its value where it was set up.

    ``stand_in`` is a factory where it is a function, of any kind that the decorators
    take; sync ones may stand in for async ones. Anything else, a Mock too, is
    the value itself. What a factory yields is torn down with the scope in which it was
    set up. What is set up with ``stand_in`` keeps it to its own end, as a lifespan's does
    that outlives the block.

    May be nested, the last one counts; undone also when the body raises. In the place
    of a keyed resource a factory gets the arguments.

    As a decorator of a function of any kind it holds during each call, and where that
    gives a coroutine, a generator or a future, until this is done.

    Raises TypeError where the first argument is no resource, and where it decorates no
    function; FactoryError where ``stand_in`` is async and the resource is not, or is no
    factory; RuntimeError where it is left and not in force.
    """

    def __init__(self, resource: _AnyResource, stand_in: object, /) -> None:
        if isinstance(resource, staticmethod):  # in a class's body
            resource = cast(Any, resource).__func__
        if not is_resource(resource):
            raise TypeError(
                f"override() was given {printable_repr(resource)} to replace. Give it what "
                "@request_scoped or @lifespan_scoped has made."
            )
        self._access: Any = resource
        self._stand_in = stand_in
        self._recipe = _recipe(resource.resource, stand_in)

    def __enter__(self) -> Self:
        with _lock:
            _in_force.setdefault(self._access, []).append(self._recipe)
            self._access.stand_in(self._recipe)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _lock:
            # Not always the last one: tasks that override at once end in any order.
            recipes = _in_force.get(self._access, [])
            if self._recipe not in recipes:
                raise RuntimeError(f"This override() of {self._access.resource} is not in force.")
            recipes.remove(self._recipe)
            self._access.stand_in(recipes[-1] if recipes else self._access.resource)
            if not recipes:
                del _in_force[self._access]

    def __call__(self, function: F) -> F:
        # A new one for each call: so what a factory yields is set up anew in each.
        new = partial(override, self._access, self._stand_in)
        return during_each_call(new, function, "override")


def during_each_call(new: "_New", function: F, name: str) -> F:
    """The function, in a new ``with`` block at each call, to the end of what that gives."""
    if isinstance(function, staticmethod):  # in a class's body
        return cast(F, staticmethod(during_each_call(new, cast(Any, function).__func__, name)))
    if not callable(function) or inspect.isclass(function):
        raise TypeError(
            f"{name}() was put on {printable_repr(function)}. It decorates functions: put it on "
            f"each, or write `with {name}(...):`."
        )
    for is_kind, _, during in _KINDS:
        if is_kind(function):
            return cast(F, during(new, function))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(new())
            result = function(*args, **kwargs)
            if asyncio.isfuture(result):
                undo = stack.pop_all().close
                result.add_done_callback(lambda _: undo())
            for _, is_result, during in _KINDS:
                if is_result(result):
                    return during(new, lambda: result)()
            return result

    return cast(F, call)


def overridden() -> list[Resource[Any]]:
    """The resources that something stands in for right now."""
    with _lock:
        return [access.resource for access in _in_force]


_New = Callable[[], AbstractContextManager[Any]]


def _during_coroutine(new: _New, function: Callable[..., Any]) -> Any:
    @wraps(function)
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        with new():
            return await function(*args, **kwargs)

    return coroutine


def _during_generator(new: _New, function: Callable[..., Any]) -> Any:
    @wraps(function)
    def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with new():
            inner: Generator[Any, Any, Any] = function(*args, **kwargs)
            return (yield from inner)

    return generator


def _during_async_generator(new: _New, function: Callable[..., Any]) -> Any:
    @wraps(function)
    async def async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with new():
            # As `yield from` does.
            inner = function(*args, **kwargs)
            step = inner.__anext__()
            while True:
                try:
                    value = await step
                except StopAsyncIteration:
                    return
                try:
                    sent = yield value
                except GeneratorExit:
                    await inner.aclose()
                    raise
                except BaseException as error:
                    step = inner.athrow(error)
                else:
                    step = inner.asend(sent)

    return async_generator


# Functions of a kind, what they return, and how an override holds until that is done.
_KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any], bool], Callable[..., Any]], ...] = (
    (iscoroutinefunction, inspect.iscoroutine, _during_coroutine),
    (inspect.isgeneratorfunction, inspect.isgenerator, _during_generator),
    (inspect.isasyncgenfunction, inspect.isasyncgen, _during_async_generator),
)


def _recipe(resource: Resource[Any], stand_in: Any) -> Resource[Any]:
    keyed = resource.is_keyed
    if is_function(stand_in):
        factory = Factory.of(stand_in, keyed=keyed)
        if is_resource(stand_in):
            of = stand_in.resource.factory
            factory = replace(
                factory, name=of.name, declared_at=of.declared_at, function=of.function
            )
    elif isinstance(stand_in, UNFINISHED):
        name = printable_repr(cast(object, stand_in))
        if isinstance(stand_in, CoroutineType):
            stand_in.close()  # nobody is to be told that it was never awaited, too
        raise FactoryError(
            resource,
            f"was to be overridden by {name}, which has yet to run",
            "Give override() the function itself, without the parentheses of a call; or, where "
            "what it gives is the value, a list of that.",
        )
    else:
        factory = Factory.of(lambda *_: stand_in, keyed=keyed)
        factory = replace(factory, name=f"override of {resource.factory.name}")
    if resource.factory.is_async and not factory.is_async:
        factory = _made_async(factory)
    elif factory.is_async and not resource.factory.is_async:
        raise FactoryError(
            factory,
            f"is async and cannot stand in for {resource}, which is used without `await`",
            "Give it a sync factory, or a value.",
        )
    return Resource(factory, resource.lifetime, is_keyed=keyed)


def _made_async(factory: Factory) -> Factory:
    start = factory.start

    def start_async(*key: Any) -> tuple[Any, Awaitable[Any]]:
        generator, value = start(*key)
        return generator, _ready(value)

    return replace(factory, is_async=True, start=start_async)


async def _ready(value: Any) -> Any:
    return value
