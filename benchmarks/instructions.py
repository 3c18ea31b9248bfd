"""
``python -m benchmarks.instructions``: the work on scopes, and requests in process, in instructions,
which callgrind counts (``apt-get install valgrind``); and scopes in bytes. Writes
``docs/benchmarks-instructions.md``.

Each figure is the difference between a process that does all work a few times and one that does
some of it more often: so what a start costs is in none. They move by less than a hundredth from
run to run, where seconds move by a tenth with what else the machine does.
"""

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.check import check
from benchmarks.counted import CONTENDERS
from benchmarks.memory import bytes_per_scope
from benchmarks.questions import REQUESTS, WORKS, Request, Work
from benchmarks.report import Machine, page_of_instructions

__all__ = ["count", "count_requests"]

_FEW = 100  # times, after which Python has specialized what it runs
_PATIENCE = 900  # seconds


async def count(contender: str, works: Iterable[Work]) -> dict[str, float]:
    """Instructions for one of each, by key. The contender by its function's name."""
    few = {work.key: _FEW for work in works}
    at_once = asyncio.Semaphore(os.cpu_count() or 1)

    async def run(times: Mapping[str, int]) -> int:
        async with at_once:
            plan = (f"{key}:{number}" for key, number in times.items())
            return await _count("counted", contender, *plan)

    more = [run(few | {work.key: _FEW + work.counted}) for work in works]
    least, *counts = await asyncio.gather(run(few), *more)
    return {
        work.key: (whole - least) / work.counted for work, whole in zip(works, counts, strict=True)
    }


async def count_requests(application: str, request: Request) -> float:
    """Instructions for one request."""

    async def run(times: int) -> int:
        plan = ("--kind", request.kind, "--count", f"{request.path}:{times}")
        return await _count("worker", application, *plan)

    least, whole = await asyncio.gather(run(_FEW), run(_FEW + request.counted))
    return (whole - least) / request.counted


async def _count(module: str, *arguments: str) -> int:
    process = await asyncio.create_subprocess_exec(
        *("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"),
        *(sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", *arguments),
        env=os.environ | {"PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        said = (await asyncio.wait_for(process.communicate(), _PATIENCE))[1].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    found = re.search(r"Collected : (\d+)", said)
    if process.returncode or found is None:
        raise RuntimeError(f"{arguments[0]}: valgrind says\n{said}")
    return int(found[1])


async def _main(directory: Path | None, only: list[str], kind: str) -> None:
    figures = {} if kind == "requests" else await _count_scopes(only)
    of_requests = {} if kind == "scopes" else await _count_requests(only)
    if directory is not None:
        path = directory / "benchmarks-instructions.md"
        path.write_text(page_of_instructions(WORKS, figures, REQUESTS, of_requests, Machine.here()))
        print(f"\nWritten to {path}")


async def _count_requests(only: list[str]) -> dict[str, dict[str, float]]:
    figures: dict[str, dict[str, float]] = {}
    for request in REQUESTS:
        mine = figures[request.key] = {}
        for name in request.applications:
            if not only or name in only:
                mine[name] = await count_requests(name, request)
                unit = mine.get(request.unit)
                ratio = "" if unit is None else f"  {unit / mine[name]:.2f} x {request.unit}"
                print(f"{name:20} {request.key:18} {mine[name]:10,.0f}{ratio}", flush=True)
    return figures


async def _count_scopes(only: list[str]) -> dict[str, dict[str, float]]:
    figures: dict[str, dict[str, float]] = {}
    for key, make in CONTENDERS.items():
        try:
            contender = make()
        except ImportError:
            continue
        if only and contender.name not in only:
            continue
        failures = await check(contender)
        mine = await count(key, [work for work in WORKS if work.kind not in failures])
        mine["memory"] = await bytes_per_scope(contender)
        figures[contender.name] = mine
        _show(contender.name, figures)
    return figures


def _show(name: str, figures: Mapping[str, Mapping[str, float]]) -> None:
    units = {work.key: work.unit for work in WORKS} | {"memory": "AsyncExitStack"}
    for key, figure in figures[name].items():
        unit = figures.get(units[key], {}).get(key)
        ratio = "" if unit is None else f"  {figure / unit:.2f} x {units[key]}"
        print(f"{name:20} {key:9} {figure:10,.0f}{ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="these contenders")
    parser.add_argument("--output", type=Path, help="where to write; docs/ by default, if all")
    parser.add_argument("--kind", choices=["scopes", "requests"], default="", help="half of it")
    arguments = parser.parse_args()
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not there: `apt-get install valgrind`.")
    directory = arguments.output
    if directory is None and not arguments.only and not arguments.kind:
        directory = Path(__file__).parent.parent / "docs"
    only = arguments.only
    if only and directory is not None:
        only += ["AsyncExitStack", "hand-written", "scoped"]  # the units of the page
    asyncio.run(_main(directory, only, arguments.kind))


if __name__ == "__main__":
    main()
