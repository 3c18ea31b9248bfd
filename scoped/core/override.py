"""``override``: another factory, or a value, in a resource's place, in a test."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import wraps
from threading import Lock
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from scoped.core.declare import AsyncResource, SyncResource
from scoped.core.errors import FactoryError
from scoped.core.factory import Factory
from scoped.core.resource import Resource

__all__ = ["overridden", "override"]

F = TypeVar("F", bound=Callable[..., Any])

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
    set up.

    May be nested, the last one counts; undone also when the body raises. As a
    decorator of a function or a coroutine function it holds during each call.

    Raises TypeError where the first argument is no resource, FactoryError where
    ``stand_in`` is async and the resource is not, or is no factory.
    """

    def __init__(
        self, resource: AsyncResource[Any] | SyncResource[Any], stand_in: object, /
    ) -> None:
        if not isinstance(getattr(resource, "resource", None), Resource):
            raise TypeError(
                f"override() was given {resource!r} to replace. Give it what @request_scoped or "
                "@lifespan_scoped has made."
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
            recipes = _in_force[self._access]
            recipes.remove(self._recipe)
            self._access.stand_in(recipes[-1] if recipes else self._access.resource)
            if not recipes:
                del _in_force[self._access]

    def __call__(self, function: F) -> F:
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                with override(self._access, self._stand_in):
                    return await function(*args, **kwargs)

            return cast(F, call_async)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with override(self._access, self._stand_in):
                return function(*args, **kwargs)

        return cast(F, call)


def overridden() -> list[Resource[Any]]:
    """The resources that something stands in for right now."""
    with _lock:
        return [access.resource for access in _in_force]


def _recipe(resource: Resource[Any], stand_in: object) -> Resource[Any]:
    if inspect.isroutine(stand_in):
        factory = Factory.of(stand_in)
    else:
        factory = replace(Factory.of(lambda: stand_in), name=f"override of {resource.factory.name}")
    if resource.factory.is_async and not factory.is_async:
        factory = _made_async(factory)
    elif factory.is_async and not resource.factory.is_async:
        raise FactoryError(
            factory,
            f"is async and cannot stand in for {resource}, which is used without `await`",
            "Give it a sync factory, or a value.",
        )
    return Resource(factory, resource.lifetime)


def _made_async(factory: Factory) -> Factory:
    start, finish = factory.start, factory.finish

    def start_async() -> tuple[Any, Awaitable[Any]]:
        generator, value = start()
        return generator, _ready(value)

    return replace(factory, is_async=True, start=start_async, finish=finish)


async def _ready(value: Any) -> Any:
    return value
