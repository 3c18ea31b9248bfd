"""
What is handed on from one request to the next, measured: each probe has one request
leave something, and tells whether the next one finds it.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import asyncpg
import httpx
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path as url
from psycopg_pool import AsyncConnectionPool
from redis.asyncio import BlockingConnectionPool, Redis

from scoped import request_scope, request_scoped
from scoped.asgi import ScopedASGIHandler
from tests.connection import Connection
from tests.uvicorn import uvicorn

ROOT = Path(__file__).parents[2]

# What is left, how, how it is seen; how it ends with a transaction, and what that is called.
SESSION = {
    "the role: `SET ROLE`": (
        "SET ROLE guest",
        "SELECT current_user::text = 'guest'",
        "SET LOCAL ROLE guest",
        "`SET LOCAL ROLE`",
    ),
    "the user: `SET SESSION AUTHORIZATION`": (
        "SET SESSION AUTHORIZATION guest",
        "SELECT session_user::text = 'guest'",
        "SET LOCAL SESSION AUTHORIZATION guest",
        "`SET LOCAL SESSION AUTHORIZATION`",
    ),
    "a setting: `SET app.tenant`": (
        "SET app.tenant = 'ada'",
        "SELECT current_setting('app.tenant', true) = 'ada'",
        "SET LOCAL app.tenant = 'ada'",
        "`SET LOCAL`",
    ),
    "a temporary table": (
        "CREATE TEMPORARY TABLE kept (value int)",
        "SELECT to_regclass('pg_temp.kept') IS NOT NULL",
        "CREATE TEMPORARY TABLE kept (value int) ON COMMIT DROP",
        "`ON COMMIT DROP`",
    ),
    "a prepared statement: `PREPARE`": (
        "PREPARE kept AS SELECT 1",
        "SELECT EXISTS (SELECT FROM pg_prepared_statements WHERE name = 'kept')",
        None,
        None,
    ),
    "an advisory lock: `pg_advisory_lock()`": (
        "SELECT pg_advisory_lock(7)",
        "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory')",
        "SELECT pg_advisory_xact_lock(7)",
        "`pg_advisory_xact_lock()`",
    ),
    "a subscription: `LISTEN`": (
        "LISTEN kept",
        "SELECT EXISTS (SELECT FROM pg_listening_channels())",
        None,
        None,
    ),
}


async def next_finds(
    pool: object, lend: Callable[[object], object], change: str, look: str
) -> bool:
    @request_scoped
    async def db():
        async with lend(pool) as connection:
            yield connection

    async with request_scope():
        await (await db()).execute(change)
    async with request_scope():
        connection = await db()
        if isinstance(pool, AsyncConnectionPool):
            [found] = await (await connection.execute(look)).fetchone()
            return found
        return await connection.fetchval(look)


async def asyncpg_keeps(address: str, change: str, look: str, **options: object) -> bool:
    async with asyncpg.create_pool(address, min_size=1, max_size=1, **options) as pool:
        return await next_finds(pool, lambda pool: pool.acquire(), change, look)


async def asyncpg_keeps_of_a_transaction(address: str, change: str, look: str) -> bool:
    @asynccontextmanager
    async def lend(pool):
        async with pool.acquire() as connection, connection.transaction():
            yield connection

    async with asyncpg.create_pool(address, min_size=1, max_size=1) as pool:
        return await next_finds(pool, lend, change, look)


async def psycopg_keeps(address: str, change: str, look: str, **options: object) -> bool:
    options = {"min_size": 1, "max_size": 1, "open": False, **options}
    async with AsyncConnectionPool(address, **options) as pool:
        return await next_finds(pool, lambda pool: pool.connection(), change, look)


# What has no session


async def redis_select(address: str, *, remedied: bool) -> bool:
    """The database of one pooled connection, as the next request finds it."""

    def client(**options: object) -> Redis:
        pool = BlockingConnectionPool.from_url(address, max_connections=1, **options)
        return Redis.from_pool(pool)

    async with client() as one, client(db=1) as other:
        if remedied:
            await other.ping()
        else:
            await one.select(1)
        return (await one.client_info())["db"] == 1


async def httpx_cookies(*, remedied: bool) -> bool:
    def upstream(request: httpx.Request) -> httpx.Response:
        headers = {"set-cookie": "session=ada; path=/"}
        return httpx.Response(200, headers=headers, text=request.headers.get("cookie", ""))

    jar = CookieJar(DefaultCookiePolicy(allowed_domains=[])) if remedied else None
    transport = httpx.MockTransport(upstream)
    async with httpx.AsyncClient(transport=transport, cookies=jar) as client:
        await client.get("http://upstream/")
        return (await client.get("http://upstream/")).text == "session=ada"


async def thread_local(*, remedied: bool) -> bool:
    local = threading.local()

    def view(request):
        found = getattr(local, "user", "nobody")
        local.user = "ada"
        return HttpResponse(found)

    settings = {"SCOPED": {"MAX_IDLE_THREADS": 0}} if remedied else {}
    return await served_twice(view, **settings) == [b"nobody", b"ada"]


async def served_twice(view: Callable[..., object], **settings: object) -> list[bytes]:
    module = ModuleType("urls")
    module.urlpatterns = [url("", view)]  # type: ignore[attr-defined]
    with override_settings(ROOT_URLCONF=module, **settings):
        handler = ScopedASGIHandler()
        connections = [Connection(handler), Connection(handler)]
        for connection in connections:
            await connection.run()
    return [connection.body for connection in connections]


CONTEXTVAR = """
from contextvars import ContextVar
from django.conf import settings
settings.configure(ROOT_URLCONF=__name__, INSTALLED_APPS=["scoped"], ALLOWED_HOSTS=["*"])
from django.http import HttpResponse
from django.urls import path
from scoped.asgi import get_asgi_application

user = ContextVar("user", default="nobody")

async def view(request, name, begin):
    if begin == "begin":
        user.set("nobody")
    found = user.get()
    user.set(name)
    return HttpResponse(found, headers={"Content-Length": str(len(found))})

urlpatterns = [path("<name>/<begin>", view)]
application = get_asgi_application()
"""


def contextvar(folder: Path, *, pipelined: bool, remedied: bool) -> bool:
    """A ContextVar that a view sets, under uvicorn, on one connection."""
    (folder / "site_of_contextvars.py").write_text(CONTEXTVAR)
    ending = "begin" if remedied else "as-it-is"
    with uvicorn("site_of_contextvars", PYTHONPATH=f"{folder}{os.pathsep}{ROOT}") as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), 30) as connection:
            answers = connection.makefile("rb")

            def ask(*names: str) -> None:
                request = "GET /{}/{} HTTP/1.1\r\nHost: localhost\r\n\r\n"
                text = "".join(request.format(name, ending) for name in names)
                connection.sendall(text.encode())

            def answer() -> bytes:
                length = 0
                while (line := answers.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                return answers.read(length)

            if pipelined:
                ask("ada", "grace")
                found = [answer(), answer()]
            else:
                found = []
                for name in ("ada", "grace"):
                    ask(name)
                    found.append(answer())
    assert found[0] == b"nobody"
    return found[1] == b"ada"


ORM = """
import asyncio, json, os, sys
from urllib.parse import urlsplit
from django.conf import settings

address = urlsplit(os.environ["DATABASE_URL"])
settings.configure(
    ROOT_URLCONF=__name__, INSTALLED_APPS=["scoped"], ALLOWED_HOSTS=["*"],
    DATABASES={"default": {
        "ENGINE": "django.db.backends.postgresql", "NAME": address.path[1:],
        "USER": address.username, "PASSWORD": address.password,
        "HOST": address.hostname, "PORT": address.port, "CONN_MAX_AGE": int(sys.argv[1]),
    }},
)
from django.db import connection
from django.http import HttpResponse
from django.urls import path
from scoped.asgi import get_asgi_application
from tests.connection import Connection

def view(request):
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_user")
        [found] = cursor.fetchone()
        cursor.execute("SET ROLE guest")
    return HttpResponse(found)

urlpatterns = [path("", view)]

async def main():
    application = get_asgi_application()
    found = []
    for _ in range(2):
        one = Connection(application)
        await one.run()
        found.append(one.body.decode())
    print(json.dumps(found))

asyncio.run(main())
"""


def orm(address: str, *, remedied: bool) -> bool:
    """Django's own connection, under our handler, which lends a thread again."""
    seconds = "0" if remedied else "60"
    environment = {**os.environ, "DATABASE_URL": address, "PYTHONPATH": str(ROOT)}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    command = [sys.executable, "-c", ORM, seconds]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    first, second = json.loads(done.stdout)
    assert first == "scoped"
    return second == "guest"


Probe = Callable[[bool], Awaitable[bool]]


def elsewhere(folder: Path, postgres: str, redis: str) -> dict[tuple[str, str], Probe]:
    """What is left where, how it is ended, and whether the next request finds it."""

    def of_contextvars(*, pipelined: bool) -> Probe:
        return lambda remedied: asyncio.to_thread(
            contextvar, folder, pipelined=pipelined, remedied=remedied
        )

    return {
        (
            "redis-py: the database chosen with `select()`",
            "a client for each database: `db=1`",
        ): lambda remedied: redis_select(redis, remedied=remedied),
        (
            "httpx: the cookies that a server has set",
            "[a jar that takes none](recipes/http.md#client)",
        ): lambda remedied: httpx_cookies(remedied=remedied),
        (
            "Django's own connection, with `CONN_MAX_AGE`: the role",
            "`CONN_MAX_AGE = 0`, Django's default; `SET LOCAL` in `atomic()`",
        ): lambda remedied: asyncio.to_thread(orm, postgres, remedied=remedied),
        (
            "a `threading.local` that sync code has set",
            '`SCOPED = {"MAX_IDLE_THREADS": 0}`: no thread is lent twice',
        ): lambda remedied: thread_local(remedied=remedied),
        (
            "a ContextVar that a view has set; the next request of a connection",
            "-",
        ): of_contextvars(pipelined=False),
        (
            "the same, where the client did not wait for the first answer (pipelining)",
            "set it at the start of each request; a resource in its place",
        ): of_contextvars(pipelined=True),
    }
