"""
The decorators that make a resource of a factory.

They return a plain function, so that ``await db()`` costs one closure's coroutine, and
``async_to_sync(db)`` works as for any other. Its recipe is its attribute ``resource``.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast, final, overload

from scoped.core.access import async_access, sync_access
from scoped.core.errors import FactoryError
from scoped.core.factory import Factory
from scoped.core.keyed import keyed_async_access, keyed_sync_access
from scoped.core.lifespan import eager, lifespans
from scoped.core.resource import LIFESPAN, REQUEST, RESPONSE, Lifetime, Resource

__all__ = [
    "AsyncRequestResource",
    "AsyncResource",
    "KeyedAsyncResource",
    "KeyedSyncResource",
    "SyncRequestResource",
    "SyncResource",
    "is_resource",
    "lifespan_scoped",
    "request_scoped",
]

logger = logging.getLogger("scoped")

P = ParamSpec("P")
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


class KeyedAsyncResource(Protocol[P, T_co]):
    """
    What ``request_scoped(keyed=True)`` makes of an async factory: ``await lock("invoice-7")``.
    Arguments are positional, and hashable.
    """

    @property
    def resource(self) -> Resource[T_co]: ...

    def __call__(self, *key: P.args, **none: P.kwargs) -> Coroutine[Any, Any, T_co]: ...

    def get_nowait(self, *key: P.args, **none: P.kwargs) -> T_co:
        """As that of what is not keyed, for one set of arguments."""
        ...

    def release(self, *key: P.args, **none: P.kwargs) -> Coroutine[Any, Any, None]:
        """As that of what is not keyed, for one set of arguments."""
        ...


class KeyedSyncResource(Protocol[P, T_co]):
    """What ``request_scoped(keyed=True)`` makes of a sync factory: ``permission("edit")``."""

    @property
    def resource(self) -> Resource[T_co]: ...

    def __call__(self, *key: P.args, **none: P.kwargs) -> T_co: ...

    def release(self, *key: P.args, **none: P.kwargs) -> None:
        """As that of what is not keyed, for one set of arguments."""
        ...


@final
class _NotKnown:
    """
    Nothing's type. Where a checker knows nothing of what a factory is or returns, every overload
    fits, and pyright takes the first: so one for this comes first, and gives what may be anything.
    """


class _Decorator(Protocol):
    @overload
    def __call__(self, factory: Callable[[], _NotKnown], /) -> Any: ...
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
    def __call__(self, factory: Callable[[], _NotKnown], /) -> Any: ...
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


class _KeyedDecorator(Protocol):
    @overload
    def __call__(self, factory: Callable[P, _NotKnown], /) -> Any: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, factory: Callable[P, AsyncIterator[T]], /
    ) -> KeyedAsyncResource[P, T]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, factory: Callable[P, Awaitable[T]], /
    ) -> KeyedAsyncResource[P, T]: ...
    @overload
    def __call__(self, factory: Callable[P, Iterator[T]], /) -> KeyedSyncResource[P, T]: ...
    @overload
    def __call__(self, factory: Callable[P, T], /) -> KeyedSyncResource[P, T]: ...


@overload
def request_scoped(factory: Callable[[], _NotKnown], /) -> Any: ...
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
def request_scoped(
    *, until: Literal["response"] | None = ..., keyed: Literal[False] = ...
) -> _RequestDecorator: ...
@overload
def request_scoped(
    *, until: Literal["response"] | None = ..., keyed: Literal[True]
) -> _KeyedDecorator: ...


def request_scoped(
    factory: Callable[[], Any] | None = None,
    /,
    *,
    until: Literal["response"] | None = None,
    keyed: bool = False,
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

    With ``keyed=True`` the factory takes arguments, and there is one value for each
    set of them: ``await lock("invoice-7")``. They are positional and hashable, and
    1, 1.0 and True are one key. ``release()`` and ``get_nowait()`` take the same. No
    message, log or ``inspect()`` shows them.

    Returns a function: ``await db()`` gives the value of an async factory,
    ``tenant()`` that of a sync one. It raises NoScopeError outside a request,
    ScopeClosedError after it, and what the factory raises. Its ``release()`` gives
    the value back early; ``db.get_nowait()`` gives sync code what is set up.

    Raises FactoryError where ``factory`` is none, ValueError for another ``until``.
    """
    if until not in (None, "response"):
        raise ValueError(f"until is {until!r}. Leave it out, or make it 'response'.")
    lifetime = REQUEST if until is None else RESPONSE
    options = ['until="response"'] * (until is not None) + ["keyed=True"] * keyed
    made_by = "request_scoped" + f"({', '.join(options)})" * bool(options)
    declare = partial(_declare, made_by=made_by, lifetime=lifetime, keyed=keyed)
    return declare if factory is None else declare(factory)


@overload
def lifespan_scoped(factory: Callable[[], _NotKnown], /) -> Any: ...
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
    made_by = "lifespan_scoped(eager=True)" if eager else "lifespan_scoped"
    declare = partial(_declare, made_by=made_by, lifetime=LIFESPAN, is_eager=eager)
    return declare if factory is None else declare(factory)


def _declare(
    function: Callable[..., Any],
    made_by: str,
    lifetime: Lifetime,
    *,
    keyed: bool = False,
    is_eager: bool = False,
) -> Any:
    if isinstance(function, staticmethod):  # in a class's body: so it is to be had as one
        bare = cast(Any, function).__func__
        return staticmethod(_declare(bare, made_by, lifetime, keyed=keyed, is_eager=is_eager))
    if is_resource(function):
        raise FactoryError(
            getattr(function, "resource"),  # noqa: B009
            f"is a resource already, and @{made_by} was put upon it",
            "One decorator makes it a resource: leave out the other.",
        )
    resource: Resource[Any] = Resource(Factory.of(function, keyed=keyed), lifetime, keyed)
    Resource.declared.add(resource)
    factory = resource.factory
    if keyed:
        access = (keyed_async_access if factory.is_async else keyed_sync_access)(resource)
    else:
        access = (async_access if factory.is_async else sync_access)(resource)
    access.__module__ = factory.function.__module__
    access.__name__ = getattr(function, "__name__", factory.function.__name__)
    # All that a function's repr shows, and its coroutines', as when one was never awaited. Whoever
    # looks a function up by this name (pickle) does without: a class of our own, with a repr() of
    # its own, would make each access cost a quarter more.
    access.__qualname__ = f"{made_by} {factory.name}"
    access.__doc__ = factory.function.__doc__
    access.resource = resource
    if is_eager:
        eager.append(access)
        if any(lifespan.is_held for lifespan in list(lifespans.values())):
            logger.warning(
                "%s is declared with eager=True after start-up, too late to be set up then: it is "
                "on its first use. Import its module earlier: resources.py of an installed app is, "
                "where scoped is in INSTALLED_APPS.",
                resource,
            )
    return access


def is_resource(thing: object) -> bool:
    """Whether it is what a decorator has made, and not what somebody has wrapped that in."""
    resource = getattr(thing, "resource", None)
    return isinstance(resource, Resource) and not hasattr(thing, "__wrapped__")
