"""
The timeline: what becomes of each request, told to all open pages.

``Recorder``, around the application, sees a request come, its bytes go, and how
it ends. The signals of scoped tell of its resources. ``reporting()`` publishes
whatever has changed. A row is published as a whole, so who misses one catches up
with the next.
"""

import asyncio
import json
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from django.dispatch import receiver
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scoped.core.resource import Lifetime, Resource
from scoped.core.scope import Scope
from scoped.signals import resource_set_up, resource_torn_down, scope_closed, scope_opened

# Unlike the host's name and the pid, which a container has anew after each restart.
PROCESS = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
UNSEEN = ("/health", "/static/")

EVERY = 0.2  # seconds, while something happens
HEARTBEAT = 1.0  # seconds, while nothing does
KEPT = 40  # rows, for pages to come

_numbers = count(1)


@dataclass
class Bar:
    """A resource, from the start of its set-up to the end of its teardown."""

    name: str
    asked_by: str | None
    began: float
    ready: float
    closing: float | None = None
    ended: float | None = None
    failed: bool = False


@dataclass
class Row:
    """A request, or a background task."""

    kind: str
    title: str
    id: str = field(default_factory=lambda: f"{PROCESS}/{next(_numbers)}")
    process: str = PROCESS
    began: float = field(default_factory=time.time)
    first_byte: float | None = None
    last_byte: float | None = None
    status: int | None = None
    ended: float | None = None
    ending: str | None = None
    remark: str = ""
    bars: list[Bar] = field(default_factory=list)
    has_scope: bool = False
    client_gone: bool = False

    def __post_init__(self) -> None:
        _unfinished[self.id] = self
        _changed[self.id] = self

    def set_up(
        self, name: str, asked_by: str | None = None, seconds: float = 0, failed: bool = False
    ) -> Bar:
        now = time.time()
        bar = Bar(name, asked_by, now - seconds, now, ended=now if failed else None, failed=failed)
        self.bars.append(bar)
        self.change()
        return bar

    def torn_down(self, bar: Bar, seconds: float = 0, failed: bool = False) -> None:
        bar.ended = time.time()
        bar.closing = bar.ended - seconds
        bar.failed = failed
        self.change()

    def end(self, ending: str) -> None:
        self.ended, self.ending = time.time(), ending
        self.change()

    def change(self) -> None:
        _changed[self.id] = self


_changed: dict[str, Row] = {}  # since it was last published
_unfinished: dict[str, Row] = {}
_of_scope: WeakKeyDictionary[Scope, Row] = WeakKeyDictionary()

# The row of the request at hand.
current: ContextVar[Row | None] = ContextVar("demo.timeline.current", default=None)


# What the server sees


class Recorder:
    """An ASGI application around another."""

    def __init__(self, application: Any) -> None:
        self.application = application

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"].startswith(UNSEEN):
            await self.application(scope, receive, send)
            return
        kind = "stock" if scope["path"].startswith("/stock/") else "scoped"
        row = Row(kind, f"{scope['method']} {scope['path']}")

        async def heard() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect" and row.last_byte is None:
                row.client_gone = True
            return message

        async def sent(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                row.status, row.first_byte = message["status"], time.time()
                row.change()
            elif not message.get("more_body", False):
                row.last_byte = time.time()
                row.change()

        token = current.set(row)
        ending = "shut down"
        try:
            await self.application(scope, heard, sent)
            ending = _ending(row)
        except Exception:
            ending = _ending(row)
            raise
        finally:
            current.reset(token)
            row.end(ending)


def _ending(row: Row) -> str:
    if row.last_byte is None:
        return "client gone" if row.client_gone else "broke off"
    if row.status is not None and row.status >= 400:
        return "failed" if row.status >= 500 else "refused"
    return "fine"


# What scoped sees. The receivers are called at once, in the request's task or thread.


@receiver(scope_opened)
def _opened(scope: Scope, **kwargs: Any) -> None:
    if scope.lifetime is not Lifetime.REQUEST:
        return
    row = current.get()
    if row is None:
        return
    if row.has_scope:  # it has its request's Context, and is a scope of its own
        row = Row("background", str(scope))
    row.has_scope = True
    _of_scope[scope] = row


@receiver(scope_closed)
def _closed(scope: Scope, error: BaseException | None, **kwargs: Any) -> None:
    row = _of_scope.get(scope)
    if row is not None and row.kind == "background":
        row.end("fine" if error is None else "failed")


@receiver(resource_set_up)
def _set_up(
    resource: Resource[Any],
    scope: Scope,
    seconds: float,
    error: BaseException | None,
    asked_by: Resource[Any] | None,
    **kwargs: Any,
) -> None:
    if (row := _of_scope.get(scope)) is not None:
        asker = None if asked_by is None else _name(asked_by)
        row.set_up(_name(resource), asker, seconds, error is not None)


@receiver(resource_torn_down)
def _torn_down(
    resource: Resource[Any],
    scope: Scope,
    seconds: float,
    error: BaseException | None,
    **kwargs: Any,
) -> None:
    if (row := _of_scope.get(scope)) is not None:
        name = _name(resource)
        bar = next(bar for bar in row.bars if bar.name == name and bar.ended is None)
        row.torn_down(bar, seconds, error is not None)


def _name(resource: Resource[Any]) -> str:
    return resource.factory.name.rpartition(".")[2]


# What the pages see


@asynccontextmanager
async def reporting(redis: Redis, measure: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Publish what happens for as long as the ``with`` lasts."""

    async def report_for_ever() -> None:
        while True:
            with suppress(RedisError):  # while it is away
                await _report(redis, measure())
            for _ in range(int(HEARTBEAT / EVERY)):
                await asyncio.sleep(EVERY)
                if _changed:
                    break

    task = asyncio.create_task(report_for_ever())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        with suppress(RedisError):
            await _report(redis, None)


async def _report(redis: Redis, measured: dict[str, Any] | None) -> None:
    changed = {**_unfinished, **_changed}
    _changed.clear()
    rows = [asdict(row) for row in changed.values()]
    ended = [row for row in rows if row["ended"] is not None]
    for row in ended:
        _unfinished.pop(row["id"], None)
    report = {"process": PROCESS, "now": time.time(), "gauges": measured}
    async with redis.pipeline(transaction=False) as pipeline:
        if ended:
            pipeline.lpush("timeline", *map(json.dumps, ended))
            pipeline.ltrim("timeline", 0, KEPT - 1)
        pipeline.publish("timeline", json.dumps({**report, "rows": rows}))
        await pipeline.execute()


async def latest(redis: Redis) -> str:
    """What has ended lately, for a page that opens: a report as the others are."""
    rows = await redis.lrange("timeline", 0, -1)
    return json.dumps({"rows": [json.loads(row) for row in reversed(rows)]})
