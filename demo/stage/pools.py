"""
Stock Django's pool: asyncpg's, as scoped's is, that knows which request has which connection.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
from django.conf import settings
from redis.asyncio import Redis
from redis.exceptions import RedisError

from demo.stage import timeline
from scoped import lifespan_scoped


class StockPool:
    """``acquire()`` and ``release()`` as asyncpg's."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.waiting = 0
        self.lent: dict[Any, tuple[timeline.Row, timeline.Bar]] = {}

    async def acquire(self, *, timeout: float) -> Any:
        row = timeline.current.get() or timeline.Row("stock", "not a request")
        bar = row.bar("db", began=time.time())
        self.waiting += 1
        try:
            connection = await self.pool.acquire(timeout=timeout)
        except BaseException as error:
            is_cancelled = isinstance(error, asyncio.CancelledError)
            bar.ended = time.time()
            bar.error = "cancelled" if is_cancelled else timeline.words(error)
            raise
        finally:
            self.waiting -= 1
            row.change()
        bar.ready = time.time()
        self.lent[connection] = row, bar
        return connection

    async def release(self, connection: Any) -> None:
        row, bar = self.lent.pop(connection, (None, None))
        if row is None or bar is None:  # a reset was faster
            return
        bar.closing = time.time()
        await self.pool.release(connection)
        bar.ended = time.time()
        row.change()

    async def reset(self) -> None:
        """Take back what is lost. That it was lost stays in its row."""
        for connection, (row, bar) in list(self.lent.items()):
            if row.ended is not None:
                del self.lent[connection]
                connection.terminate()
                await self.pool.release(connection)
                bar.taken = time.time()
                row.change()

    def note_end(self) -> None:
        """With its server goes what is lost until then."""
        for row, bar in self.lent.values():
            bar.taken = time.time()
            row.change()


@lifespan_scoped(eager=True)
async def stock_pool() -> AsyncIterator[StockPool]:
    pool = StockPool(await asyncpg.create_pool(settings.DATABASE_URL, **settings.STOCK_POOL))
    listener = asyncio.create_task(_heed_resets(pool))
    try:
        yield pool
    finally:
        listener.cancel()
        await asyncio.wait([listener])
        pool.pool.terminate()  # close() would wait for what is lost


async def _heed_resets(pool: StockPool) -> None:
    """Every process has a pool, and a click reaches one process: that one tells all."""
    while True:
        try:
            async with (
                Redis.from_url(settings.REDIS_URL, **settings.REDIS) as redis,
                redis.pubsub(ignore_subscribe_messages=True) as resets,
            ):
                await resets.subscribe("reset")
                while True:
                    if await resets.get_message(timeout=None):
                        await pool.reset()
        except (RedisError, OSError):
            await asyncio.sleep(1)
