"""
``python -m benchmarks.instructions``: the work on scopes in instructions, which callgrind counts
(``apt-get install valgrind``), and in bytes. Writes ``docs/benchmarks-instructions.md``.

Each figure is the difference between a process that does the work a few times and one that does it
more often: so what a start costs is in none. On a machine that is busy they differ by less than
one in a hundred from run to run, where seconds differ by ten.
"""

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.check import check
from benchmarks.contenders import async_exit_stack, by_hand, ours
from benchmarks.memory import bytes_per_scope
from benchmarks.peers import PEERS
from benchmarks.questions import WORKS, Work
from benchmarks.report import Machine, page_of_instructions

__all__ = ["count"]

_FEW = 100  # times, after which Python has specialized what it runs
_PATIENCE = 600  # seconds

_CONTENDERS = [async_exit_stack, by_hand, ours, *PEERS]


async def count(contender: str, work: Work) -> float:
    """Instructions for one of it."""
    few, more = await asyncio.gather(
        _count(contender, work, _FEW), _count(contender, work, _FEW + work.counted)
    )
    return (more - few) / work.counted


async def _count(contender: str, work: Work, n: int) -> int:
    process = await asyncio.create_subprocess_exec(
        *("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"),
        *(sys.executable, "-W", "ignore", "-m", "benchmarks.instructions"),
        *("--do", contender, work.key, str(n)),
        env=os.environ | {"PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    said = (await asyncio.wait_for(process.communicate(), _PATIENCE))[1].decode()
    found = re.search(r"Collected : (\d+)", said)
    if process.returncode or found is None:
        raise RuntimeError(f"{contender}, {work.title}: valgrind says\n{said}")
    return int(found[1])


async def _do(name: str, key: str, n: int) -> None:
    for make in _CONTENDERS:
        if make.__name__ == name:
            [work] = [work for work in WORKS if work.key == key]
            await work.do(make())(n)


async def _main(directory: Path | None, only: list[str]) -> None:
    figures: dict[str, dict[str, float]] = {}
    for make in _CONTENDERS:
        try:
            contender = make()
        except ImportError:
            continue
        if only and contender.name not in only:
            continue
        failures = await check(contender)
        mine = figures[contender.name] = {
            work.key: await count(make.__name__, work)
            for work in WORKS
            if work.kind not in failures
        }
        if "hold" not in failures:
            mine["memory"] = await bytes_per_scope(contender)
        _show(contender.name, mine, figures)
    if directory is not None:
        path = directory / "benchmarks-instructions.md"
        path.write_text(page_of_instructions(WORKS, figures, Machine.here()))
        print(f"\nWritten to {path}")


def _show(name: str, mine: Mapping[str, float], figures: Mapping[str, Mapping[str, float]]) -> None:
    units = {work.key: work.unit for work in WORKS} | {"memory": "AsyncExitStack"}
    for key, figure in mine.items():
        unit = figures.get(units[key], {}).get(key)
        ratio = "" if unit is None else f"  {figure / unit:.2f} x {units[key]}"
        print(f"{name:20} {key:9} {figure:10,.0f}{ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="contenders; then nothing is written")
    parser.add_argument("--output", type=Path, help="where to write; docs/ by default")
    parser.add_argument("--do", nargs=3, help=argparse.SUPPRESS)  # in a process that is counted
    arguments = parser.parse_args()
    if arguments.do:
        name, key, n = arguments.do
        asyncio.run(_do(name, key, int(n)))
        return
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not there: `apt-get install valgrind`.")
    directory = arguments.output
    if directory is None and not arguments.only:
        directory = Path(__file__).parent.parent / "docs"
    asyncio.run(_main(directory, arguments.only))


if __name__ == "__main__":
    main()
