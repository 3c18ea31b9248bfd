"""
What the pages are told. Every process tells Redis what has happened in it, and hears from there
what has happened in all of them, once for all its pages.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from django.conf import settings
from redis.asyncio import Redis
from redis.exceptions import RedisError

from demo.stage import gauges, timeline

EVERY = 0.2  # seconds, while something happens
HEARTBEAT = 1.0  # seconds, while nothing does
KEPT = 60  # rows, for pages to come

PAGES = 200  # that one process has open at most
BEHIND = 100  # reports that a page may be behind before the oldest are dropped


class TooManyPagesError(Exception):
    """As many are open as one process serves."""


Heard = tuple[str, str] | None  # channel and data; None, which comes last, is the server's end


class News:
    """What was heard goes to each page's queue."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[Heard]] = set()
        self._is_over = False

    def tell(self, channel: str, data: str) -> None:
        self._put((channel, data))

    def end(self) -> None:
        """Tell all pages, and those that still come, that this was it."""
        self._is_over = True
        self._put(None)

    def _put(self, heard: Heard) -> None:
        for queue in self._queues:
            if queue.full():  # each report stands for itself: the latest count
                queue.get_nowait()
            queue.put_nowait(heard)

    @contextmanager
    def heard(self) -> Iterator[asyncio.Queue[Heard]]:
        """What comes while the ``with`` lasts. Raises TooManyPagesError."""
        if len(self._queues) >= PAGES:
            raise TooManyPagesError
        queue: asyncio.Queue[Heard] = asyncio.Queue(BEHIND)
        if self._is_over:
            queue.put_nowait(None)
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)


async def listen(news: News) -> None:
    while True:
        with suppress(RedisError, OSError):  # while it is away
            async with (
                Redis.from_url(settings.REDIS_URL, **settings.REDIS) as redis,
                redis.pubsub(ignore_subscribe_messages=True) as published,
            ):
                await published.subscribe("messages", "timeline")
                while True:
                    if message := await published.get_message(timeout=None):
                        news.tell(message["channel"], message["data"])
        await asyncio.sleep(0.5)


async def report_for_ever(redis: Redis, measure: Callable[[], dict[str, Any]]) -> None:
    observer = gauges.Observer()
    try:
        while True:
            measured = {**measure(), **await observer.ask()}
            with suppress(RedisError, OSError):  # while it is away
                await tell(redis, measured)
            for _ in range(int(HEARTBEAT / EVERY)):
                await asyncio.sleep(EVERY)
                if timeline.is_news():
                    break
    finally:
        observer.close()


async def tell(redis: Redis, measured: dict[str, Any] | None) -> None:
    """Tell all pages what has changed, and those to come what is over."""
    changed = timeline.changed()
    rows = [asdict(row) for row in changed]
    ended = [json.dumps(row) for row in rows if row["ended"] is not None]
    report = {"process": timeline.PROCESS, "now": time.time(), "gauges": measured, "rows": rows}
    try:
        async with redis.pipeline(transaction=False) as pipeline:
            if ended:
                pipeline.lpush("rows", *ended)
                pipeline.ltrim("rows", 0, KEPT - 1)
            pipeline.publish("timeline", json.dumps(report))
            await pipeline.execute()
    except BaseException:
        for row in changed:  # they are still to be told
            row.change()
        raise


async def tell_score(redis: Redis, score: dict[str, Any]) -> None:
    """Tell all pages, and those to come, how a run of many requests stands."""
    text = json.dumps(score)
    await redis.set("score", text)
    await redis.publish("timeline", json.dumps({"rows": [], "score": score}))


async def latest(redis: Redis) -> str:
    """What has ended lately, for a page that opens: a report as the others are."""
    rows = [json.loads(row) for row in await redis.lrange("rows", 0, -1)]
    newest = {row["id"]: row for row in reversed(rows)}  # one that changed is there twice
    score = await redis.get("score")
    report = {"rows": list(newest.values()), "score": json.loads(score) if score else None}
    return json.dumps(report)
