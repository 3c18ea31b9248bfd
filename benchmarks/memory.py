"""What many scopes cost that are open at once, each in a task of its own."""

import asyncio
import gc
import tracemalloc

from benchmarks.contenders import Contender
from benchmarks.work import Part

__all__ = ["SCOPES", "bytes_per_scope"]

SCOPES = 1_000


async def bytes_per_scope(contender: Contender) -> float:
    """A task that only waits is what they are compared with."""
    await _held(contender)  # what is made once and kept is not theirs
    return (await _held(contender) - await _held(None)) / SCOPES


async def _held(contender: Contender | None) -> int:
    release, held = asyncio.Event(), []

    async def wait(_: list[Part], release: asyncio.Event) -> None:
        await release.wait()

    hold = wait if contender is None else contender.hold
    gc.collect()
    tracemalloc.start()
    tasks = [asyncio.create_task(hold(held, release)) for _ in range(SCOPES)]
    for _ in range(20):
        await asyncio.sleep(0)
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    if contender is not None and len(held) != SCOPES:
        raise RuntimeError(f"{contender.name} has opened {len(held)} of {SCOPES} scopes")
    release.set()
    await asyncio.gather(*tasks)
    return size
