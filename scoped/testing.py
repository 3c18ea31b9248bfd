"""
For tests: Django's test clients, served by our handlers; ``override()``; and
``assert_no_leaks()``.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextvars import Context, copy_context
from copy import copy
from inspect import unwrap
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from django import test
from django.core.handlers.base import reset_urlconf
from django.core.signals import request_finished
from django.db import close_old_connections
from django.dispatch import Signal
from django.http.response import HttpResponseBase
from django.test.client import ClientHandler

from scoped.asgi import ScopedASGIHandler
from scoped.core.current import scope_here
from scoped.core.inspect import open_scopes, picture
from scoped.core.lifespan import lifespan_scope
from scoped.core.override import during_each_call, override
from scoped.core.request import RequestScope
from scoped.core.waits import outlast
from scoped.dispatch import Receiver
from scoped.serving.ending import twin_of
from scoped.serving.exchange import Message
from scoped.serving.handler import ScopedHandler, adopt
from scoped.serving.receivers import close_foreign, connect, note_failure, tells_of_response
from scoped.serving.threads import LentThread

__all__ = ["AsyncClient", "Client", "assert_no_leaks", "override"]

F = TypeVar("F", bound=Callable[..., Any])


class AsyncClient(test.AsyncClient):
    """
    Django's ``AsyncClient``, whose requests are served by ``ScopedASGIHandler``: each in a
    task and a request scope of its own, finished when ``get()`` and its like return.
    A streaming response's goes on until its body is read to the end or closed.

    In ``async with AsyncClient() as client:`` the lifespan is held open, as a server
    holds it: what is declared with ``eager=True`` is set up, and what is
    lifespan-scoped lives until the end. Otherwise it lives until the event loop ends.

    Takes what Django's takes. ``async_client_class = AsyncClient`` gives it to Django's
    ``TestCase`` classes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.handler: Any = AsyncClientHandler(self.handler.enforce_csrf_checks)
        self._held: list[lifespan_scope] = []  # it may be entered more than once

    async def __aenter__(self) -> Self:
        held = lifespan_scope()
        await held.__aenter__()
        self._held.append(held)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._held.pop().__aexit__(exc_type, exc, traceback)


class Client(test.Client):
    """
    Django's ``Client``, whose requests are served as by ``ScopedWSGIHandler``: for sync
    resources. A streaming response's scope stays open until its body is read to the end
    or ``response.close()`` is called.

    In ``with Client() as client:`` the lifespan is held open; otherwise what is
    lifespan-scoped lives as long as the request.

    Takes what Django's takes. ``client_class = Client`` gives it to Django's ``TestCase`` classes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        connect()
        self.handler: Any = WSGIClientHandler(self.handler.enforce_csrf_checks)
        self._held: list[lifespan_scope] = []  # it may be entered more than once

    def __enter__(self) -> Self:
        held = lifespan_scope()
        held.__enter__()
        self._held.append(held)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held.pop().__exit__(exc_type, exc, traceback)


class WSGIClientHandler(ScopedHandler, ClientHandler):
    """Django's, as ours."""

    def __call__(self, environ: dict[str, Any]) -> Any:
        around = scope_here()
        try:
            return super().__call__(environ)
        except BaseException as error:
            if scope_here() is not around:  # as under WSGI
                note_failure(error)
                close_foreign(sender=type(self))
            # Django's has disconnected it, to connect it again when all is well.
            request_finished.connect(close_old_connections)
            raise


tells_of_response.add(WSGIClientHandler)


def assert_no_leaks() -> "_NoLeaks":
    """
    Raise AssertionError at the end of the ``with`` where a request scope that was opened
    in it is still open, and so holds what it has set up: a stream that was neither
    read nor closed, a background task that still runs. Lifespans do not count. As a
    decorator of a function or coroutine function it looks at the end of each call.
    """
    return _NoLeaks()


class _NoLeaks:
    def __enter__(self) -> None:
        self.before = open_scopes()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        before, self.before = self.before, []
        if exc_type is not None:
            return
        left = [
            picture(scope, perf_counter())
            for scope in open_scopes()
            if isinstance(scope, RequestScope) and scope not in before
        ]
        if left:
            lines = [
                f"{one.name}, open for {one.seconds:.3f} s, holds: "
                f"{', '.join(one.resources) or '-'}"
                for one in left
            ]
            raise AssertionError(
                f"{len(left)} scope(s) still open. Read or close streams, await background "
                "tasks.\n" + "\n".join(lines)
            )

    def __call__(self, function: F) -> F:
        return during_each_call(assert_no_leaks, function, "assert_no_leaks")


# Event loops hold tasks weakly, and a test may drop a response that it has not read.
_open_requests: set[asyncio.Task[None]] = set()


class ASGIClientHandler(ScopedASGIHandler):
    """Shows its conversation the request and the response. A copy serves each request."""

    conversation: "_Conversation"

    def create_request(self, scope: Mapping[str, Any], body_file: Any) -> Any:
        request: Any
        request, error_response = super().create_request(scope, body_file)
        if request is not None:
            request._dont_enforce_csrf_checks = not self.conversation.enforce_csrf_checks
        self.conversation.request = request
        return request, error_response

    def receivers_of(self, signal: Signal) -> tuple[list[Receiver], list[Receiver]]:
        # The database connections are the test's own, with its transaction: as with Django's
        # clients they are left open.
        sync_receivers, async_receivers = super().receivers_of(signal)
        # Some monitoring wraps each receiver.
        sync_receivers = [one for one in sync_receivers if unwrap(one) is not close_old_connections]
        return sync_receivers, async_receivers

    def lend_thread(self) -> LentThread:
        # Where it is not the test's own, its connections end with the request: a test database
        # cannot be dropped while anybody is connected to it.
        return LentThread(lend_again=False)

    async def send_response(self, response: HttpResponseBase, send: Any) -> None:
        self.conversation.response = response
        self.conversation.context = copy_context()
        await super().send_response(response, send)


class AsyncClientHandler:
    """
    Takes an ASGI scope, returns the response. By then the request is finished,
    unless it streams from an async iterator: then it goes on as the test reads
    it, and finishes when the test has read or closed it. Should the test do
    neither, the end of its event loop cancels the request.
    """

    handler_class = ASGIClientHandler

    def __init__(self, enforce_csrf_checks: bool = True) -> None:
        self.enforce_csrf_checks = enforce_csrf_checks
        self.handler: ASGIClientHandler | None = None

    async def __call__(self, scope: dict[str, Any]) -> HttpResponseBase:
        if self.handler is None:  # not earlier: a test may override settings until its request
            self.handler = self.handler_class()
        payload = scope.pop("_body_file", None)
        body = b"" if payload is None else payload.read()
        conversation = _Conversation(body, self.enforce_csrf_checks)
        handler = copy(self.handler)  # the middleware is shared
        handler.conversation = conversation
        return await conversation.hold(handler, scope)


class _Conversation:
    """
    The client's side of one request. A message that the handler sends is done
    with when the client asks for the next one: so a stream runs no further than
    the test reads.
    """

    def __init__(self, body: bytes, enforce_csrf_checks: bool) -> None:
        self.body = body
        self.enforce_csrf_checks = enforce_csrf_checks
        self.request: Any = None
        self.response: Any = None
        self.context: Context | None = None  # the request's, when its response was there
        self.task: asyncio.Task[None] | None = None
        self.messages: asyncio.Queue[Message | None] = asyncio.Queue()  # None: no more
        self.reading = False  # a message has been taken and is not done with
        self.body_received = False
        self.hung_up = asyncio.Event()

    # The handler's side

    async def serve(self, handler: ASGIClientHandler, scope: dict[str, Any]) -> None:
        await handler.handle(scope, self.receive, self.send)

    async def receive(self) -> Message:
        if not self.body_received:
            self.body_received = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self.hung_up.is_set():  # servers drop it in silence then
            self.messages.put_nowait(message)
            await self.messages.join()

    # The client's side

    async def hold(self, handler: ASGIClientHandler, scope: dict[str, Any]) -> HttpResponseBase:
        self.task = asyncio.create_task(self.serve(handler, scope))
        _open_requests.add(self.task)
        self.task.add_done_callback(_open_requests.discard)
        self.task.add_done_callback(lambda _: self.messages.put_nowait(None))
        try:
            response = await self.converse()
        except BaseException:
            self.task.cancel()
            await outlast(self.task)
            raise
        assert self.context is not None  # there is a response
        # Django's client serves the request in the task of the test, which so sees what it sets.
        adopt(self.context)
        reset_urlconf(None)  # as at the end of each request
        return response

    async def converse(self) -> HttpResponseBase:
        assert self.task is not None
        if await self.next() is None:
            self.task.result()
            raise RuntimeError("The handler has returned, and sent no response.")
        response: Any
        if not self.response.streaming or self.bodyless:
            await self.read_to_the_end()
            response = twin_of(self.response)
            if self.bodyless:
                # The handler sends it, and servers drop it.
                setattr(response, "streaming_content" if response.streaming else "content", b"")
        elif self.response.is_async:
            response = twin_of(self.response)
            response.streaming_content = self.parts()
        else:
            response = twin_of(self.response)
            response.streaming_content = await self.parts_at_once()
        # Django's would send request_finished, and the handler sees to that.
        response.close = self.hung_up.set
        response.asgi_request = self.request
        return cast(HttpResponseBase, response)

    @property
    def bodyless(self) -> bool:
        status, request = self.response.status_code, self.request
        head = request is not None and request.method == "HEAD"
        return head or status < 200 or status in (204, 304)

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes. At its end the request is finished; what it raised is raised."""
        assert self.task is not None
        try:
            while (message := await self.next()) is not None:
                if message.get("more_body") or message.get("body"):
                    yield message["body"]
        finally:
            self.hung_up.set()
            if (cancellation := await outlast(self.task)) is not None:
                raise cancellation
            self.task.result()

    async def read_to_the_end(self) -> None:
        """A stream that nobody is sent (of a HEAD, say) may have none: then the client hangs up."""
        seconds = RequestScope.teardown_timeout if self.response.streaming else None
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                async for _ in self.parts():
                    pass
        except TimeoutError:
            if not limit.expired():
                raise

    async def parts_at_once(self) -> Iterator[bytes]:
        """
        As the handler itself has to do with a sync iterator. The test reads it
        without letting the event loop run, so the request cannot wait for it.
        """
        parts: list[bytes] = []
        failure: Exception | None = None
        try:
            parts = [part async for part in self.parts()]
        except Exception as error:
            failure = error

        def replay() -> Iterator[bytes]:
            if failure is not None:
                raise failure
            yield from parts

        return replay()

    async def next(self) -> Message | None:
        if self.reading:
            self.reading = False
            self.messages.task_done()
        message = await self.messages.get()
        self.reading = True
        return message
