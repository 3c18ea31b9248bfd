"""
Real servers, real faults. What every test asks of the site: no request hangs,
it recovers by itself, nothing is stranded, and no write that was acknowledged
is lost.
"""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest.mock import ANY

import httpx
import pytest

from tests.faults.conftest import HANGS, POOL_SIZE, eventually

pytestmark = pytest.mark.faults

# The connection whose request waits at a gate, or in a statement, known by its last statement.
TERMINATE = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = 'site' AND query IN ('SELECT 1', 'SELECT pg_sleep(60)')
"""


class Load:
    """Ten clients that write without a pause."""

    def __init__(self, site):
        self.site = site
        self.acknowledged = set()
        self.refused = []

    async def write(self):
        while True:
            number = next(self.site.numbers)
            status, text = await self.site.get("/write", id=number)  # raises where it hangs
            if status == 200:
                self.acknowledged.add(number)
            else:
                self.refused.append((status, text))

    async def more(self, attribute, count):
        goal = len(getattr(self, attribute)) + count

        async def reached():
            assert len(getattr(self, attribute)) >= goal

        await eventually(reached)

    async def none_is_lost(self):
        stored = {row["id"] for row in await self.site.query("SELECT id FROM writes")}
        assert self.acknowledged
        assert self.acknowledged - stored == set()


@asynccontextmanager
async def load(site) -> AsyncIterator[Load]:
    load = Load(site)
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(load.write()) for _ in range(10)]
        yield load
        for client in clients:
            client.cancel()


# One connection is lost


@pytest.mark.parametrize("where", ["/in-statement", "/in-child", "/between-statements"])
async def test_a_terminated_backend_fails_its_own_request_and_no_other(site, where):
    bystander = site.start("/in-transaction", gate="bystander")
    await site.at_gate("bystander")
    struck = site.start(where, gate="struck")

    async def terminated():
        assert await site.query(TERMINATE)

    await eventually(terminated)
    await site.get("/open-gate", gate="struck")
    status, text = await struck
    assert (status, text) == (503, ANY)
    assert re.search("connection|closed", text)  # in the driver's words
    await site.get("/open-gate", gate="bystander")
    assert (await bystander)[0] == 200
    await site.recovers()


async def test_a_backend_terminated_under_a_stream_ends_the_stream(site):
    with pytest.raises(httpx.RemoteProtocolError):  # cut short, and the client can tell
        async with site.client.stream("GET", "/in-stream") as stream:
            async for line in stream.aiter_lines():
                assert line == "1"
                await site.query(TERMINATE)
    await site.recovers()


# A server is lost


async def test_postgres_is_killed_in_mid_load_and_started_again(site):
    async with load(site) as writers:
        await writers.more("acknowledged", 50)
        await asyncio.to_thread(site.database.kill)
        await writers.more("refused", 20)
        await asyncio.to_thread(site.database.restart)
        await writers.more("acknowledged", 50)
    assert [answer for answer in writers.refused if answer[0] != 503] == []
    await site.recovers()
    await writers.none_is_lost()


async def test_redis_is_killed_in_mid_load_and_started_again(site):
    async def watch():
        async with site.client.stream("GET", "/events", timeout=None) as stream:
            async for _ in stream.aiter_lines():
                pass

    watchers = [asyncio.create_task(watch()) for _ in range(10)]
    async with load(site) as writers:
        await writers.more("acknowledged", 50)
        await asyncio.to_thread(site.broker.kill)
        async with asyncio.timeout(HANGS):
            ends = await asyncio.gather(*watchers, return_exceptions=True)
        assert {type(end) for end in ends} == {httpx.RemoteProtocolError}
        await writers.more("refused", 20)
        await asyncio.to_thread(site.broker.restart)
        await writers.more("acknowledged", 50)
    assert [answer for answer in writers.refused if answer[0] != 503] == []
    await site.recovers()
    # In PostgreSQL: this Redis keeps nothing on disk.
    await writers.none_is_lost()


# The pool is exhausted


async def test_who_finds_the_pool_exhausted_is_told_so(start_site):
    site = await start_site(ACQUIRE_TIMEOUT="1")
    holders = [site.start("/between-statements", gate="hold") for _ in range(POOL_SIZE)]
    await site.at_gate("hold", POOL_SIZE)
    answers = await asyncio.gather(*[site.get("/") for _ in range(10)])
    assert (
        answers == [(503, "PoolExhaustedError: no connection within 1 seconds: 5 of 5 in use")] * 10
    )
    await site.get("/open-gate", gate="hold")
    assert await asyncio.gather(*holders) == [(200, "2")] * POOL_SIZE
    await site.recovers()


async def test_who_waits_is_served_though_others_give_up(start_site):
    site = await start_site(ACQUIRE_TIMEOUT=str(HANGS))
    holders = [site.start("/between-statements", gate="hold") for _ in range(POOL_SIZE)]
    await site.at_gate("hold", POOL_SIZE)
    quiet = site.quiet["open scopes"]
    waiters = [site.start("/") for _ in range(20)]

    async def open_scopes(count):
        assert (await site.state())["open scopes"] - quiet == count

    await eventually(lambda: open_scopes(POOL_SIZE + 20))
    for waiter in waiters[::2]:
        waiter.cancel()  # closes the client's end
    await eventually(lambda: open_scopes(POOL_SIZE + 10))
    await site.get("/open-gate", gate="hold")
    assert await asyncio.gather(*holders, *waiters[1::2]) == [(200, "2")] * (POOL_SIZE + 10)
    await site.recovers()


# The line goes dead


async def test_statements_on_a_dead_socket_fail_in_time(start_site, database_line):
    site = await start_site(
        DATABASE_URL=database_line.url, COMMAND_TIMEOUT="1", ACQUIRE_TIMEOUT="1"
    )
    database_line.go_dead()
    answers = await asyncio.gather(*[site.get("/") for _ in range(2 * POOL_SIZE)])
    assert {status for status, _ in answers} == {503}
    database_line.revive()
    await site.recovers()


@pytest.mark.parametrize("where", ["/in-transaction", "/in-transaction-of-child"])
async def test_a_teardown_that_hangs_on_a_dead_socket_to_postgres(start_site, database_line, where):
    """The driver would wait for ever: it has no timeout for the COMMIT."""
    site = await start_site(
        DATABASE_URL=database_line.url, TEARDOWN_TIMEOUT="0.5", ACQUIRE_TIMEOUT="1"
    )
    tasks = [site.start(where, gate="dead") for _ in range(POOL_SIZE)]
    await site.at_gate("dead", POOL_SIZE)
    database_line.go_dead()
    await site.get("/open-gate", gate="dead")
    assert await asyncio.gather(*tasks) == [(200, "sent before the COMMIT")] * POOL_SIZE

    async def given_up():
        state = await site.state()
        assert state["open scopes"] == 0
        assert state["pool in use"] == 0

    await eventually(given_up)  # while the line is still dead
    site.server.wait_for(
        r"tests\.faults\.site\.transaction \(.*site\.py:\d+\) took longer than 0\.5 seconds"
    )
    database_line.revive()
    await site.recovers()


async def test_a_teardown_on_a_dead_socket_to_redis(start_site, broker_line):
    site = await start_site(REDIS_URL=broker_line.url, TEARDOWN_TIMEOUT="0.5")
    async with site.client.stream("GET", "/events") as stream:
        async for line in stream.aiter_lines():
            assert line == "subscribed"
            broker_line.go_dead()
            break

    async def given_up():
        assert (await site.state())["open scopes"] == 0

    await eventually(given_up)
    broker_line.revive()
    await site.recovers()


async def test_the_server_still_shuts_down_when_the_lines_are_dead(
    start_site, database_line, broker_line
):
    site = await start_site(
        DATABASE_URL=database_line.url,
        REDIS_URL=broker_line.url,
        TEARDOWN_TIMEOUT="0.5",
        ACQUIRE_TIMEOUT="1",
    )
    open_request = site.start("/in-transaction", gate="never")
    await site.at_gate("never")
    database_line.go_dead()
    broker_line.go_dead()
    await asyncio.to_thread(site.server.stop, signal.SIGTERM)
    site.server.wait_for("Finished server process")
    assert (await open_request)[0] == 500  # uvicorn's own answer for what it cancels
