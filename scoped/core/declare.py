"""
The decorators that make a resource of a factory.

They return a plain function, so that ``await db()`` costs one closure's coroutine, and
``async_to_sync(db)`` works as for any other. Its recipe is its attribute ``resource``.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, overload

from scoped.core.access import async_access, sync_access
from scoped.core.factory import Factory
from scoped.core.lifespan import eager
from scoped.core.resource import Lifetime, Resource

__all__ = [
    "AsyncRequestResource",
    "AsyncResource",
    "SyncRequestResource",
    "SyncResource",
    "lifespan_scoped",
    "request_scoped",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


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
    Resource.declared.add(resource)
    make = async_access if resource.factory.is_async else sync_access
    access = make(resource)
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(access, name, getattr(function, name))
    access.resource = resource
    if is_eager:
        eager.append(access)
    return access
