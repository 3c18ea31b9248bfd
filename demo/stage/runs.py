"""
Runs: the same list of requests to scoped and to stock Django, from the server that serves them,
over connections of their own.
"""

import asyncio
import random
import secrets
import statistics
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from redis.asyncio import Redis

from demo.stage import reports, timeline
from demo.stage.buttons import ENDINGS, PAIRS
from demo.stage.client import PATIENCE, Answer, post
from demo.stage.pools import StockPool

AT_ONCE = 8
LEAVE_AFTER = 0.4  # seconds
MIX = {
    "fine": 125,
    "stream": 20,
    "missing": 12,
    "raises": 12,
    "sync": 10,
    "leave": 8,
    "broken-stream": 10,
    "children": 3,
}
SIDES = ("scoped", "stock")

Post = Callable[[str, str, str], Coroutine[Any, Any, Answer]]


class Latest:
    """Two runs at once would find each other's connections taken: there is one, or none."""

    task: asyncio.Task[None] | None = None

    @classmethod
    def goes_on(cls) -> bool:
        return cls.task is not None and not cls.task.done()


def mixed_list() -> list[str]:
    """The names of 200 endings, in the same order each time."""
    names = [name for name, number in MIX.items() for _ in range(number)]
    random.Random(36714).shuffle(names)  # noqa: S311 (nothing secret)
    return names


async def make_equal(pool: Any, stock: StockPool) -> None:
    """Nothing is lost of either pool, and all connections of both are open."""
    await stock.reset()
    for one in (pool, stock.pool):
        async with AsyncExitStack() as stack:
            for _ in range(one.get_max_size()):
                await stack.enter_async_context(one.acquire(timeout=PATIENCE))


async def endings(redis: Redis, address: tuple[str, int], host: str) -> None:
    """Each ending, one after the other, of those with a counterpart both at the same time."""
    run = secrets.token_hex(4)
    for ending in ENDINGS:
        if ending.is_in_runs:
            sides = SIDES if ending in PAIRS else SIDES[:1]
            headers = {"Host": host, "X-Pair": f"{run}-{ending.name}"}
            leave_after = LEAVE_AFTER if ending.leaves else None
            await asyncio.gather(
                *(post(address, f"/{side}/{ending.name}", headers, leave_after) for side in sides)
            )


async def mixed(redis: Redis, address: tuple[str, int], host: str) -> None:
    """Two hundred requests, eight at once, to both sides at the same time; and the score."""
    run, names = secrets.token_hex(4), mixed_list()
    with timeline.counted(f"{run}-scoped") as scoped, timeline.counted(f"{run}-stock") as stock:
        rows = dict(zip(SIDES, (scoped, stock), strict=True))
        answers: dict[str, list[tuple[str, Answer]]] = {side: [] for side in SIDES}
        began = time.time()

        def score(is_over: bool) -> dict[str, Any]:
            sides = {side: _count(answers[side], rows[side]) for side in SIDES}
            return {"run": run, "began": began, "of": len(names), "over": is_over, **sides}

        async def send(side: str, left: list[str]) -> None:
            while left:
                name = left.pop()
                headers = {"Host": host, "X-Run": f"{run}-{side}"}
                leave_after = LEAVE_AFTER if name == "leave" else None
                answers[side].append(
                    (name, await post(address, f"/{side}/{name}", headers, leave_after))
                )

        async def keep_score() -> None:
            while True:
                await reports.tell_score(redis, score(is_over=False))
                await asyncio.sleep(0.5)

        keeper = asyncio.create_task(keep_score())
        try:
            async with asyncio.TaskGroup() as group:
                for side in SIDES:
                    left = names[::-1]
                    for _ in range(AT_ONCE):
                        group.create_task(send(side, left))
            await _settled(rows)
        finally:
            keeper.cancel()
            await asyncio.wait([keeper])
        await reports.tell_score(redis, score(is_over=True))


async def _settled(rows: dict[str, list[timeline.Row]]) -> None:
    """Those whose client has left are over a moment after it."""
    for _ in range(100):
        if all(row.ended is not None for side in rows.values() for row in side):
            return
        await asyncio.sleep(0.05)


def _count(answers: list[tuple[str, Answer]], rows: list[timeline.Row]) -> dict[str, Any]:
    fine = [answer for name, answer in answers if name == "fine"]
    milliseconds = sorted(1000 * answer.seconds for answer in fine)
    return {
        "sent": len(answers),
        "fine": len(fine),
        "answered": sum(answer.status == 200 and answer.is_whole for answer in fine),
        "found_none": sum(row.found_none for row in rows),
        "lost": sum(row.lost for row in rows),
        "p50": round(statistics.median(milliseconds)) if milliseconds else None,
        "p99": round(milliseconds[int(len(milliseconds) * 0.99)]) if milliseconds else None,
    }


RUNS = {"endings": endings, "mixed": mixed}
