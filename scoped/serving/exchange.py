"""
One request and its response: the child task that serves it, and the server's task, which
waits for it and for the client to go away.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from asgiref.sync import AsyncToSync, ThreadSensitiveContext
from django.core.cache import caches, close_caches
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIRequest, get_script_prefix
from django.core.handlers.base import reset_urlconf
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, reset_queries
from django.http.response import HttpResponseBase
from django.urls import set_script_prefix

from scoped.core.current import scope_here
from scoped.core.request import RequestScope
from scoped.core.waits import hop, outlast, wake
from scoped.dispatch import (
    Outcome,
    Receiver,
    await_all,
    call_all,
    call_in_turn,
    log_errors,
    raise_first,
)
from scoped.serving.handler import close_resources, close_stream
from scoped.serving.receivers import (
    close,
    close_foreign,
    end_response,
    open_foreign,
)
from scoped.serving.threads import LentThread

if TYPE_CHECKING:
    from scoped.asgi import ScopedASGIHandler

__all__ = ["Exchange", "Message", "Receive", "Send"]

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Exchange:
    """One request and its response: the child task's work, and what its supervisor knows."""

    def __init__(
        self, handler: "ScopedASGIHandler", scope: dict[str, Any], body_file: Any, send: Send
    ) -> None:
        self.handler = handler
        self.scope = scope
        self.body_file = body_file
        self.send = send
        self.listener: asyncio.Task[None] | None = None
        self.response: Any = None  # Django's, of which much is private
        self.cancelled = False
        self.was_streaming = False  # when it was cancelled
        self.client_gone = False
        self.sent = 0  # messages
        self.sent_last = False  # the response's last message is with the server
        self.finishing = False
        self.stray: BaseException | None = None  # what a message that must not come led to
        self.problems: list[BaseException] = []  # raised after the request failed, or ended
        self.request: ASGIRequest | None = None
        self.thread: LentThread | None = None

    # In the server's task

    async def supervise(self, receive: Receive) -> None:
        loop = asyncio.get_running_loop()
        child = asyncio.create_task(self.run())
        cancellation: asyncio.CancelledError | None = None
        turns = 0
        while not child.done():
            try:
                if not turns:
                    # A request that never waits is over after its first turn: nobody need listen.
                    turns = 1
                    await asyncio.sleep(0)
                    continue
                if self.listener is None and not self.finishing:
                    listen = self.handler.listen_for_disconnect(receive)
                    self.listener = asyncio.create_task(listen)
                    self.listener.add_done_callback(partial(self.heard, child))
                over = loop.create_future()
                child.add_done_callback(partial(wake, over))
                await over
            except asyncio.CancelledError as error:
                cancellation = error
                self.cancel(child)
        if self.listener is not None:
            self.listener.cancel()
            cancellation = await outlast(self.listener) or cancellation
        failure, stray = None if child.cancelled() else child.exception(), self.stray
        try:
            if cancellation is not None:
                raise_first([cancellation, failure])
            if stray is not None:
                raise_first([stray, failure])
            if not (self.client_gone and child.cancelled()):
                child.result()
        finally:
            self.stray = None
            del cancellation, stray, failure  # no cycle with this frame

    def heard(self, child: "asyncio.Task[None]", listener: "asyncio.Task[None]") -> None:
        """The client has gone, or sent what it must not."""
        if listener.cancelled():
            return
        error = listener.exception()
        if isinstance(error, RequestAborted):
            # Servers report a completed exchange as a disconnect too: that is no failure.
            if not self.sent_last and not self.finishing:
                self.client_gone = True
                self.cancel(child)
        elif error is not None and not self.finishing:
            self.stray = error
            self.cancel(child)

    def cancel(self, child: "asyncio.Task[None]") -> None:
        if not self.cancelled and not self.finishing:
            self.cancelled = True
            self.was_streaming = self.sent > 0
            child.cancel()

    # In the child task

    async def run(self) -> None:
        if getattr(AsyncToSync.executors, "current", None) is None:
            self.thread = LentThread()
        # Else sync code, a test's say, waits for this request, and what is sync runs in its thread.
        try:
            async with ThreadSensitiveContext(executor=self.thread):
                await self.run_in_context()
        finally:
            if self.thread is not None:
                self.thread.give_back()

    async def run_in_context(self) -> None:
        around, request_scope = scope_here(), None
        sync_parent = getattr(AsyncToSync.executors, "current", None)
        failure: BaseException | None = None
        try:
            set_script_prefix(get_script_prefix(self.scope))
            try:
                await self.start()
            finally:
                opened = scope_here()
                if opened is not around and isinstance(opened, RequestScope):
                    request_scope = opened  # else a cancellation came before our receiver
            await self.respond(request_scope)
        except BaseException as error:
            failure = error
        # A sync view that was cancelled while it ran async code leaves the executor of that
        # moment behind in this Context: the hops to come would find it broken.
        if getattr(AsyncToSync.executors, "current", None) is not sync_parent:
            AsyncToSync.executors.current = sync_parent
        await self.finish(request_scope, failure)

    async def start(self) -> None:
        sender, named = type(self.handler), {"scope": self.scope}
        sync_receivers, async_receivers = self.handler.receivers_of(request_started)
        if self.thread is not None and _only_tidy(sync_receivers):
            # They tidy the thread: so it is enough that they do when it is taken.
            self.thread.tidy = partial(self.tidy, sync_receivers)
            sync_receivers = []
        outcomes = await call_in_turn(
            sync_receivers, async_receivers, request_started, sender, named
        )
        raise_first(error for _, _, error in outcomes)

    def tidy(self, receivers: Iterable[Receiver]) -> None:
        """In the request's thread: call receivers of request_started, late."""
        outcomes: list[Outcome] = []
        call_all(receivers, outcomes, request_started, type(self.handler), {"scope": self.scope})
        log_errors(outcomes)

    async def respond(self, request_scope: RequestScope | None) -> None:
        request, error_response = self.handler.create_request(self.scope, self.body_file)
        if request is None:
            if request_scope is not None:
                await request_scope.end_response()  # receivers may have used it
            self.body_file.close()
            self.response = error_response
        else:
            self.request = request
            self.response = await self.handler.run_get_response(request)
        await self.handler.send_response(self.response, self.forward)

    async def forward(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.sent_last = True
        elif self.client_gone and self.was_streaming:
            # Its body has swallowed the cancellation, or Python 3.11's wait_for() has: nobody reads
            # what it sends, and without this it might go on for ever.
            raise asyncio.CancelledError
        await self.send(message)
        self.sent += 1
        if self.sent % 64 == 0:
            # Once the client has gone, the send() of most servers does not suspend. A stream that
            # does not either would never let us hear of it, nor let anybody else run.
            await asyncio.sleep(0)

    async def finish(
        self, request_scope: RequestScope | None, failure: BaseException | None
    ) -> None:
        """
        The start in reverse: async receivers of ``request_finished``, so that the
        scope closes while the request's connections still work; then, in the
        request's thread, the response's closers and the sync receivers. Every
        step is taken, whatever the others raise.
        """
        self.finishing = True
        if self.listener is not None:
            self.listener.cancel()
        task = asyncio.current_task()
        while task is not None and task.cancelling():
            task.uncancel()  # so that timeouts and task groups work in teardowns
        if failure is not None and request_scope is not None and request_scope.failure is None:
            request_scope.failure = failure
        gone = isinstance(failure, asyncio.CancelledError)
        if self.thread.is_busy if self.thread is not None else gone:
            # A sync view runs on in its thread: do not tear down under it.
            await self.attempt(hop(_nothing))
        sync_receivers, async_receivers = self.handler.receivers_of(request_finished)
        if self.response is not None:
            await self.attempt(close_stream(self.response))
            if _closes_itself(self.response):
                sync_receivers, async_receivers = [], []  # its close() calls them all
        if request_scope is not None and not request_scope.has_responded:
            await self.attempt(end_response(request_scope))
        # In reverse, so that what was opened first, as our scope, is closed last.
        await self.attempt(self.call_async(reversed(async_receivers)))
        if request_scope is not None:
            await self.attempt(close(request_scope))
        if self.needs_thread(sync_receivers):
            await self.attempt(hop(partial(self.call_sync, sync_receivers)))
        elif self.response is not None:
            close_resources(self.response)
        if self.client_gone and isinstance(failure, asyncio.CancelledError):
            failure = None
        try:
            # A cancellation, if any, before all else; the failure before what it led to.
            raise_first(
                sorted(
                    [failure, *self.problems],
                    key=lambda error: not isinstance(error, asyncio.CancelledError),
                )
            )
        finally:
            del failure
            self.problems.clear()

    def needs_thread(self, sync_receivers: list[Receiver]) -> bool:
        """Whether anything is left to do that must, or had better, be done in the thread."""
        if self.thread is None or self.thread.is_taken or not _only_tidy(sync_receivers):
            return True
        if any(True for _ in caches.all(initialized_only=True)):
            return True  # close_caches() may have to wait for a server
        if self.response is None:
            return False
        request = self.request
        trivial = (
            request.close
            if request is not None
            and type(request).close is ASGIRequest.close
            and not hasattr(request, "_files")
            else None
        )
        return _closes_itself(self.response) or any(
            closer != trivial for closer in self.response._resource_closers
        )

    async def attempt(self, step: Awaitable[None]) -> None:
        try:
            await step
        except BaseException as error:
            self.problems.append(error)

    async def call_async(self, receivers: Iterable[Receiver]) -> None:
        outcomes: list[Outcome] = []
        try:
            await await_all(receivers, outcomes, request_finished, type(self.handler))
        finally:
            self.note(outcomes)

    def call_sync(self, receivers: Iterable[Receiver]) -> None:
        """In the request's thread: end the response, then call the receivers."""
        if self.response is not None:
            if _closes_itself(self.response):
                self.response._handler_class = type(self.handler)
                self.response.close()
            else:
                close_resources(self.response)
        outcomes: list[Outcome] = []
        call_all(receivers, outcomes, request_finished, type(self.handler))
        self.note(outcomes)

    def note(self, outcomes: Iterable[Outcome]) -> None:
        self.problems.extend(error for _, _, error in outcomes if error is not None)


def _nothing() -> None: ...


# Of Django's and our own receivers: all that they do is to tidy the thread that they run in, or a
# Context that ends with the request.
_TIDY = {
    *(reset_queries, close_old_connections, close_caches, reset_urlconf),
    *(open_foreign, close_foreign),
}


def _only_tidy(receivers: list[Receiver]) -> bool:
    return _TIDY.issuperset(receivers)


def _closes_itself(response: Any) -> bool:
    """
    Whether its ``close()`` is not Django's own. That must be called as it is, and
    at its end sends ``request_finished``, to sync and async receivers alike.
    """
    cls = cast("type[HttpResponseBase]", type(response))
    return cls.close is not HttpResponseBase.close or "close" in vars(response)
