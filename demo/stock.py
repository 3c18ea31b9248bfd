"""
Beside it, the same views without scoped: Django's own handler, and what ticket
36714 calls the natural way. A ContextVar holds the connection of the request, and
a receiver of ``request_finished`` gives it back; if it is called, and if it sees
what the view has set.
"""

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import asyncpg
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from demo import timeline
from scoped import lifespan_scoped

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = PoolConnectionProxy[asyncpg.Record]

held: ContextVar["Connection | None"] = ContextVar("held", default=None)


async def db() -> "Connection":
    connection = held.get()
    if connection is None:
        connection = await (await pool()).acquire()
        held.set(connection)
    return connection


async def release(**kwargs: Any) -> None:
    connection = held.get()
    if connection is not None:
        held.set(None)
        await (await pool()).release(connection)


request_finished.connect(release, sender=ASGIHandler)


# The rest is for the page: it is shown, bounded, and taken back.

SIZE = 3
PATIENCE = 3.0  # seconds that a request waits for a connection


class NoConnectionLeftError(Exception):
    def __init__(self) -> None:
        super().__init__(f"No connection left: waited {PATIENCE:g} seconds for one.")


class Pool:
    """A pool that knows which request has which connection."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self.pool = pool
        self.waiting = 0
        self.lent: dict[Connection, tuple[timeline.Row, timeline.Bar]] = {}

    @property
    def lost(self) -> int:
        """How many are still lent, though their request is over."""
        return sum(row.ended is not None for row, _ in self.lent.values())

    async def acquire(self) -> "Connection":
        row = timeline.current.get() or timeline.Row("stock", "not a request")
        self.waiting += 1
        try:
            connection = await self.pool.acquire(timeout=PATIENCE)
        except TimeoutError:
            row.remark = "no connection left"
            raise NoConnectionLeftError from None
        finally:
            self.waiting -= 1
        self.lent[connection] = row, row.set_up("connection")
        return connection

    async def release(self, connection: "Connection") -> None:
        if connection in self.lent:
            row, bar = self.lent.pop(connection)
            await self.pool.release(connection)
            row.torn_down(bar)

    async def reset(self) -> None:
        for connection in list(self.lent):
            connection.terminate()
            await self.release(connection)


@lifespan_scoped(eager=True)
async def pool() -> AsyncIterator[Pool]:
    async with (
        Redis.from_url(settings.REDIS_URL, password=settings.REDIS_PASSWORD) as redis,
        redis.pubsub(ignore_subscribe_messages=True) as resets,
    ):
        await resets.subscribe("stock")
        pool = Pool(await asyncpg.create_pool(settings.DATABASE_URL, min_size=0, max_size=SIZE))
        listener = asyncio.create_task(_heed(resets, pool))
        try:
            yield pool
        finally:
            listener.cancel()
            await asyncio.wait([listener])
            pool.pool.terminate()  # close() would wait for what is lost


async def _heed(resets: PubSub, pool: Pool) -> None:
    """Every process has a pool, and a click reaches one process: that one tells all."""
    while True:
        try:
            if await resets.get_message(timeout=None):
                await pool.reset()
        except RedisError:
            await asyncio.sleep(1)
