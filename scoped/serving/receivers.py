"""
Who opens a request scope and closes it, and what else listens at a request's start and end.

Our own ASGI handlers do so themselves, around all that they send. For every other sender
(WSGI, Django's test clients, the stock ASGI handler) receivers of ``request_started`` and
``request_finished`` do. They are sync: an async receiver would make Django's own dispatch
run tasks in other people's requests, and its AsyncClient fail on streams.
"""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Iterable
from functools import cache, wraps
from typing import Any, NamedTuple, Self
from weakref import ReferenceType, WeakSet, ref

import django
from asgiref.sync import SyncToAsync, async_to_sync, markcoroutinefunction
from django.core.cache import close_caches
from django.core.handlers.base import BaseHandler, reset_urlconf
from django.core.signals import got_request_exception, request_finished, request_started
from django.db import close_old_connections, reset_queries
from django.db.backends.signals import connection_created
from django.dispatch import Signal

from scoped.core.current import current, scope_here
from scoped.core.errors import TeardownError
from scoped.core.names import printable
from scoped.core.request import RequestScope, ServedScope
from scoped.core.waits import run_without_loop
from scoped.dispatch import Receiver, live_receivers
from scoped.serving.caches import caches_have_to_be_closed
from scoped.serving.threads import connection_made

__all__ = [
    "Listeners",
    "connect",
    "connect_handler",
    "end",
    "end_response",
    "note_failure",
    "only_tidy",
    "open_scope",
    "tells_of_response",
]

logger = logging.getLogger("scoped")

_our_handlers: WeakSet[type] = WeakSet()
# Of the handlers that are served by sync receivers, those which call end_response().
tells_of_response: WeakSet[type] = WeakSet()
# Tasks that close a scope for sync code in the event loop's thread: a loop holds tasks weakly.
_closing: set[asyncio.Task[None]] = set()


def _is_test_client(handler: Any) -> bool:
    return bool(handler.__module__.startswith(("django.test.", "scoped.testing")))


class _ClientScope(ServedScope):
    """Of a test client, which holds the lifespan open or not, as the test wants it."""

    __slots__ = ()

    expects_lifespan = False


class _ForeignScope(RequestScope):
    """Opened for another handler than ours; no other handler's signal may close it."""

    __slots__ = ("before", "opener", "served")

    def __init__(self, name: str, opener: Any) -> None:
        super().__init__(name)
        self.opener = opener
        # After a test client's request no more need be expected.
        self.served = not _is_test_client(opener)
        self.before: ReferenceType[_ForeignScope] | None = None

    def open(
        self, *, sync_only: bool = False, loop: asyncio.AbstractEventLoop | None = None
    ) -> Self:
        """
        Where a server's last request is open still, one that it may never close, this does not
        hold that: else each would hold all before it.
        """
        here = current.get()
        if self.served and isinstance(here, _ForeignScope) and here.served:
            self.before = ref(here)
            current.set(None)
        return super().open(sync_only=sync_only, loop=loop)

    def leave(self) -> None:
        was_here = current.get() is self
        super().leave()
        before = None if self.before is None else self.before()
        if was_here and before is not None and before.is_open:
            current.set(before)

    @property
    def tells_of_response(self) -> bool:
        return self.opener in tells_of_response


def connect_handler(handler: type) -> None:
    """Requests of this handler class open and close a scope in their own task."""
    _our_handlers.add(handler)
    _connect_first(connection_created, connection_made)  # before any that raises
    got_request_exception.connect(_request_failed)


def connect() -> None:
    """Let requests of other handlers open and close a scope, as far as that can be done."""
    _show_requests()
    _connect_first(request_started, open_foreign)
    # Before Django's close_old_connections: a teardown may still use the database.
    _connect_first(request_finished, close_foreign)
    got_request_exception.connect(_request_failed)


@cache
def _show_requests() -> None:
    """
    Let the scopes of other handlers know their request. No signal brings it, so this is
    the one place where something of Django's is wrapped: what Sentry wraps for the same reason.
    """
    get_response, get_response_async = BaseHandler.get_response, BaseHandler.get_response_async

    @wraps(get_response)
    def shows_request(self: BaseHandler, request: Any) -> Any:
        _show(request)
        return get_response(self, request)

    @markcoroutinefunction
    @wraps(get_response_async)
    def shows_request_async(self: BaseHandler, request: Any) -> Any:
        _show(request)
        return get_response_async(self, request)

    BaseHandler.get_response = shows_request  # type: ignore[method-assign]
    BaseHandler.get_response_async = shows_request_async  # type: ignore[method-assign]


def _show(request: Any) -> None:
    scope = current.get()
    if isinstance(scope, _ForeignScope) and scope.request is None and scope.is_open:
        scope.request = request


def _connect_first(signal: Signal, receiver: Any) -> None:
    signal.disconnect(receiver)
    signal.connect(receiver)
    with signal.lock:
        signal.receivers.insert(0, signal.receivers.pop())


def open_scope(handler: type, scope: dict[str, Any]) -> RequestScope:
    """
    For a request of this handler of ours, in its own task. Always a fresh one: servers carry
    the Context of one request into the next.
    """
    scope_class = _ClientScope if _is_test_client(handler) else ServedScope
    return scope_class(_name(scope["method"], scope["path"])).open()


async def close(scope: RequestScope) -> None:
    await end(scope.begin_close())


async def end(closing: Iterable[Awaitable[None]]) -> None:
    """The rest of closing a scope; what fails is logged, for the response has been sent."""
    try:
        for rest in closing:
            await rest
    except TeardownError as error:
        logger.error("%s", error, exc_info=error)


async def end_response(scope: RequestScope) -> None:
    """For a request that has no response any more which an error could replace."""
    try:
        await scope.end_response()
    except TeardownError as error:
        logger.error("%s", error, exc_info=error)


def note_failure(failure: BaseException) -> None:
    """Let the factories of the current request, if there is one, see what it failed with."""
    scope = scope_here()
    if isinstance(scope, RequestScope):
        scope.note_failure(failure)


def open_foreign(
    *,
    sender: Any,
    scope: dict[str, Any] | None = None,
    environ: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    if environ is not None:
        path = environ.get("PATH_INFO") or "/"
        name = _name(environ["REQUEST_METHOD"], path if path.isascii() else _path(path))
        opened = _ForeignScope(name, sender).open(sync_only=True)
        if opened.served:  # kept by who has it in hand, and so may yet close it; or calls us again
            environ.setdefault("scoped.scopes", []).append(opened)
    elif scope is not None and sender not in _our_handlers and django.VERSION >= (6, 1):
        # Before 6.1 what is set here is lost before the view runs (ticket 36714).
        name = _name(scope["method"], scope["path"])
        # This runs in a thread for sync code, and the view in that thread's event loop.
        loop = getattr(SyncToAsync.threadlocal, "main_event_loop", None)
        _ForeignScope(name, sender).open(loop=loop)


def close_foreign(*, sender: Any, **kwargs: Any) -> None:
    scope = scope_here()
    if not isinstance(scope, _ForeignScope):
        return
    # Django's test clients, and the stock handler after a 400, send this without a sender. So does
    # a response that a middleware closes, and replaces: where a handler is ours, that is no end.
    if sender is not scope.opener and (sender is not None or scope.tells_of_response):
        return
    scope.leave()
    if scope.sync_only or not scope.is_in_use:
        if closing := scope.begin_close():
            run_without_loop(end(closing))
        return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        async_to_sync(close)(scope)
    else:
        # Django's AsyncClient closes a stream from sync code in the event loop's thread.
        task = loop.create_task(close(scope))
        _closing.add(task)
        task.add_done_callback(_closing.discard)


def _request_failed(**kwargs: Any) -> None:
    if (failure := sys.exc_info()[1]) is not None:
        note_failure(failure)


def _path(of_wsgi: str) -> str:
    """WSGI has its bytes as Latin-1 (PEP 3333)."""
    return of_wsgi.encode("latin-1", "replace").decode(errors="backslashreplace")


def _name(method: str, path: str) -> str:
    return printable(f"the request {method} {path}")


# Of Django's and our own receivers: all that they do is to tidy the thread that they run in, or a
# Context that ends with the request.
_TIDY: frozenset[Receiver] = frozenset(
    {reset_queries, close_old_connections, close_caches, reset_urlconf, open_foreign, close_foreign}
)


def only_tidy(receivers: Iterable[Receiver]) -> bool:
    """Whether these are such, all of them."""
    try:
        return _TIDY.issuperset(receivers)
    except Exception:  # somebody's own, that has no hash: an instance of a dataclass, say
        return False


class _Found(NamedTuple):
    look_up: Any  # that by which they were found: monitoring puts its own in the place of Django's
    connected: list[Any]
    receivers: tuple[list[Receiver], list[Receiver]]


class Listeners:
    """
    The receivers of a handler's requests. To look them up takes Django a lock and weak
    references; where they are none but Django's and ours, that is done when any is connected or
    disconnected. Others are not kept: they may be gone at any time.
    """

    def __init__(self, sender: type) -> None:
        self.sender = sender
        self.found: dict[Signal, _Found] = {}

    def of(self, signal: Signal) -> tuple[list[Receiver], list[Receiver]]:
        """The sync and the async ones."""
        found = self.found.get(signal)
        look_up: Any = Signal._live_receivers
        if found is not None and found.connected == signal.receivers and found.look_up is look_up:
            return found.receivers
        connected = list(signal.receivers)
        receivers = live_receivers(signal, self.sender)
        if only_tidy(receivers[0]) and not receivers[1]:
            self.found[signal] = _Found(look_up, connected, receivers)
        return receivers

    def send(self, signal: Signal) -> None:
        """As the signal's own ``send()``, but for what would do nothing."""
        sync_receivers, async_receivers = self.of(signal)
        if async_receivers:
            signal.send(self.sender)
            return
        for receiver in sync_receivers:
            if receiver is not close_caches or caches_have_to_be_closed():
                receiver(signal=signal, sender=self.sender)
