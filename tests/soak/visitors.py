"""Those who visit: what they ask for, how they leave, and what they find wrong with the answer."""

import asyncio
import itertools
import json
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import urlsplit

# Seconds after which a visit counts as one that hangs. The site's own timeouts, one after the
# other, are shorter; the rest is for a machine that is busy.
HANGS = 30.0

STEPS = [
    *["db", "write", "redis", "subscription", "children", "cancelled_child", "timeout"],
    *["thread", "nested", "straggler", "sleep"],
]
# Those in which a cancellation is not lost: by redis-py on Python 3.11 (asyncio.wait_for), and by
# asgiref in a thread.
HEEDFUL = ["db", "write", "children", "cancelled_child", "timeout", "straggler", "sleep"]
# How a visit goes, and how often. Besides there is "stalls": to read nothing, and not to leave.
MANNERS = (["stays", "leaves", "half a body", "slow", "pipelines"], [70, 14, 3, 8, 5])
FLAKY = ["flaky", "bad_setup", "bad_teardown"]


@dataclass
class Findings:
    """What all visitors have seen."""

    endings: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    acknowledged: set[int] = field(default_factory=set)
    tickets: dict[int, str] = field(default_factory=dict)  # by whom each was seen
    hung: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(self.endings.values())

    def note(self, line: dict[str, Any], token: str) -> None:
        """One line that the site has sent."""
        if line["token"] != token:
            self.violations["a request was answered with another's answer"] += 1
        if self.tickets.setdefault(line["ticket"], token) != token:
            self.violations["two requests had the same resource"] += 1
        if line["wrote"]:
            self.acknowledged.add(int(token))


class CutError(Exception):
    """The site closed the connection before the end of its answer."""


class Line:
    """A connection to the site."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, url: str, *, small: bool) -> "Line":
        """``small``: with buffers that are soon full."""
        address = urlsplit(url)
        end = socket.socket()
        if small:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        end.setblocking(False)
        try:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(end, (address.hostname, address.port))
            return cls(*await asyncio.open_connection(sock=end, limit=4096 if small else 65536))
        except BaseException:
            end.close()
            raise

    async def ask(self, target: str, *, body: int = 0) -> None:
        method = "POST" if body else "GET"
        self.writer.write(
            f"{method} {target} HTTP/1.1\r\nHost: soak\r\nContent-Length: {body}\r\n\r\n".encode()
        )
        await self.writer.drain()

    async def answer(self, pause: float = 0) -> tuple[int, str]:
        """Raises CutError where it has no end."""
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
            body = b""
            if "transfer-encoding: chunked" in head:
                while size := int(await self.reader.readline() or b"z", 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                    await asyncio.sleep(pause)
                await self.reader.readexactly(2)
            else:
                length = int(head.partition("content-length: ")[2].split("\r\n")[0])
                body = await self.reader.readexactly(length)
        except (OSError, EOFError, ValueError) as error:
            raise CutError from error
        return int(head.split()[1]), body.decode()

    def hang_up(self, *, rudely: bool = False) -> None:
        if rudely:  # RST in place of FIN
            end = self.writer.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()


class Visitor:
    """Visits the site again and again, mostly by one connection."""

    tokens = itertools.count(1)

    def __init__(self, url: str, random: Random, findings: Findings) -> None:
        self.url = url
        self.random = random
        self.findings = findings
        self.line: Line | None = None

    async def stay(self, until: float) -> None:
        clock = asyncio.get_running_loop().time
        try:
            while clock() < until:
                await self.visit()
        finally:
            self.hang_up()

    def hang_up(self, *, rudely: bool = False) -> None:
        if self.line is not None:
            self.line.hang_up(rudely=rudely)
            self.line = None

    def wish(self, manner: str) -> tuple[str, str, str]:
        """A program for the site: its path and query, its token, and how it is to end."""
        random = self.random
        stalls = manner == "stalls"
        kind = "stream" if stalls else random.choice(["async", "async", "sync", "stream"])
        steps = random.choices(STEPS, k=random.randrange(1, 5))
        if stalls:
            steps = ["sleep"] * 5
        if steps.count("write") > 1:
            steps = ["write"]
        if random.random() < 0.3:
            steps.insert(random.randrange(len(steps) + 1), random.choice(FLAKY))
        if manner == "leaves" and kind != "sync" and random.random() < 0.5:
            steps = [step for step in steps if step in HEEDFUL] + ["hang"]
        endings = ["fine"] * 6 + ["raise"] * 2 + ["404"] * (kind != "stream")
        end, token = random.choice(endings), str(next(self.tokens))
        # What is not read lets the site wait in the middle of a stream.
        size = 2_000_000 if stalls else random.choice([0, 100, 20_000, 200_000])
        query = f"token={token}&steps={'.'.join(steps)}&end={end}&size={size}"
        return f"/{kind}?{query}", token, end

    async def visit(self, manner: str = "") -> None:
        manner = manner or self.random.choices(*MANNERS)[0]
        target, token, end = self.wish(manner)
        try:
            async with asyncio.timeout(HANGS):
                self.findings.endings[await self.spend(manner, target, token, end)] += 1
        except TimeoutError:
            self.findings.hung.append(f"{manner}: {target}")
            self.hang_up()

    async def spend(self, manner: str, target: str, token: str, end: str) -> str:
        small = manner in ("slow", "stalls")
        if small or self.random.random() < 0.1:
            self.hang_up()
        try:
            if self.line is None:
                self.line = await Line.open(self.url, small=small)
            line = self.line
            if manner == "half a body":
                await line.ask(target, body=1000)
                line.writer.write(b"x" * self.random.randrange(1000))
            else:
                await line.ask(target)
            if manner == "pipelines":
                target, other, its_end = self.wish(manner)
                await line.ask(target)
                self.findings.endings[self.judge(*await line.answer(), token, end)] += 1
                token, end = other, its_end
            if manner == "stalls":
                await asyncio.sleep(HANGS)
            if manner in ("leaves", "half a body"):
                await asyncio.sleep(self.random.random() ** 2 / 4)
                self.hang_up(rudely=self.random.random() < 0.5)
                return "client left" if manner == "leaves" else "client left within its body"
            pause = self.random.random() / 10 if manner == "slow" else 0
            ending = self.judge(*await line.answer(pause), token, end)
            return f"{ending}, read slowly" if manner == "slow" else ending
        except (CutError, OSError):
            self.hang_up()
            # Planned, or by a fault: the site tells which, and whether it was neither.
            return "stream raised" if end == "raise" else "cut by a fault"

    def judge(self, status: int, body: str, token: str, end: str) -> str:
        if status == 503:
            return f"503 {body}"
        if (status, end) == (200, "fine"):
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                self.findings.note(line, token)
            if len(lines) > 1 and not lines[-1].get("end"):
                self.findings.violations["a stream ended early, and as if it were complete"] += 1
            return "fine"
        if (status, end, body) == (500, "raise", "planned"):
            return "view raised"
        if (status, end) == (404, "404"):
            return "not found"
        self.findings.violations[f"{status} where {end} was planned: {body[:100]}"] += 1
        return "wrong"
