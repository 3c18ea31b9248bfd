"""
Django's ASGI handler, with one task and one Context from ``request_started`` to
the end of ``request_finished``, which comes exactly once, however the request
ends.
"""

import asyncio
import logging
from inspect import unwrap
from io import BytesIO
from typing import Any

import django
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler
from django.dispatch import Signal

from scoped import conf
from scoped.core.errors import notes_of
from scoped.core.lifespan import lifespan_scope
from scoped.core.names import printable_repr
from scoped.core.waits import is_cancelled
from scoped.discovery import import_urls
from scoped.dispatch import Receiver
from scoped.serving.exchange import Exchange, Message, Receive, Send
from scoped.serving.handler import ScopedHandler
from scoped.serving.receivers import connect_handler
from scoped.serving.supervisor import supervise
from scoped.serving.threads import LentThread, idle_ended

__all__ = ["ScopedASGIHandler", "get_asgi_application"]

logger = logging.getLogger("scoped")


def get_asgi_application() -> "ScopedASGIHandler":
    """Set Django up and return the project's ASGI application, as ``django.core.asgi`` does."""
    django.setup(set_prefix=False)
    return ScopedASGIHandler()


class ScopedASGIHandler(ScopedHandler, ASGIHandler):
    """
    Serves HTTP as Django's ``ASGIHandler`` does, and the ASGI lifespan protocol.

    The server's task supervises: it waits for the request and for the client to
    go away. The request itself runs in one child task. "Client gone" and "the
    server cancels" become one cancellation of that child, none once the request
    is finishing; then the supervisor waits for it, whatever comes.
    """

    def __init__(self) -> None:
        conf.configure()
        super().__init__()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        connect_handler(cls)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _serve_lifespan(receive, send)
        else:
            # Django's own is what Sentry, New Relic and others patch.
            await super().__call__(scope, receive, send)

    async def handle(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            body_file = await self.read_body(receive)
        except RequestAborted:
            return
        try:
            await supervise(Exchange(self, scope, body_file, send), receive)
        finally:
            body_file.close()

    async def read_body(self, receive: Receive) -> Any:
        read = super().read_body
        if getattr(read, "__func__", None) is not _djangos_read_body:
            return await read(receive)
        message = await receive()
        if message == _NO_BODY:
            # As of most. To make and close a temporary file, as Django does, takes a twenty-fifth
            # part of a small request.
            return BytesIO()
        receive = _once_more(message, receive)
        del message
        return await read(receive)

    def lend_thread(self) -> LentThread:
        """For the sync code of one request."""
        return LentThread()

    def receivers_of(self, signal: Signal) -> tuple[list[Receiver], list[Receiver]]:
        """The sync and the async ones that this handler's requests call."""
        return self.listeners.of(signal)


connect_handler(ScopedASGIHandler)

# Django's own, or what no handler has, where somebody had put another in its place before this.
_found = unwrap(ASGIHandler.read_body)
_djangos_read_body: object = _found if _found.__module__ == ASGIHandler.__module__ else object()

# As servers put it.
_NO_BODY = {"type": "http.request", "body": b"", "more_body": False}


def _once_more(message: Message, receive: Receive) -> Receive:
    """What receives that message again, and then what comes after it."""
    messages = [message]

    async def received() -> Message:
        return messages.pop() if messages else await receive()

    return received


async def _serve_lifespan(receive: Receive, send: Send) -> None:
    """
    The ASGI lifespan protocol. Start-up that fails is reported to the server,
    which then refuses to start; shutdown waits for open requests.
    """
    phase = "startup"
    await receive()
    import_urls()  # what the views declare with eager=True is known then
    try:
        async with lifespan_scope():
            await send({"type": "lifespan.startup.complete"})
            phase = "shutdown"
            await receive()
        await idle_ended()
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            raise
        notes = "".join(f" ({note})" for note in notes_of(error))
        logger.exception("The %s of the lifespan failed.", phase)
        await send(
            {"type": f"lifespan.{phase}.failed", "message": f"{printable_repr(error)}{notes}"}
        )
    else:
        await send({"type": "lifespan.shutdown.complete"})
