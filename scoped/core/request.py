"""
The request's scope, and which scope a resource's value is found in.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from scoped.core import observer
from scoped.core.calls import in_scope
from scoped.core.errors import LifetimeError, NoScopeError, ScopeClosedError, TeardownError
from scoped.core.lifespan import LifespanScope, lifespans
from scoped.core.record import SetUp
from scoped.core.release import others_released, releasing
from scoped.core.resource import Lifetime
from scoped.core.scope import Scope, current, scope_here
from scoped.core.waits import ForkSafeLock, current_task, run_without_loop, running_loop

if TYPE_CHECKING:
    from scoped.core.resource import Resource

__all__ = [
    "RequestScope",
    "ResponseScope",
    "ServedScope",
    "current_scope",
    "request_scope",
    "scope_for",
    "scope_holding",
]


P = ParamSpec("P")
R = TypeVar("R")

_lock = ForkSafeLock()


class RequestScope(Scope):
    __slots__ = ()

    lifetime = Lifetime.REQUEST
    owns_set_ups = True

    @property
    def tells_of_response(self) -> bool:
        """Whether whoever opened it calls ``end_response()``, or it has no response to send."""
        return True

    @property
    def is_in_use(self) -> object:
        """Whether there is anything to tear down, to wait for or to leave."""
        return (
            self.values
            or self.pending
            or self.latched
            or self.releases
            or self.response
            or self.lifespan
        )

    async def end_response(self) -> None:
        """
        Tear down what lives until the response, before its first byte is sent.
        Raises as ``close()`` does.
        """
        self.has_responded = True
        if (response := self.response) is None:
            return
        if self.sync_only:
            await response.close(self.failure)
        else:
            await others_released(self)
            with releasing(self):
                await response.close(self.failure)

    def until_response(self, resource: "Resource[Any]") -> Scope:
        """What holds a resource that lives until the response."""
        with _lock:  # threads may come at the same time
            if self.response is None:
                if not self.tells_of_response:
                    raise NoScopeError(
                        resource,
                        'It is declared with until="response", and this handler does not say when '
                        "the response is sent. Serve the project with get_asgi_application() of "
                        "scoped.asgi or get_wsgi_application() of scoped.wsgi; in tests use the "
                        "clients of scoped.testing.",
                    )
                self.response = ResponseScope(self)
        return self.response

    def open(
        self,
        *,
        sync_only: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Self:
        self._open(running_loop(), current_task())
        self.sync_only = sync_only
        if loop is not None:  # that of the sync code which opens it, and owns it no further
            self.loop, self.owner, self.thread = loop, None, 0
        self._find_lifespan()
        self.tell_of_opening()
        return self

    def _find_lifespan(self) -> None:
        around = self._previous.scope if isinstance(self._previous, SetUp) else self._previous
        lifespan = None if around is None else around.lifespan
        if (
            lifespan is None
            or not lifespan.is_open
            # Sync code may share its caller's; another event loop has one of its own.
            or (self.loop is not None and lifespan.loop is not self.loop)
        ):
            lifespan = lifespans.get(self.loop)
        if lifespan is not None and lifespan.join(self):
            self.lifespan = lifespan

    def need_lifespan(self, resource: "Resource[Any]") -> "LifespanScope":
        """The lifespan of this request; where nobody has opened one, one that ends with it."""
        while self.lifespan is None or self.lifespan.is_parents:
            new = LifespanScope.implied_by(self)
            lifespan = lifespans.setdefault(self.loop, new)
            if lifespan.join(self):
                self.lifespan = lifespan
                if lifespan is new:
                    if self.served:
                        lifespan.stay()
                    lifespan.tell_of_opening()
            elif lifespans.get(self.loop) is lifespan:  # the server shuts down
                raise ScopeClosedError(resource, lifespan)
        return self.lifespan

    async def _closed(self) -> None:
        if self.lifespan is not None:
            await self.lifespan.part(self, by_sync_code=self.sync_only or self.loop is None)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """As a decorator: a new scope for each call of a function or coroutine function."""
        return in_scope(RequestScope, function)

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._open(task.get_loop(), task)
        if lifespans:
            self._find_lifespan()
        if observer.observer is not None:
            self.tell_of_opening()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._state == "open" and not self.is_in_use:
            self._let_go(exc)
            self.leave()
            return
        try:
            await self.close(exc)
        except TeardownError as error:
            if exc is None or isinstance(exc, Exception):
                raise
            self.log(error)
        finally:
            self.leave()

    def __enter__(self) -> Self:
        return self.open(sync_only=True)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            run_without_loop(self._end(exc))
        finally:
            self.leave()


class ServedScope(RequestScope):
    """That of a request to a server."""

    __slots__ = ()

    served = True


class ResponseScope(Scope):
    """The part of a request's scope that closes before the response is sent."""

    __slots__ = ("around",)

    lifetime = Lifetime.RESPONSE
    owns_set_ups = True
    closed_hint = (
        "It lives until the response, so it is torn down before the first byte: use it in the view "
        'or in middleware, not in a streaming body; or declare it without until="response".'
    )

    def __init__(self, around: RequestScope) -> None:
        super().__init__(f"{around} until its response")
        self.around = around
        self.loop, self.owner, self.thread = around.loop, around.owner, around.thread
        self.sync_only = around.sync_only
        self._state = "open" if around.is_open and not around.has_responded else "closed"

    @property
    def visible(self) -> Scope:
        return self.around


def scope_for(resource: "Resource[Any]") -> Scope:
    """The open scope that holds, or is to hold, the resource's value."""
    here = current.get()
    if isinstance(here, SetUp):
        scope: Scope | None = here.scope.visible
        if not here.done:
            here.use(resource)
    else:
        scope = here
    if resource.lifetime is Lifetime.LIFESPAN:
        return _lifespan_for(resource, scope)
    if isinstance(scope, RequestScope):
        if resource.lifetime is Lifetime.REQUEST:
            return scope
        if not isinstance(here, SetUp) or here.scope is not scope:
            return scope.until_response(resource)
    if isinstance(here, SetUp):
        asker = here.resource
        lifetimes = asker.lifetime.value, resource.lifetime.value
        raise LifetimeError(asker, resource, *lifetimes, left_running=here.done)
    raise NoScopeError(resource)


def scope_holding(resource: "Resource[Any]") -> Scope | None:
    """The scope that holds the value of a request resource, if it is set up."""
    scope: Scope | None = scope_here()
    if scope is not None and resource.lifetime is Lifetime.RESPONSE:
        scope = scope.response
    return scope


def _lifespan_for(resource: "Resource[Any]", scope: Scope | None) -> Scope:
    if isinstance(scope, RequestScope) and scope.is_open:
        return scope.need_lifespan(resource)
    if isinstance(scope, LifespanScope) and scope.is_open:
        return scope
    # Code that has outlived a request, or never had one, may use what is there.
    if (lifespan := lifespans.get(running_loop())) is not None:
        return lifespan
    if scope is not None:
        raise ScopeClosedError(resource, scope)
    raise NoScopeError(resource)


def current_scope() -> Scope:
    """
    The scope that is open here: the request's, or the lifespan's outside any
    request. Raises NoScopeError where there is none.
    """
    scope = scope_here()
    if scope is None or not scope.is_open:
        raise NoScopeError
    return scope


def request_scope() -> RequestScope:
    """
    A new scope, to be opened with ``async with`` around what is not a request
    and yet wants request-scoped resources: a command, a task, a consumer, a
    test. With plain ``with`` it holds sync resources only. As a decorator of a function
    or coroutine function, ``@request_scope()``, it is a new one for each call.

    Leaving it raises TeardownError where a teardown failed; a cancellation, or
    another exception that is no Exception, comes first and the failure is logged.
    """
    return RequestScope("the request scope")
