"""
``Resource``, the frozen recipe, and the decorators that make one of a factory.

The decorators return a plain function, so that ``await db()`` costs one
closure's coroutine, and ``async_to_sync(db)`` works as for any other. Its
recipe is its attribute ``resource``.
"""

import sys
from asyncio import get_running_loop
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any, Generic, Protocol, TypeVar, cast, overload
from weakref import WeakSet

from scoped.factories import Factory
from scoped.lifespans import eager
from scoped.requests import scope_for
from scoped.scopes import Lifetime, current

__all__ = ["AsyncResource", "Resource", "SyncResource", "lifespan_scoped", "request_scoped"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Resource(Generic[T_co]):
    """What is known of a resource without setting it up. Never changes."""

    factory: Factory
    lifetime: Lifetime

    def __str__(self) -> str:
        return str(self.factory)


# For the system checks and `manage.py scoped`; one declared in a function ends with it.
declared: WeakSet[Resource[Any]] = WeakSet()


class AsyncResource(Protocol[T_co]):
    """What a decorator makes of an async factory: ``value = await db()``."""

    @property
    def resource(self) -> Resource[T_co]: ...

    def __call__(self) -> Coroutine[Any, Any, T_co]: ...


class SyncResource(Protocol[T_co]):
    """What a decorator makes of a sync factory: ``value = tenant()``."""

    @property
    def resource(self) -> Resource[T_co]: ...

    def __call__(self) -> T_co: ...


class _Decorator(Protocol):
    @overload
    def __call__(self, factory: Callable[[], AsyncIterator[T]], /) -> AsyncResource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], Awaitable[T]], /) -> AsyncResource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], Iterator[T]], /) -> SyncResource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], T], /) -> SyncResource[T]: ...


@overload
def request_scoped(factory: Callable[[], AsyncIterator[T]], /) -> AsyncResource[T]: ...
@overload
def request_scoped(factory: Callable[[], Awaitable[T]], /) -> AsyncResource[T]: ...
@overload
def request_scoped(factory: Callable[[], Iterator[T]], /) -> SyncResource[T]: ...
@overload
def request_scoped(factory: Callable[[], T], /) -> SyncResource[T]: ...
@overload
def request_scoped() -> _Decorator: ...


def request_scoped(factory: Callable[[], Any] | None = None, /) -> Any:
    """
    Make a resource that is set up once in each request, on first use, and torn
    down when the request ends.

    ``factory`` is a function, coroutine function, generator function or async
    generator function without required parameters; a generator yields the value
    once, and what follows the ``yield`` tears it down. If the request fails, the
    failure is raised at the ``yield``.

    Returns a function: ``await db()`` gives the value of an async factory,
    ``tenant()`` that of a sync one. It raises NoScopeError outside a request,
    ScopeClosedError after it, and what the factory raises.

    Raises FactoryError where ``factory`` is none.
    """
    if factory is None:
        return request_scoped
    return _declare(factory, Lifetime.REQUEST)


@overload
def lifespan_scoped(factory: Callable[[], AsyncIterator[T]], /) -> AsyncResource[T]: ...
@overload
def lifespan_scoped(factory: Callable[[], Awaitable[T]], /) -> AsyncResource[T]: ...
@overload
def lifespan_scoped(factory: Callable[[], Iterator[T]], /) -> SyncResource[T]: ...
@overload
def lifespan_scoped(factory: Callable[[], T], /) -> SyncResource[T]: ...
@overload
def lifespan_scoped(*, eager: bool = ...) -> _Decorator: ...


def lifespan_scoped(factory: Callable[[], Any] | None = None, /, *, eager: bool = False) -> Any:
    """
    Make a resource that is set up once in each event loop, on first use, and
    torn down when the server shuts down. See ``request_scoped`` for the rest.

    With ``eager=True`` it is set up at start-up; if that fails the server
    refuses to start. Its module must be imported by then: ``resources.py`` of an
    installed app is, where ``scoped`` is in ``INSTALLED_APPS``.
    """
    if factory is None:
        return partial(_declare, lifetime=Lifetime.LIFESPAN, is_eager=eager)
    return _declare(factory, Lifetime.LIFESPAN)


def _declare(function: Callable[[], Any], lifetime: Lifetime, is_eager: bool = False) -> Any:
    resource: Resource[Any] = Resource(Factory.of(function), lifetime)
    access = _ACCESS[resource.factory.is_async, lifetime](resource)
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(access, name, getattr(function, name))
    cast(Any, access).resource = resource
    declared.add(resource)
    if is_eager:
        eager.append(resource)
    return access


# The short way, for a value that is there: four times, because each differs where it must not pay
# for the others. All else, and what a factory asks for, goes the long way. An async value is for
# its own event loop only; which one runs is cheaper to learn from the thread before Python 3.12.

_BY_LOOP = sys.version_info >= (3, 12)

_get_current = cast("Callable[[], Any]", current.get)


def _async_of_request(resource: Resource[Any]) -> Callable[[], Any]:
    get_current = _get_current

    async def access() -> Any:
        scope = get_current()
        try:
            if scope.loop is get_running_loop():
                return scope.values[resource]
        except (KeyError, AttributeError):
            pass
        return await scope_for(resource).get(resource)

    async def access_by_thread() -> Any:
        scope = get_current()
        try:
            if scope.thread == get_ident():
                return scope.values[resource]
        except (KeyError, AttributeError):
            pass
        return await scope_for(resource).get(resource)

    return access if _BY_LOOP else access_by_thread


def _async_of_lifespan(resource: Resource[Any]) -> Callable[[], Any]:
    get_current = _get_current

    async def access() -> Any:
        try:
            lifespan = get_current().lifespan
            if lifespan.loop is get_running_loop():
                return lifespan.values[resource]
        except (KeyError, AttributeError):
            pass
        return await scope_for(resource).get(resource)

    async def access_by_thread() -> Any:
        try:
            lifespan = get_current().lifespan
            if lifespan.thread == get_ident():
                return lifespan.values[resource]
        except (KeyError, AttributeError):
            pass
        return await scope_for(resource).get(resource)

    return access if _BY_LOOP else access_by_thread


def _sync_of_request(resource: Resource[Any]) -> Callable[[], Any]:
    get_current = _get_current

    def access() -> Any:
        try:
            return get_current().values[resource]
        except (KeyError, AttributeError):
            pass
        return scope_for(resource).get_sync(resource)

    return access


def _sync_of_lifespan(resource: Resource[Any]) -> Callable[[], Any]:
    get_current = _get_current

    def access() -> Any:
        try:
            return get_current().lifespan.values[resource]
        except (KeyError, AttributeError):
            pass
        return scope_for(resource).get_sync(resource)

    return access


_ACCESS = {
    (True, Lifetime.REQUEST): _async_of_request,
    (True, Lifetime.LIFESPAN): _async_of_lifespan,
    (False, Lifetime.REQUEST): _sync_of_request,
    (False, Lifetime.LIFESPAN): _sync_of_lifespan,
}
