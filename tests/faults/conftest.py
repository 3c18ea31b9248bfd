"""
Servers of the tests' own, as they are killed: never what ``DATABASE_URL`` and
``REDIS_URL`` name.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import asyncpg
import httpx
import pytest
from redis.asyncio import Redis

from demo.servers import Server, start_postgres, start_redis
from tests.faults.proxy import Proxy, proxy
from tests.slowness import within
from tests.uvicorn import Server as Uvicorn
from tests.uvicorn import uvicorn

POOL_SIZE = 5

T = TypeVar("T")

# Seconds after which a request counts as one that hangs. All timeouts of the site together are
# shorter; the rest is for a machine that is busy.
HANGS = within(15.0)


async def eventually(attempt: Callable[[], Awaitable[T]], seconds: float = 20) -> T:
    """What ``attempt`` returns, tried until it raises no AssertionError."""
    deadline = time.monotonic() + within(seconds)
    while True:
        try:
            return await attempt()
        except AssertionError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.02)


StartSite = Callable[..., Awaitable["Site"]]


class Site:
    def __init__(self, server: Uvicorn, database: Server, broker: Server) -> None:
        self.server = server
        self.database = database
        self.broker = broker
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=server.url, timeout=HANGS, limits=limits)
        self.numbers = itertools.count(1)
        self.quiet: dict[str, Any] = {}  # its state when nothing has happened yet

    async def get(self, path: str, **query: object) -> tuple[int, str]:
        answer = await self.client.get(path, params={key: str(query[key]) for key in query})
        return answer.status_code, answer.text

    def start(self, path: str, **query: object) -> "asyncio.Task[tuple[int, str]]":
        return asyncio.create_task(self.get(path, **query))

    async def state(self) -> dict[str, Any]:
        state: dict[str, Any] = (await self.client.get("/state")).json()
        return state

    async def at_gate(self, name: str, count: int = 1) -> None:
        async def there() -> None:
            assert (await self.state())["waiting"].count(name) == count

        await eventually(there)

    async def query(self, statement: str) -> "list[asyncpg.Record]":
        """Ask PostgreSQL itself, past the site."""
        connection = await asyncpg.connect(self.database.url)
        try:
            return await connection.fetch(statement)
        finally:
            await connection.close()

    async def works(self) -> None:
        """By itself: nobody has told it that anything is well again."""
        assert await self.get("/") == (200, "2")

    async def state_when_all_is_torn_down(self) -> dict[str, Any]:
        """But for the lifespan's pool and client, the ones that it started with."""
        state = await self.state()
        lifespan = {"pool": 1, "redis": 1}
        assert state.pop("set up") == state.pop("torn down") | lifespan
        return state

    async def is_quiet(self) -> None:
        """Nothing is open that should not be, in the site or in its servers."""
        assert await self.state_when_all_is_torn_down() == self.quiet
        backends = await self.query(
            "SELECT state FROM pg_stat_activity WHERE application_name = 'site'"
        )
        assert [backend["state"] for backend in backends] == ["idle"] * POOL_SIZE
        async with Redis.from_url(self.broker.url) as redis:
            assert await redis.pubsub_numsub("news") == [(b"news", 0)]

    async def recovers(self) -> None:
        await eventually(self.works)
        # Again, if need be: a request may not wait long for its connection.
        await eventually(self.each_connection_works)
        await eventually(self.is_quiet)

    async def each_connection_works(self) -> None:
        """One that was lost is opened again when it is needed."""
        gate = f"recovery {next(self.numbers)}"
        tasks = [self.start("/between-statements", gate=gate) for _ in range(POOL_SIZE)]

        async def all_wait_or_are_answered() -> None:
            waiting = (await self.state())["waiting"].count(gate)
            assert waiting + sum(task.done() for task in tasks) == POOL_SIZE

        await eventually(all_wait_or_are_answered)
        await self.get("/open-gate", gate=gate)
        assert await asyncio.gather(*tasks) == [(200, "2")] * POOL_SIZE


@pytest.fixture(scope="session")
def database() -> Iterator[Server]:
    with start_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def broker() -> Iterator[Server]:
    with start_redis() as server:
        yield server


@pytest.fixture
def database_line(database: Server) -> Iterator[Proxy]:
    with proxy(database.url) as line:
        yield line


@pytest.fixture
def broker_line(broker: Server) -> Iterator[Proxy]:
    with proxy(broker.url) as line:
        yield line


@pytest.fixture
async def start_site(database: Server, broker: Server) -> AsyncIterator[StartSite]:
    async with AsyncExitStack() as stack:

        async def start(**environment: str) -> Site:
            urls = {"DATABASE_URL": database.url, "REDIS_URL": broker.url}
            server = stack.enter_context(
                uvicorn(
                    "tests.faults.site",
                    *["--timeout-graceful-shutdown", "1", "--no-access-log"],
                    **{**urls, **environment},
                )
            )
            # What pytest shows should the test fail.
            stack.callback(lambda: print(*server.lines, sep="\n"))
            site = Site(server, database, broker)
            stack.push_async_callback(site.client.aclose)
            await site.query("DROP TABLE IF EXISTS writes")
            await site.query("CREATE TABLE writes (id bigint PRIMARY KEY)")
            await site.works()
            site.quiet = await eventually(site.state_when_all_is_torn_down)
            return site

        yield start


@pytest.fixture
async def site(start_site: StartSite) -> Site:
    return await start_site()
