"""Requests through the web applications, each of which has a process of its own."""

# ruff: noqa: PLC0415 (needed only where there is no wrk)

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from time import perf_counter

from benchmarks.measure import interleave, pin

__all__ = ["CONNECTIONS", "LOAD_GENERATOR", "in_process", "under_uvicorn"]

CONNECTIONS = 16
LOAD_GENERATOR = "wrk" if shutil.which("wrk") else "aiohttp"
_PATIENCE = 60


@asynccontextmanager
async def _worker(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A worker, and the line that it wrote when it was ready."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-m", "benchmarks.worker", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=partial(pin, 0),
    )
    try:
        yield process, await _line(process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _line(process: asyncio.subprocess.Process) -> str:
    if process.stdout is None:
        return ""
    line = await asyncio.wait_for(process.stdout.readline(), _PATIENCE)
    if not line:
        raise RuntimeError("A worker has ended. What it wrote above says why.")
    return line.decode().strip()


async def _side_by_side(
    applications: Iterable[str],
    options: list[str],
    figure: Callable[[asyncio.subprocess.Process, str], Awaitable[float]],
    repetitions: int,
) -> dict[str, list[float]]:
    async with AsyncExitStack() as stack:
        contenders = {}
        for name in applications:
            worker = await stack.enter_async_context(_worker(name, *options))
            contenders[name] = partial(figure, *worker)
        return await interleave(contenders, repetitions)


async def in_process(
    applications: Iterable[str], path: str, n: int, repetitions: int, kind: str = ""
) -> dict[str, list[float]]:
    """Seconds for one request, one after the other."""

    async def figure(process: asyncio.subprocess.Process, _: str) -> float:
        if process.stdin is not None:
            process.stdin.write(json.dumps([path, n]).encode() + b"\n")
        return float(await _line(process))

    return await _side_by_side(applications, ["--kind", kind], figure, repetitions)


async def under_uvicorn(
    applications: Iterable[str], path: str, seconds: int, repetitions: int
) -> dict[str, list[float]]:
    """Seconds for one request, as a load generator with a CPU of its own sees it."""
    load = _wrk if LOAD_GENERATOR == "wrk" else _aiohttp

    async def figure(_: asyncio.subprocess.Process, port: str) -> float:
        return 1 / await load(f"http://127.0.0.1:{port}{path}", seconds)

    return await _side_by_side(applications, ["--serve"], figure, repetitions)


async def _wrk(url: str, seconds: int) -> float:
    """Requests per second."""
    process = await asyncio.create_subprocess_exec(
        *("wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", url),
        stdout=subprocess.PIPE,
        preexec_fn=partial(pin, 1),
    )
    out = (await asyncio.wait_for(process.communicate(), _PATIENCE))[0].decode()
    if "Non-2xx" in out or "Socket errors" in out:
        raise RuntimeError(f"wrk met errors at {url}:\n{out}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", out)
    if found is None:
        raise RuntimeError(f"wrk said what is not understood:\n{out}")
    return float(found[1])


async def _aiohttp(url: str, seconds: int) -> float:
    """The same in this process, which is on the other CPU; slower than what it is to load."""
    import aiohttp

    count, end = 0, perf_counter() + seconds

    async def connection(session: aiohttp.ClientSession) -> None:
        nonlocal count
        while perf_counter() < end:
            async with session.get(url) as response:
                response.raise_for_status()
                await response.read()
            count += 1

    started = perf_counter()
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(connection(session) for _ in range(CONNECTIONS)))
    return count / (perf_counter() - started)
