"""The process whose instructions are counted: it does each WORK:TIMES that is on its line."""

import asyncio
import sys
from collections.abc import Callable

from benchmarks.contenders import Contender, async_exit_stack, by_hand, ours
from benchmarks.peers import PEERS
from benchmarks.questions import WORKS

__all__ = ["CONTENDERS"]

CONTENDERS: dict[str, Callable[[], Contender]] = {
    make.__name__: make for make in (async_exit_stack, by_hand, ours, *PEERS)
}


async def _main(name: str, *plan: str) -> None:
    contender, works = CONTENDERS[name](), {work.key: work for work in WORKS}
    for key, _, times in (part.partition(":") for part in plan):
        await works[key].do(contender)(int(times))


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
