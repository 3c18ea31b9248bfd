"""What strikes: PostgreSQL's and Redis's connections, and the servers themselves."""

import asyncio
from collections import Counter
from random import Random

import asyncpg
from redis.asyncio import Redis

from demo.servers import Server

BACKENDS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'soak site'"


class Faults:
    def __init__(self, database: Server, broker: Server, random: Random) -> None:
        self.database = database
        self.broker = broker
        self.random = random
        self.struck: Counter[str] = Counter()
        self.bag: list[str] = []

    async def strike(self, until: float) -> None:
        """Each kind comes once before any comes again, the frequent ones twice."""
        clock = asyncio.get_running_loop().time
        while clock() < until:
            if not self.bag:
                self.bag = [*KINDS, *FREQUENT]
                self.random.shuffle(self.bag)
            kind = self.bag.pop()
            await getattr(self, kind)()
            self.struck[kind.replace("_", " ")] += 1
            await asyncio.sleep(self.random.uniform(0.1, 0.6))

    async def query(self, statement: str, *arguments: object) -> "list[asyncpg.Record]":
        connection = await asyncpg.connect(self.database.url)
        try:
            return await connection.fetch(statement, *arguments)
        finally:
            await connection.close()

    async def command(self, *words: object) -> object:
        async with Redis.from_url(self.broker.url) as redis:
            return await redis.execute_command(*words)

    async def terminate_backend(self) -> None:
        for backend in await self.query(f"{BACKENDS} ORDER BY random() LIMIT 2"):
            await self.query("SELECT pg_terminate_backend($1)", backend["pid"])

    async def cancel_query(self) -> None:
        for backend in await self.query(BACKENDS):
            await self.query("SELECT pg_cancel_backend($1)", backend["pid"])

    async def lock_table(self) -> None:
        connection = await asyncpg.connect(self.database.url)
        try:
            async with connection.transaction():
                await connection.execute("LOCK TABLE written IN ACCESS EXCLUSIVE MODE")
                await asyncio.sleep(self.random.uniform(0.1, 0.5))
        finally:
            await connection.close()

    async def kill_redis_clients(self) -> None:
        await self.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    async def kill_redis_subscribers(self) -> None:
        await self.command("CLIENT", "KILL", "TYPE", "pubsub")

    async def pause_redis(self) -> None:
        await self.command("CLIENT", "PAUSE", self.random.randrange(100, 500))

    async def kill_postgres(self) -> None:
        await asyncio.to_thread(self.database.kill)
        await asyncio.sleep(self.random.uniform(0, 0.3))
        await asyncio.to_thread(self.database.restart)

    async def kill_redis(self) -> None:
        await asyncio.to_thread(self.broker.kill)
        await asyncio.sleep(self.random.uniform(0, 0.3))
        await asyncio.to_thread(self.broker.restart)


FREQUENT = ["terminate_backend", "kill_redis_clients", "kill_redis_subscribers"]
KINDS = [*FREQUENT, "cancel_query", "lock_table", "pause_redis", "kill_postgres", "kill_redis"]
