"""What the views use: each is asked for with ``await`` where it is needed."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import asyncpg
from django.conf import settings
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from demo import stock, timeline
from demo.gauges import gauges
from scoped import lifespan_scoped, request_scoped

if TYPE_CHECKING:  # asyncpg's classes take a type argument in its stubs only
    from asyncpg.pool import PoolConnectionProxy

TABLES = """
    SELECT pg_advisory_xact_lock(7263);  -- for processes that start at the same time
    CREATE TABLE IF NOT EXISTS messages (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        text text NOT NULL,
        posted_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE IF NOT EXISTS likes (  -- whose message is looked up at COMMIT only
        message_id bigint NOT NULL REFERENCES messages DEFERRABLE INITIALLY DEFERRED
    )
"""


# One per server process: opened at start-up, closed at shutdown.


@lifespan_scoped(eager=True)
async def pool() -> "AsyncIterator[asyncpg.Pool[asyncpg.Record]]":
    async with asyncpg.create_pool(settings.DATABASE_URL, min_size=2, max_size=10) as pool:
        await pool.execute(TABLES)
        yield pool


@lifespan_scoped
async def redis() -> AsyncIterator[Redis]:
    # Without a socket_timeout, for which redis-py uses asyncio.wait_for(): that of Python 3.11 may
    # swallow the cancellation of a request whose client has gone.
    async with Redis.from_url(
        settings.REDIS_URL,
        password=settings.REDIS_PASSWORD,
        decode_responses=True,
        socket_timeout=None,
    ) as client:
        yield client


# One per request: opened on first use, closed after the last byte.


@request_scoped
async def db() -> "AsyncIterator[PoolConnectionProxy[asyncpg.Record]]":
    async with (await pool()).acquire(timeout=10) as connection:
        yield connection


@request_scoped
async def subscription() -> AsyncIterator[PubSub]:
    async with (await redis()).pubsub(ignore_subscribe_messages=True) as subscription:
        await subscription.subscribe("messages", "timeline")
        yield subscription


# Closed before the first byte: where the COMMIT fails, the client is told so.


@request_scoped(until="response")
async def transaction() -> "AsyncIterator[PoolConnectionProxy[asyncpg.Record]]":
    connection = await db()
    async with connection.transaction():
        yield connection


# What makes the page move.


@lifespan_scoped(eager=True)
async def reporter() -> AsyncIterator[None]:
    measure = gauges(await pool(), await stock.pool())
    async with timeline.reporting(await redis(), measure):
        yield
