"""An HTTP connection to an ASGI application, kept as a server would keep it, step by step."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any


class Connection:
    """
    ``sent`` holds the messages that the application sent. ``before_send`` is
    awaited before each is taken, with its number and the message: it may block,
    or raise as a server whose client has gone.
    """

    def __init__(
        self,
        application: Callable[..., Awaitable[None]],
        path: str = "/",
        *,
        method: str = "GET",
        headers: Sequence[tuple[bytes, bytes]] = (),
        query_string: bytes = b"",
        body: Sequence[bytes] = (b"",),
        before_send: Callable[[int, dict[str, Any]], Awaitable[None]] | None = None,
    ) -> None:
        self.application = application
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "headers": list(headers),
            "query_string": query_string,
        }
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for number, part in enumerate(body, 1):
            more = number < len(body)
            self.messages.put_nowait({"type": "http.request", "body": part, "more_body": more})
        self.before_send = before_send
        self.sent: list[dict[str, Any]] = []
        self.task: asyncio.Task[None] | None = None

    def start(self) -> "asyncio.Task[None]":
        """Run the application in a task of its own, as servers do."""
        self.task = asyncio.create_task(self.run())
        return self.task

    async def run(self) -> None:
        await self.application(self.scope, self.receive, self.send)

    async def receive(self) -> dict[str, Any]:
        return await self.messages.get()

    async def send(self, message: dict[str, Any]) -> None:
        if self.before_send is not None:
            await self.before_send(len(self.sent), message)
        self.sent.append(message)

    def disconnect(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def complete(self) -> bool:
        last = self.sent[-1] if self.sent else {}
        return last.get("type") == "http.response.body" and not last.get("more_body", False)
