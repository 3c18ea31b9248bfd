"""What the page itself uses. scoped finds it at start-up, as the ``resources.py`` of any app."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

from redis.exceptions import RedisError

from demo import resources
from demo.stage import gauges, pools, reports, server
from scoped import lifespan_scoped, request_scoped

# The ids go on where those of another database have stopped: an open page knows them.
TABLES = f"""
    SELECT pg_advisory_xact_lock(7263);  -- for processes that start at the same time
    CREATE TABLE IF NOT EXISTS messages (
        id bigint GENERATED ALWAYS AS IDENTITY (START WITH {time.time_ns() // 10**6}) PRIMARY KEY,
        text text NOT NULL,
        posted_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE IF NOT EXISTS likes (  -- whose message is looked up at COMMIT only
        message_id bigint NOT NULL REFERENCES messages DEFERRABLE INITIALLY DEFERRED
    )
"""


@lifespan_scoped(eager=True)
async def news() -> AsyncIterator[reports.News]:
    # Asked for here, so that they are there for as long as they are told of.
    pool, stock = await resources.pool(), await pools.stock_pool()
    redis = await resources.redis()
    await pool.execute(TABLES)
    news = reports.News()
    report = asyncio.create_task(
        reports.report_for_ever(redis, partial(gauges.measure, pool, stock))
    )
    tasks = [asyncio.create_task(reports.listen(news)), report]
    try:
        with server.told_of_the_end(news.end):
            yield news
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        stock.note_end()
        with suppress(RedisError, OSError):
            await reports.tell(redis, None)


@request_scoped
async def heard() -> AsyncIterator[Any]:
    """A queue of what is heard. Raises TooManyPagesError."""
    with (await news()).heard() as queue:
        yield queue
