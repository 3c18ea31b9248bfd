"""The request's scope, and the boundary in it: the moment before the first byte."""

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from scoped.core import observer
from scoped.core.calls import in_scope
from scoped.core.errors import NoScopeError, ScopeClosedError
from scoped.core.lifespan import LifespanScope, lifespans, of_whose_factory
from scoped.core.resource import REQUEST, RESPONSE
from scoped.core.scope import Scope
from scoped.core.teardown import end_all, raise_all
from scoped.core.unserved import tell_of_no_server
from scoped.core.waits import current_task, run_without_loop, running_loop

if TYPE_CHECKING:
    from scoped.core.resource import Resource

__all__ = ["RequestScope", "ServedScope", "request_scope"]

P = ParamSpec("P")
R = TypeVar("R")


class RequestScope(Scope):
    __slots__ = ()

    lifetime = REQUEST
    owns_set_ups = True
    tells_own_cancellation = True
    expects_lifespan = False  # of the server

    @property
    def tells_of_response(self) -> bool:
        """Whether whoever opened it calls ``end_response()``, or it has no response to send."""
        return True

    @property
    def is_in_use(self) -> object:
        """Whether there is anything to tear down, to wait for or to leave."""
        return self.records or self.ending or self.lifespan

    @property
    def has_boundary(self) -> bool:
        """Whether anything in it lives until the response."""
        for record in list(self.records.values()):  # noqa: SIM110 (any() is slower)
            if record.resource.lifetime is RESPONSE:
                return True
        return False

    def check_response(self, resource: "Resource[Any]") -> None:
        if not self.tells_of_response:
            raise NoScopeError(
                resource,
                'It is declared with until="response", and this handler does not say when '
                "the response is sent. Serve the project with get_asgi_application() of "
                "scoped.asgi or get_wsgi_application() of scoped.wsgi; in tests use the "
                "clients of scoped.testing.",
            )

    async def end_response(self) -> None:
        """
        Tear down what lives until the response, before its first byte is sent.
        Raises as ``close()`` does.
        """
        if (rest := self.begin_to_respond()) is not None:
            await rest

    def begin_to_respond(self) -> Coroutine[Any, Any, None] | None:
        """As ``end_response()``, of which it returns what is to be awaited, if anything is."""
        self.has_responded = True
        if not self.has_boundary and not self.ending:
            return None
        return self._end_response()

    async def _end_response(self) -> None:
        problems: list[BaseException] = []
        for rest in end_all(self, RESPONSE, self.failure, problems):
            await rest
        if problems:
            raise_all(self, problems)

    def open(
        self,
        *,
        sync_only: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Self:
        # Where it is of sync code, not even a task at hand runs async factories.
        is_owned = not sync_only and loop is None
        self._open(running_loop(), current_task() if is_owned else None)
        self.sync_only = sync_only
        if loop is not None:  # that of the sync code which opens it
            self.loop, self.thread = loop, 0
        if lifespans:
            self._find_lifespan()
        if observer.observer is not None:
            self.tell_of_opening()
        return self

    def _find_lifespan(self) -> None:
        lifespan = None
        if self.around is not None:
            if (mine := of_whose_factory(self.around, self.loop)) is not None:
                self.lifespan = mine.scope.lifespan
                return
            lifespan = self.around.scope.lifespan
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
            if (mine := of_whose_factory(self.around, self.loop)) is not None:
                self.lifespan = mine.scope.lifespan  # it closes, and takes no requests
                continue
            lifespan, new = lifespans.get(self.loop), None
            if lifespan is None:
                new = LifespanScope.implied_by(self)
                lifespan = lifespans.setdefault(self.loop, new)
                if lifespan is not new:
                    new.withdraw()
            if lifespan.join(self):
                self.lifespan = lifespan
                if lifespan is new:
                    if self.served:
                        lifespan.stay()
                        if self.expects_lifespan:
                            tell_of_no_server()
                    lifespan.tell_of_opening()
                # Since the look another thread may have closed the request, and not seen that.
                if not self.is_open:
                    if (rest := lifespan.part(self, can_wait=False)) is not None:
                        run_without_loop(rest)
                    raise ScopeClosedError(resource, self)
            # Else it has gone since the look, and another thread was the last to use it.
            elif lifespans.get(self.loop) is lifespan:  # pragma: no branch (a thread's doing)
                raise ScopeClosedError(resource, lifespan)  # the server shuts down
        return self.lifespan

    def _closed(self) -> Coroutine[Any, Any, None] | None:
        assert self.lifespan is not None
        return self.lifespan.part(self, can_wait=self.loop is not None and not self.sync_only)

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
        try:
            if exc is None or isinstance(exc, Exception):
                for rest in self.begin_close(exc):
                    await rest
            else:
                await self.end(exc)
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
            run_without_loop(self.end(exc))
        finally:
            self.leave()


class ServedScope(RequestScope):
    """That of a request to a server."""

    __slots__ = ()

    served = True
    expects_lifespan = True


def request_scope() -> RequestScope:
    """
    A new scope, to be opened with ``async with`` around what is not a request
    and yet wants request-scoped resources: a command, a task, a consumer, a
    test. With plain ``with`` it holds sync resources only. As a decorator of a function
    or coroutine function, ``@request_scope()``, it is a new one for each call.

    Leaving it raises TeardownError where a teardown failed; a cancellation, or
    another exception that is no Exception, comes first and the failure is logged. What a
    factory's own timeout or task group cancels has failed: its error is in a TeardownError.
    """
    return RequestScope("the request scope")
