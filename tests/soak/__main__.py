import argparse
import asyncio
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import django

import tests.soak
from demo.servers import start_postgres, start_redis
from tests.soak import dice
from tests.soak.faults import Faults
from tests.soak.visitors import Findings, Line, Visitor
from tests.uvicorn import ROOT, Server

ROUND = 5.0  # seconds of visits; then all comes to rest
REST = 30.0  # seconds in which it must
WARM_UP = 2  # rounds, after which memory may no longer grow by more than this:
GROWTH = 24 * 2**20
MOST_CONNECTIONS = 100  # that the site keeps to its servers
MOST_REQUESTS = 2_000_000  # findings are kept of each


class Soak:
    def __init__(self, options: argparse.Namespace, server: Server, faults: Faults) -> None:
        self.options = options
        self.server = server
        self.url = server.url
        self.faults = faults
        self.findings = Findings()
        self.leaks: list[str] = []
        self.lost: set[int] = set()
        self.violations: Counter[str] = Counter()
        self.memory: list[int] = []
        self.state: dict[str, Any] = {}
        self.seconds = 0.0

    async def run(self) -> None:
        await self.faults.query("CREATE TABLE written (token bigint)")
        first = Visitor(self.url, dice(0), self.findings)
        await first.spend("stays", "/async?token=0&steps=db.redis.straggler&end=fine", "0", "fine")
        first.hang_up()
        quiet = await self.quiet()
        started = time.monotonic()
        end = started + 60 * self.options.minutes
        number = 0
        while time.monotonic() < end and self.findings.requests < MOST_REQUESTS:
            number += 1
            await self.round(number, min(ROUND, end - time.monotonic()))
            await self.rest(quiet)
            self.memory.append(self.state["memory"])
            print(
                f"round {number}: {self.findings.requests} requests, "
                f"{self.memory[-1] / 2**20:.1f} MB, {self.state['threads']} threads, "
                f"{self.state['scope objects']} scopes",
                flush=True,
            )
            if self.leaks or self.findings.hung:  # they would be found in each round to come
                break
        self.seconds = time.monotonic() - started
        await self.shut_down()
        await self.count_writes()

    async def quiet(self) -> dict[str, Any]:
        """What is open when nobody visits: the same twice in a row, with no request among it."""
        before: dict[str, Any] = {}
        while True:
            await self.look()
            if self.state["open"] == before and not before["requests"]:
                return before
            before = self.state["open"]
            await asyncio.sleep(0.3)

    async def look(self) -> None:
        line = await Line.open(self.url, small=False)
        try:
            await line.ask("/state")
            self.state = json.loads((await line.answer())[1])
        finally:
            line.hang_up()

    async def round(self, number: int, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(self.faults.strike(until))
            for visitor in range(self.options.concurrency):
                chances = dice(self.options.seed, number, visitor)
                group.create_task(Visitor(self.url, chances, self.findings).stay(until))

    async def rest(self, quiet: dict[str, Any]) -> None:
        """Wait until nothing is open that was not open before the first round."""
        deadline = time.monotonic() + REST
        while True:
            await self.look()
            servers = await self.in_servers()
            left = {
                kind: value for kind, value in self.state["open"].items() if value != quiet[kind]
            }
            # Closed ones, in the Contexts of uvicorn's timers and of the connections that were
            # opened in their request.
            kept = self.state["scope objects"]
            if kept > MOST_CONNECTIONS + self.options.concurrency:
                left["scopes kept"] = kept
            if not left and not servers:
                break
            if time.monotonic() > deadline:
                self.leaks.append(f"{left | servers}, where {quiet} was expected")
                break
            await asyncio.sleep(0.1)
        open_now = len(self.state["open"]["resources"])
        if self.state["set up"] != self.state["torn down"] + open_now:
            self.leaks.append(
                f"{self.state['set up']} set-ups, {self.state['torn down']} teardowns"
            )

    async def in_servers(self) -> dict[str, Any]:
        busy = await self.faults.query(
            "SELECT query FROM pg_stat_activity"
            " WHERE application_name = 'soak site' AND state <> 'idle'"
        )
        subscribed = await self.faults.command("PUBSUB", "NUMSUB", "news")
        found = {"busy backends": [row["query"] for row in busy], "subscribers": subscribed[1]}
        return {kind: value for kind, value in found.items() if value}

    async def shut_down(self) -> None:
        """Amid visits: what is open then is cancelled, and torn down all the same."""
        chances = dice(self.options.seed, "end")
        findings = Findings()  # of no interest: whether an answer is cut is up to the server
        visits = [
            asyncio.create_task(Visitor(self.url, chances, findings).visit(manner))
            for manner in ["stalls", "", "", "", ""] * max(1, self.options.concurrency // 5)
        ]
        await asyncio.sleep(0.3)  # so that some have begun, and few have ended
        try:
            await asyncio.to_thread(self.server.stop, signal.SIGTERM, REST)
            kept, violations = json.loads(self.server.wait_for(r"^LEDGER (.*)")[1])
        except (subprocess.TimeoutExpired, AssertionError) as error:
            self.findings.hung.append(f"the shutdown: {error}")
        else:
            self.violations.update(violations)
            if kept:
                self.leaks.append(f"{kept} after the shutdown")
        for visit in visits:
            visit.cancel()
        await asyncio.wait(visits)

    async def count_writes(self) -> None:
        stored = {row["token"] for row in await self.faults.query("SELECT token FROM written")}
        self.lost = self.findings.acknowledged - stored

    def problems(self) -> list[str]:
        found = [f"leaked: {leak}" for leak in self.leaks]
        found += [f"lost: {token}" for token in sorted(self.lost)[:20]]
        found += [f"hung: {visit}" for visit in self.findings.hung[:20]]
        violations = self.violations + self.findings.violations
        found += [f"{count} x {what}" for what, count in violations.most_common()]
        if self.growth > GROWTH:
            found.append(f"leaked: memory grew by {self.growth / 2**20:.1f} MB after the warm-up")
        if self.findings.endings["fine"] < self.findings.requests / 4:
            found.append("vacuous: too few requests ended well for the rest to mean anything")
        return found

    @property
    def growth(self) -> int:
        return self.memory[-1] - self.memory[min(WARM_UP, len(self.memory)) - 1]

    def report(self) -> None:
        endings, struck = self.findings.endings, self.faults.struck
        print(
            f"requests    {self.findings.requests}, {self.findings.requests / self.seconds:.0f}/s"
        )
        print(f"endings     {_listed(endings)}")
        print(f"faults      {struck.total()}: {_listed(struck)}")
        print(f"resources   {self.state['set up']} set up, {self.state['torn down']} torn down")
        print(f"writes      {len(self.findings.acknowledged)} acknowledged")
        print(f"memory      {self.memory[-1] / 2**20:.1f} MB, {self.growth / 2**20:+.1f} MB")
        print(f"seed        {self.options.seed}")
        print(
            f"leaked {len(self.leaks)}, lost {len(self.lost)}, hung {len(self.findings.hung)}, "
            f"other violations {(self.violations + self.findings.violations).total()}"
        )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


@contextmanager
def serving(**environment: str) -> Iterator[Server]:
    """Not as tests.uvicorn does it: development mode costs half of the load."""
    process = subprocess.Popen(
        [
            *[sys.executable, "-m", "uvicorn", "tests.soak.site:application", "--port", "0"],
            *["--timeout-graceful-shutdown", "0", "--no-access-log"],
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "", **environment},
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=tests.soak.__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--concurrency", type=int, default=50)
    options = parser.parse_args()
    print(
        f"soak: seed {options.seed}, {options.minutes:g} minutes, {options.concurrency} visitors, "
        f"Python {platform.python_version()}, Django {django.__version__}",
        flush=True,
    )
    # Servers of its own, for they are killed.
    with start_postgres() as database, start_redis() as broker:
        environment = {
            "DATABASE_URL": database.url,
            "REDIS_URL": broker.url,
            "SOAK_SEED": str(options.seed),
        }
        with serving(**environment) as server:
            faults = Faults(database, broker, dice(options.seed, "faults"))
            soak = Soak(options, server, faults)
            asyncio.run(soak.run())
    soak.report()
    problems = soak.problems()
    for problem in problems:
        print(f"VIOLATION   {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
