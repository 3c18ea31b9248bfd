"""What the views use: each is asked for with ``await`` where it is needed."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import asyncpg
from django.conf import settings
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from scoped import lifespan_scoped, request_scoped

if TYPE_CHECKING:  # asyncpg's classes take a type argument in its stubs only
    from asyncpg.pool import PoolConnectionProxy

TABLE = """
    SELECT pg_advisory_xact_lock(7263);  -- for processes that start at the same time
    CREATE TABLE IF NOT EXISTS messages (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        text text NOT NULL,
        posted_at timestamptz NOT NULL DEFAULT now()
    )
"""


@lifespan_scoped(eager=True)
async def pool() -> "AsyncIterator[asyncpg.Pool[asyncpg.Record]]":
    async with asyncpg.create_pool(settings.DATABASE_URL, min_size=2) as pool:
        await pool.execute(TABLE)
        yield pool


@request_scoped
async def db() -> "AsyncIterator[PoolConnectionProxy[asyncpg.Record]]":
    async with (await pool()).acquire(timeout=10) as connection:
        yield connection


@lifespan_scoped
async def redis() -> AsyncIterator[Redis]:
    async with Redis.from_url(settings.REDIS_URL, decode_responses=True) as client:
        yield client


@request_scoped
async def subscription() -> AsyncIterator[PubSub]:
    async with (await redis()).pubsub(ignore_subscribe_messages=True) as subscription:
        await subscription.subscribe("messages")
        yield subscription
