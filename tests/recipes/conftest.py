import asyncio
from contextlib import asynccontextmanager
from types import ModuleType, SimpleNamespace
from urllib.parse import urlencode

import asyncpg
import pytest
from django.test import override_settings
from redis.asyncio import Redis

from scoped.asgi import ScopedASGIHandler
from tests.connection import Connection
from tests.pages import importer
from tests.recipes import pages
from tests.slowness import within


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Imports the files of one section of a page, or of several, as a project would."""
    yield from importer(tmp_path, monkeypatch, pages.DIRECTORY)


@asynccontextmanager
async def lifespan(application):
    """What a server does at its start and at its end."""
    received: asyncio.Queue = asyncio.Queue()
    sent: asyncio.Queue = asyncio.Queue()
    task = asyncio.create_task(application({"type": "lifespan"}, received.get, sent.put))
    received.put_nowait({"type": "lifespan.startup"})
    assert await sent.get() == {"type": "lifespan.startup.complete"}
    try:
        yield
    finally:
        received.put_nowait({"type": "lifespan.shutdown"})
        assert await sent.get() == {"type": "lifespan.shutdown.complete"}
        await task


@pytest.fixture
def serve():
    """
    Serves urlpatterns, or another ASGI application. Within, ``get(path)`` makes a
    request, ``post(path, name=value)`` one with a form, and ``open(path)`` or
    ``open(path, form={...})`` one whose client may go away.
    """

    @asynccontextmanager
    async def serve(*urlpatterns, application=None, **settings):
        urls = ModuleType("urls")
        urls.urlpatterns = list(urlpatterns)
        served = application

        def open_connection(path, *, form=None, **kwargs):
            path, _, query = path.partition("?")
            if form is not None:
                content = [(b"content-type", b"application/x-www-form-urlencoded")]
                kwargs |= {"method": "POST", "body": [urlencode(form).encode()], "headers": content}
            return Connection(served, path, query_string=query.encode(), **kwargs)

        async def get(path, **kwargs):
            connection = open_connection(path, **kwargs)
            await connection.run()
            assert connection.complete
            return connection

        async def post(path, *, before_send=None, **form):
            return await get(path, form=form, before_send=before_send)

        with override_settings(**{"ROOT_URLCONF": urls, **settings}):
            if served is None:
                served = ScopedASGIHandler()
            async with lifespan(served):
                yield SimpleNamespace(get=get, post=post, open=open_connection)

    return serve


@pytest.fixture
async def notes(postgres_url, monkeypatch):
    """A table, and what is in it as another connection sees it."""
    monkeypatch.setenv("DATABASE_URL", postgres_url)
    connection = await asyncpg.connect(postgres_url)
    await connection.execute("DROP TABLE IF EXISTS notes")
    await connection.execute("CREATE TABLE notes (id serial PRIMARY KEY, text text NOT NULL)")

    async def texts():
        return [row["text"] for row in await connection.fetch("SELECT text FROM notes ORDER BY id")]

    yield texts
    await connection.execute("DROP TABLE notes")
    await connection.close()


@pytest.fixture
async def backends(postgres_url):
    """Asks the server how many other connections it has, or waits until it has so many."""
    connection = await asyncpg.connect(postgres_url)

    async def count(condition="true"):
        others = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        return await connection.fetchval(
            f"SELECT count(*) FROM pg_stat_activity WHERE {others} AND {condition}"  # noqa: S608 (ours)
        )

    async def reach(number, condition="true"):
        async with asyncio.timeout(within(20)):
            while await count(condition) != number:
                await asyncio.sleep(0.01)

    count.reach = reach
    yield count
    await connection.close()


@pytest.fixture
async def keys(redis_url, monkeypatch):
    """A connection to look at Redis with, without what the tests leave there."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        await client.delete("visits", "invoice-7")
        yield client
        await client.delete("visits", "invoice-7")
