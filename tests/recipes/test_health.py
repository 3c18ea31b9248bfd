import asyncio

import asyncpg
from django.http import StreamingHttpResponse
from django.urls import path

from demo.servers import start_postgres
from scoped import request_scoped

HEALTH = ("health.md", "A page that no client can turn")


async def test_ten_slow_readers_that_hold_all_there_is_do_not_turn_it(
    recipe, serve, postgres_url, monkeypatch
):
    monkeypatch.setenv("DATABASE_URL", postgres_url)
    project = recipe(HEALTH)
    monkeypatch.setattr(project.resources, "EVERY", 0.05)
    monkeypatch.setattr(project.resources, "PATIENCE", 45)
    looks = []
    look = project.resources.look

    async def counted():
        await look()
        looks.append(True)

    monkeypatch.setattr(project.resources, "look", counted)
    reading = asyncio.Semaphore(0)

    async with asyncpg.create_pool(postgres_url, min_size=1, max_size=10) as pool:

        @request_scoped
        async def db():
            async with pool.acquire() as connection:
                yield connection

        async def rows(request):
            connection = await db()

            async def body():
                while True:
                    yield str(await connection.fetchval("SELECT 1")) * 65536

            return StreamingHttpResponse(body())

        async def does_not_read(number, message):
            if number == 1:
                reading.release()
                await asyncio.Event().wait()

        async with serve(path("rows", rows), path("health", project.views.healthy)) as site:
            readers = [site.open("/rows", before_send=does_not_read) for _ in range(10)]
            tasks = [reader.start() for reader in readers]
            for _ in readers:
                async with asyncio.timeout(30):
                    await reading.acquire()
            assert pool.get_idle_size() == 0
            assert pool.get_size() == 10
            before = len(looks)
            async with asyncio.timeout(30):
                while len(looks) < before + 3:  # it goes on looking, and sees that all is well
                    await asyncio.sleep(0.01)
            for _ in range(20):
                answer = await site.get("/health")
                assert (answer.status, answer.body) == (200, b"well")
            for reader in readers:
                reader.disconnect()
            await asyncio.gather(*tasks)


async def test_it_is_turned_by_a_database_that_is_away_and_back_again(
    recipe, serve, monkeypatch, caplog
):
    with start_postgres() as server:
        monkeypatch.setenv("DATABASE_URL", server.url)
        project = recipe(HEALTH)
        monkeypatch.setattr(project.resources, "EVERY", 0.05)
        monkeypatch.setattr(project.resources, "PATIENCE", 3)

        async def reach(site, status):
            async with asyncio.timeout(25):
                while (await site.get("/health")).status != status:
                    await asyncio.sleep(0.05)

        async with serve(path("health", project.views.healthy)) as site:
            await reach(site, 200)
            await asyncio.to_thread(server.kill)
            await reach(site, 503)
            await asyncio.to_thread(server.restart)
            await reach(site, 200)
    assert "The database is away: " in caplog.text
