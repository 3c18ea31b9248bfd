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
from typing import Any, Generic, Literal, Protocol, TypeVar, cast, overload
from weakref import WeakSet

from scoped import releases
from scoped.factories import Factory
from scoped.lifespans import eager
from scoped.requests import scope_for, scope_holding
from scoped.scopes import Lifetime, current

__all__ = [
    "AsyncRequestResource",
    "AsyncResource",
    "Resource",
    "SyncRequestResource",
    "SyncResource",
    "lifespan_scoped",
    "request_scoped",
]

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

    def get_nowait(self) -> T_co:
        """
        The value, if it is set up already: for sync code, which cannot await it.
        Raises AsyncResourceError if it is not.
        """
        ...


class SyncResource(Protocol[T_co]):
    """What a decorator makes of a sync factory: ``value = tenant()``."""

    @property
    def resource(self) -> Resource[T_co]: ...

    def __call__(self) -> T_co: ...


class AsyncRequestResource(AsyncResource[T_co], Protocol[T_co]):
    """What ``request_scoped`` makes of an async factory."""

    def release(self) -> Coroutine[Any, Any, None]:
        """
        Tear it down now, and before it what was set up with it, in reverse order;
        asked for again, it is set up anew. Does nothing where it is not set up.
        Raises TeardownError where a teardown fails, and AsyncResourceError outside
        the task that set it up.
        """
        ...


class SyncRequestResource(SyncResource[T_co], Protocol[T_co]):
    """What ``request_scoped`` makes of a sync factory."""

    def release(self) -> None:
        """
        Tear it down now, and before it what was set up with it, in reverse order;
        asked for again, it is set up anew. Does nothing where it is not set up.
        Raises TeardownError where a teardown fails, and AsyncResourceError outside
        the task or thread that set it up, or where something async uses it.
        """
        ...


class _Decorator(Protocol):
    @overload
    def __call__(self, factory: Callable[[], AsyncIterator[T]], /) -> AsyncResource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], Awaitable[T]], /) -> AsyncResource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], Iterator[T]], /) -> SyncResource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], T], /) -> SyncResource[T]: ...


class _RequestDecorator(Protocol):
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, factory: Callable[[], AsyncIterator[T]], /
    ) -> AsyncRequestResource[T]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, factory: Callable[[], Awaitable[T]], /
    ) -> AsyncRequestResource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], Iterator[T]], /) -> SyncRequestResource[T]: ...
    @overload
    def __call__(self, factory: Callable[[], T], /) -> SyncRequestResource[T]: ...


@overload
def request_scoped(  # type: ignore[overload-overlap]
    factory: Callable[[], AsyncIterator[T]], /
) -> AsyncRequestResource[T]: ...
@overload
def request_scoped(  # type: ignore[overload-overlap]
    factory: Callable[[], Awaitable[T]], /
) -> AsyncRequestResource[T]: ...
@overload
def request_scoped(factory: Callable[[], Iterator[T]], /) -> SyncRequestResource[T]: ...
@overload
def request_scoped(factory: Callable[[], T], /) -> SyncRequestResource[T]: ...
@overload
def request_scoped(*, until: Literal["response"] | None = ...) -> _RequestDecorator: ...


def request_scoped(
    factory: Callable[[], Any] | None = None, /, *, until: Literal["response"] | None = None
) -> Any:
    """
    Make a resource that is set up once in each request, on first use, and torn
    down when the request ends.

    ``factory`` is a function, coroutine function, generator function or async
    generator function without required parameters; a generator yields the value
    once, and what follows the ``yield`` tears it down. If the request fails, the
    failure is raised at the ``yield``.

    With ``until="response"`` it is torn down after the view and its middleware,
    before the first byte of the response: if that fails, the response becomes a
    500. For what must be known to be done when the client is told so, as a COMMIT.

    Returns a function: ``await db()`` gives the value of an async factory,
    ``tenant()`` that of a sync one. It raises NoScopeError outside a request,
    ScopeClosedError after it, and what the factory raises. Its ``release()`` gives
    the value back early; ``db.get_nowait()`` gives sync code what is set up.

    Raises FactoryError where ``factory`` is none, ValueError for another ``until``.
    """
    if until not in (None, "response"):
        raise ValueError(f"until is {until!r}. Leave it out, or make it 'response'.")
    lifetime = Lifetime.REQUEST if until is None else Lifetime.RESPONSE
    if factory is None:
        return partial(_declare, lifetime=lifetime)
    return _declare(factory, lifetime)


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
    declared.add(resource)
    make = _async_resource if resource.factory.is_async else _sync_resource
    access = make(resource)
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(access, name, getattr(function, name))
    access.resource = resource
    if is_eager:
        eager.append(access)
    return access


_get_current = cast("Callable[[], Any]", current.get)

# An async value is for its own event loop only. Which one runs is cheaper to learn from the thread
# before Python 3.12.
_BY_LOOP = sys.version_info >= (3, 12)

# Each has a short way, for a value that is there, which pays for nothing else. What is not there
# goes the long way, and so does what a factory asks for: scope_for() notes who asks.


def _async_resource(resource: Resource[Any]) -> Any:
    get_current = _get_current

    async def of_request() -> Any:
        scope = get_current()
        try:
            if scope.loop is get_running_loop():
                return scope.values[resource]
        except (KeyError, AttributeError):
            pass
        return await scope_for(resource).get(resource)

    async def of_request_by_thread() -> Any:
        scope = get_current()
        try:
            if scope.thread == get_ident():
                return scope.values[resource]
        except (KeyError, AttributeError):
            pass
        return await scope_for(resource).get(resource)

    async def of_lifespan() -> Any:
        try:
            lifespan = get_current().lifespan
            if lifespan.loop is get_running_loop():
                return lifespan.values[resource]
        except (KeyError, AttributeError):
            pass
        return await scope_for(resource).get(resource)

    async def of_lifespan_by_thread() -> Any:
        try:
            lifespan = get_current().lifespan
            if lifespan.thread == get_ident():
                return lifespan.values[resource]
        except (KeyError, AttributeError):
            pass
        return await scope_for(resource).get(resource)

    async def of_response() -> Any:
        return await scope_for(resource).get(resource)

    def get_nowait() -> Any:
        return scope_for(resource).get_nowait(resource)

    async def release() -> None:
        if (scope := scope_holding(resource)) is not None:
            await releases.release(scope, resource)

    def stand_in(other: Resource[Any]) -> None:
        nonlocal resource
        resource = other

    if resource.lifetime is Lifetime.REQUEST:
        access: Any = of_request if _BY_LOOP else of_request_by_thread
    elif resource.lifetime is Lifetime.LIFESPAN:
        access = of_lifespan if _BY_LOOP else of_lifespan_by_thread
    else:
        access = of_response
    access.get_nowait, access.stand_in = get_nowait, stand_in
    if resource.lifetime is not Lifetime.LIFESPAN:
        access.release = release
    return access


def _sync_resource(resource: Resource[Any]) -> Any:
    get_current = _get_current

    def of_request() -> Any:
        try:
            return get_current().values[resource]
        except (KeyError, AttributeError):
            pass
        return scope_for(resource).get_sync(resource)

    def of_lifespan() -> Any:
        try:
            return get_current().lifespan.values[resource]
        except (KeyError, AttributeError):
            pass
        return scope_for(resource).get_sync(resource)

    def of_response() -> Any:
        return scope_for(resource).get_sync(resource)

    def release() -> None:
        if (scope := scope_holding(resource)) is not None:
            releases.release_sync(scope, resource)

    def stand_in(other: Resource[Any]) -> None:
        nonlocal resource
        resource = other

    access: Any = {
        Lifetime.REQUEST: of_request,
        Lifetime.LIFESPAN: of_lifespan,
        Lifetime.RESPONSE: of_response,
    }[resource.lifetime]
    access.stand_in = stand_in
    if resource.lifetime is not Lifetime.LIFESPAN:
        access.release = release
    return access
