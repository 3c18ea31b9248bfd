"""What the views use: each is asked for with ``await`` where it is needed."""

import asyncpg
from django.conf import settings
from redis.asyncio import Redis

from scoped import lifespan_scoped, request_scoped


@lifespan_scoped(eager=True)  # one per server process: opened at start-up, closed at shutdown
async def pool():
    async with asyncpg.create_pool(settings.DATABASE_URL, **settings.POOL) as pool:
        yield pool


@lifespan_scoped
async def redis():
    async with Redis.from_url(settings.REDIS_URL, **settings.REDIS) as client:
        yield client


@request_scoped  # one per request: opened on first use, closed after the last byte
async def db():
    async with (await pool()).acquire(timeout=1) as connection:
        yield connection


@request_scoped(until="response")  # closed before the first byte: a COMMIT that fails is a 500
async def transaction():
    connection = await db()
    async with connection.transaction():
        yield connection


@request_scoped  # one request at a time has it; the others wait
async def turn():
    async with (await redis()).lock("turn", timeout=10):
        yield
