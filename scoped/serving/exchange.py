"""
One request and its response, in a task of its own: from ``request_started`` to the end
of ``request_finished``.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

from asgiref.sync import AsyncToSync
from django.core.cache import caches
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIRequest, get_script_prefix
from django.core.signals import request_finished, request_started
from django.dispatch import Signal
from django.urls import set_script_prefix

from scoped.core.errors import TeardownError, nobodys_cancellation
from scoped.core.names import printable_repr
from scoped.core.request import RequestScope
from scoped.core.waits import hop, sync_parent
from scoped.dispatch import Outcome, Receiver, call_all, call_in_turn, log_errors, raise_first
from scoped.serving.background import begin_waiting, drop_waiting
from scoped.serving.bounds import in_thread, in_time, sync_code_ended
from scoped.serving.caches import caches_have_to_be_closed
from scoped.serving.ending import (
    close_resources,
    close_response,
    close_stream,
    closes_itself,
    drop_stream,
    in_place_of,
)
from scoped.serving.handler import page_in_thread
from scoped.serving.receivers import end, end_response, only_tidy, open_scope
from scoped.serving.streams import LongStream
from scoped.serving.threads import LentThread

if TYPE_CHECKING:
    from scoped.asgi import ScopedASGIHandler

__all__ = ["Exchange", "Message", "Receive", "Send"]

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Exchange:
    """
    ``begin()`` starts it, ``listen()`` and ``cut_off()`` are for the task that waits for
    it. All else happens in its own task.
    """

    def __init__(
        self, handler: "ScopedASGIHandler", scope: dict[str, Any], body_file: Any, send: Send
    ) -> None:
        self.handler = handler
        self.scope = scope
        self.body_file = body_file
        self.send = send
        self.listener: asyncio.Task[None] | None = None
        self.response: Any = None  # Django's, of which much is private
        self.cancelled = False  # by the client or the server
        self.was_streaming = False  # when it was cancelled
        self.client_gone = False
        self.sent = 0  # messages
        self.sent_last = False  # the response's last message is with the server
        self.starting = False
        self.finishing = False
        self.stray: BaseException | None = None  # what a message that must not come led to
        self.problems: list[BaseException] = []  # raised after the request failed, or ended
        self.request: ASGIRequest | None = None
        self.thread: LentThread | None = None
        self.long_stream: LongStream | None = None
        self.is_new = True  # its task has yet to take its first step

    # For the server's task

    def begin(self) -> "asyncio.Task[None]":
        server = asyncio.current_task()
        assert server is not None
        self.server, self.cancelled_before = server, server.cancelling()
        loop = server.get_loop()
        is_plain = loop.get_task_factory() is None and not _is_wrapped(loop.create_task)
        if sys.version_info >= (3, 12) and is_plain:  # as mypy reads it on 3.11
            # A request that never waits is over when this returns.
            return asyncio.Task(self.run(), loop=loop, eager_start=True)
        self.task = loop.create_task(self.run())
        return self.task

    def listen(self, receive: Receive) -> None:
        if not self.finishing and not self.cancelled:
            self.listener = asyncio.create_task(self.handler.listen_for_disconnect(receive))
            self.listener.add_done_callback(self.heard)

    def heard(self, listener: "asyncio.Task[None]") -> None:
        """The client has gone, or sent what it must not."""
        if listener.cancelled():
            return
        error = listener.exception()
        if isinstance(error, RequestAborted):
            # Servers report a completed exchange as a disconnect too: that is no failure.
            if not self.sent_last and not self.finishing:
                self.client_gone = True
                self.client_cuts_off()
        elif error is not None and not self.finishing:
            self.stray = error
            self.client_cuts_off()

    def client_cuts_off(self) -> None:
        """Not before all have heard that it starts, as under Django: they hear of its end, too."""
        if not self.starting:
            self.cut_off()

    def cut_off(self) -> None:
        """The client or the server cancels: once, and never what is finishing."""
        if not self.cancelled and not self.finishing:
            self.cancelled = True
            self.was_streaming = self.sent > 0
            self.task.cancel()

    # In the request's task

    async def run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task, self.is_new = task, False
        # Where sync code, a test's say, waits for this request, what is sync runs in its thread.
        if (parent := sync_parent()) is None:
            self.thread = self.handler.lend_thread()
        with self.thread or nullcontext():
            request_scope = open_scope(type(self.handler), self.scope)
            failure: BaseException | None = None
            try:
                set_script_prefix(get_script_prefix(self.scope))
                receivers = self.receivers_at_start()
                if any(receivers):
                    await self.start(*receivers)
                await self.respond(request_scope)
            except BaseException as error:
                failure = error
            seen = request_scope.failure or failure
            # A sync view that was cancelled while it ran async code leaves the executor of that
            # moment behind in this Context: the hops to come would find it broken.
            may_be_left = self.thread is None or self.thread.is_taken or seen is not None
            if may_be_left and sync_parent() is not parent:
                AsyncToSync.executors.current = parent
            if self.thread is not None and (
                self.cancelled or failure is not None or isinstance(seen, asyncio.CancelledError)
            ):
                self.thread.lend_again = False  # what its code would have cleaned is still there
            await self.finish(request_scope, failure)

    def receivers_at_start(self) -> tuple[list[Receiver], list[Receiver]]:
        """The sync and the async ones that are to be called before the request is answered."""
        sync_receivers, async_receivers = self.handler.receivers_of(request_started)
        if self.thread is not None and only_tidy(sync_receivers):
            # They tidy the thread: so it is enough that they do when it is taken.
            self.thread.tidy = partial(self.tidy, sync_receivers, request_started)
            sync_receivers = []
        return sync_receivers, async_receivers

    async def start(self, sync_receivers: list[Receiver], async_receivers: list[Receiver]) -> None:
        sender, named = type(self.handler), {"scope": self.scope}
        self.starting = True
        outcomes = await call_in_turn(
            sync_receivers, async_receivers, request_started, sender, named
        )
        self.starting = False
        raise_first(error for _, _, error in outcomes)
        if self.client_gone or self.stray is not None:  # meanwhile: nobody wants an answer
            self.cancelled = True
            raise asyncio.CancelledError

    def tidy(self, receivers: Iterable[Receiver], signal: Signal) -> None:
        """In the request's thread: call receivers which tidy it, late."""
        outcomes: list[Outcome] = []
        named = {"scope": self.scope} if signal is request_started else {}
        call_all(receivers, outcomes, signal, type(self.handler), named)
        log_errors(outcomes)

    # The response

    async def respond(self, request_scope: RequestScope) -> None:
        request, error_response = self.handler.create_request(self.scope, self.body_file)
        if request is None:
            await request_scope.end_response()  # receivers may have used it
            self.body_file.close()
            self.response = error_response
        else:
            self.request = request
            await self.answer(request, request_scope)
        if self.response.streaming:
            self.long_stream = LongStream(request_scope)
            self.long_stream.watch()
        await self.handler.send_response(self.response, self.forward)

    async def answer(self, request: ASGIRequest, request_scope: RequestScope) -> None:
        """Have the response made, and tear down what lives until then. Failures are pages."""
        request_scope.request = request
        failure: BaseException | None = None
        try:
            self.response = await self.handler.run_get_response(request)
            if self.thread is not None and self.thread.is_busy and request_scope.has_boundary:
                await sync_code_ended(self.thread, request_scope)
            if (rest := request_scope.begin_to_respond()) is not None:
                await rest
            begin_waiting(request_scope)
        except TeardownError as error:
            failure = error
        except asyncio.CancelledError as error:
            if self.is_cut_off():
                raise
            failure = await self.own_failure(request_scope, error)
        if failure is not None:
            try:
                page: Any = await page_in_thread(request, failure, has_waited=True)
            finally:
                del failure  # no cycle with this frame
            if self.response is not None:
                await drop_stream(self.response, request_scope)
                page = in_place_of(self.response, page)
            page._handler_class = type(self.handler)
            self.response = page

    def is_cut_off(self) -> bool:
        """
        Whether client or server have cancelled it. When an event loop ends, all its tasks are
        cancelled at once: this one may hear of it before the server's passes it on.
        """
        return self.cancelled or self.server.cancelling() > self.cancelled_before

    async def own_failure(
        self, request_scope: RequestScope, error: asyncio.CancelledError
    ) -> BaseException:
        """
        What a request has failed with that nobody has cancelled from outside: a timeout, or
        a task group, which a factory holds across its ``yield``, and which says so when it is
        left. Until then an anyio one cancels again and again; so all is torn down now.
        """
        self.uncancel()
        if self.thread is not None:
            self.thread.lend_again = False
            if self.thread.is_busy:
                await sync_code_ended(self.thread, request_scope)
        drop_waiting(request_scope)
        try:
            await request_scope.close(error)
        except TeardownError as group:
            return group.exceptions[0] if len(group.exceptions) == 1 else group
        what = (
            f"{request_scope} was cancelled, though neither by its client nor by the server: it "
            "awaited something that had been cancelled, or cancelled its own task"
        )
        return nobodys_cancellation(what, error)

    def uncancel(self) -> None:
        """So that timeouts and task groups work in teardowns."""
        while self.task.cancelling():
            self.task.uncancel()

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

    # The end

    async def finish(self, request_scope: RequestScope, failure: BaseException | None) -> None:
        """
        The start in reverse: async receivers of ``request_finished``, so that the
        scope closes while the request's connections still work; then, in the
        request's thread, the response's closers and the sync receivers. Every
        step is taken, whatever the others raise, and each has an end.
        """
        self.finishing = True
        if self.listener is not None:
            self.listener.cancel()
        if self.long_stream is not None:
            self.long_stream.unwatch()
        self.uncancel()
        if failure is not None and request_scope.failure is None:
            request_scope.failure = failure
        if self.thread is not None and self.thread.is_busy:
            await self.attempt(sync_code_ended(self.thread, request_scope))
        elif self.thread is None and isinstance(failure, asyncio.CancelledError):
            await self.attempt(hop(_nothing))  # as above, in the thread of who waits for this
        sync_receivers, async_receivers = self.handler.receivers_of(request_finished)
        own_close = self.response is not None and closes_itself(self.response)
        if own_close:
            sync_receivers, async_receivers = [], []  # its close() calls them all
        if self.response is not None and self.response.streaming:
            await self.attempt(close_stream(self.response, request_scope))
        if isinstance(failure, asyncio.CancelledError) and not self.is_cut_off():
            failure = await self.own_failure(request_scope, failure)
        drop_waiting(request_scope)
        if not request_scope.has_responded:
            await self.attempt(end_response(request_scope))
        # In reverse, so that what was opened first, as our scope, is closed last.
        for receiver in reversed(async_receivers):
            await self.attempt(self.call_async(receiver))
        if closing := request_scope.begin_close():
            # Not in this frame, which whoever keeps the error that is logged would keep.
            await self.attempt(end(closing))
        if own_close or self.needs_thread(sync_receivers):
            work = partial(self.call_sync, sync_receivers)
            what = f"A receiver of request_finished, or the response's close(), of {request_scope}"
            await self.attempt(in_thread(self.thread, work, what))
        else:
            if self.response is not None:
                close_resources(self.response)
            if self.thread is not None and self.thread.is_taken:
                self.thread.tidy_later(partial(self.tidy, sync_receivers, request_finished))
        if self.client_gone and isinstance(failure, asyncio.CancelledError):
            failure = None
        if failure is None and not self.problems:
            return
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
        if self.thread is None or not only_tidy(sync_receivers):
            return True
        if self.thread.is_taken and not self.thread.can_be_tidied_later:
            return True
        if caches_have_to_be_closed() and any(True for _ in caches.all(initialized_only=True)):
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
        return self.response._resource_closers not in ([], [trivial])

    async def attempt(self, step: Awaitable[None]) -> None:
        try:
            await step
        except BaseException as error:
            self.problems.append(error)

    async def call_async(self, receiver: Receiver) -> None:
        called = receiver(signal=request_finished, sender=type(self.handler))
        name = getattr(receiver, "__qualname__", None) or printable_repr(receiver)
        await in_time(called, f"The receiver {name} of request_finished")

    def call_sync(self, receivers: Iterable[Receiver]) -> None:
        """In the request's thread: end the response, then call the receivers."""
        try:
            if self.response is not None:
                if closes_itself(self.response):
                    self.response._handler_class = type(self.handler)
                    close_response(self.response, self.response.close)
                else:
                    close_resources(self.response)
        finally:
            outcomes: list[Outcome] = []
            call_all(receivers, outcomes, request_finished, type(self.handler))
            self.problems.extend(error for _, _, error in outcomes if error is not None)
            if self.thread is not None:
                self.thread.leave()


def _nothing() -> None: ...


def _is_wrapped(create_task: Any) -> bool:
    """Whoever wants to know of each task, as New Relic does, wraps this or sets a task factory."""
    if type(create_task) is MethodType:
        create_task = create_task.__func__  # a method makes an error of each name it does not know
    return hasattr(create_task, "__wrapped__")
