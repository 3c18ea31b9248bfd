"""The site under fire: what its views need is struck, and ``/state`` shows what is left of it."""

import asyncio
import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
from asgiref.sync import markcoroutinefunction
from django.conf import settings
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from scoped import lifespan_scoped, request_scoped
from scoped.asgi import get_asgi_application
from scoped.core.request import ServedScope

POOL_SIZE = 5
ACQUIRE_TIMEOUT = float(os.environ.get("ACQUIRE_TIMEOUT", "5"))
# None leaves a statement on a dead socket to be ended by nobody but scoped.
COMMAND_TIMEOUT = float(os.environ["COMMAND_TIMEOUT"]) if "COMMAND_TIMEOUT" in os.environ else None

set_up: Counter[str] = Counter()
torn_down: Counter[str] = Counter()
gates: dict[str, asyncio.Event] = {}
waiting: list[str] = []


@contextmanager
def counted(name: str) -> Iterator[None]:
    set_up[name] += 1
    try:
        yield
    finally:
        torn_down[name] += 1


class PoolExhaustedError(Exception):
    """asyncpg's own TimeoutError comes without a word."""


@lifespan_scoped(eager=True)
async def pool():
    with counted("pool"):
        async with asyncpg.create_pool(
            os.environ["DATABASE_URL"],
            min_size=POOL_SIZE,
            max_size=POOL_SIZE,
            command_timeout=COMMAND_TIMEOUT,
            server_settings={"application_name": "site"},
        ) as pool:
            yield pool


@request_scoped
async def db():
    connections = await pool()
    try:
        connection = await connections.acquire(timeout=ACQUIRE_TIMEOUT)
    except TimeoutError:
        used = connections.get_size() - connections.get_idle_size()
        raise PoolExhaustedError(
            f"no connection within {ACQUIRE_TIMEOUT:g} seconds: {used} of {POOL_SIZE} in use"
        ) from None
    try:
        with counted("db"):
            yield connection
    finally:
        await connections.release(connection)


@request_scoped
async def transaction():
    connection = await db()
    with counted("transaction"):
        async with connection.transaction():
            yield connection


@lifespan_scoped
async def redis():
    with counted("redis"):
        async with Redis.from_url(
            os.environ["REDIS_URL"],
            decode_responses=True,
            socket_timeout=5,
            socket_connect_timeout=5,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            yield client


@request_scoped
async def subscription():
    async with (await redis()).pubsub(ignore_subscribe_messages=True) as messages:
        with counted("subscription"):
            await messages.subscribe("news")
            yield messages


async def gate(request):
    """Wait until the test opens it, so that a fault comes at this very point of a request."""
    name = request.GET["gate"]
    waiting.append(name)
    try:
        await gates.setdefault(name, asyncio.Event()).wait()
    finally:
        waiting.remove(name)


async def index(request):
    await (await redis()).ping()
    return HttpResponse(str(await (await db()).fetchval("SELECT 1 + 1")))


async def write(request):
    await (await db()).execute("INSERT INTO writes VALUES ($1)", int(request.GET["id"]))
    await (await redis()).publish("news", request.GET["id"])
    return HttpResponse(request.GET["id"])


async def in_statement(request):
    await (await db()).execute("SELECT pg_sleep(60)")
    return HttpResponse("slept")


async def in_child(request):
    await asyncio.gather(in_statement(request), db())
    return HttpResponse("slept")


async def between_statements(request):
    connection = await db()
    await connection.execute("SELECT 1")
    await gate(request)
    return HttpResponse(str(await connection.fetchval("SELECT 1 + 1")))


async def in_stream(request):
    async def body():
        yield f"{await (await db()).fetchval('SELECT 1')}\n"
        await in_statement(request)

    return StreamingHttpResponse(body())


async def in_transaction(request):
    await (await transaction()).execute("SELECT 2")
    await gate(request)
    return HttpResponse("sent before the COMMIT")


async def in_transaction_of_child(request):
    await asyncio.gather(transaction())
    return await in_transaction(request)


async def events(request):
    async def body():
        messages = await subscription()
        yield "subscribed\n"
        while True:
            if message := await messages.get_message(timeout=60):
                yield f"{message['data']}\n"

    return StreamingHttpResponse(body())


async def open_gate(request):
    gates.setdefault(request.GET["gate"], asyncio.Event()).set()
    return HttpResponse()


async def state(request):
    connections, broker = await pool(), await redis()
    gc.collect()
    open_scopes = [
        thing for thing in gc.get_objects() if type(thing) is ServedScope and thing.is_open
    ]
    return JsonResponse(
        {
            "pool size": connections.get_size(),
            "pool in use": connections.get_size() - connections.get_idle_size(),
            "redis in use": len(broker.connection_pool._in_use_connections),
            "set up": {**set_up, "request": set_up["request"] - 1},  # but for this one
            "torn down": torn_down,
            "open scopes": len(open_scopes) - 1,
            "tasks": len(asyncio.all_tasks()),
            "waiting": waiting,
        }
    )


FAILURES = (
    PoolExhaustedError,
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    # Of a statement between the server's last word, a FATAL error, and the end of the connection.
    asyncpg.InternalClientError,
    RedisError,
)


class Unavailable:
    """Answers 503, in words, where a server that the site needs has failed it."""

    sync_capable = False
    async_capable = True

    def __init__(self, get_response):
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request):
        return await self.get_response(request)

    async def process_exception(self, request, error):
        # uvloop raises a RuntimeError for what is written to a connection that is just lost.
        if isinstance(error, FAILURES) or "the handler is closed" in str(error):
            return HttpResponse(f"{type(error).__name__}: {error}", status=503)
        return None


urlpatterns = [
    path("", index),
    path("write", write),
    path("in-statement", in_statement),
    path("in-child", in_child),
    path("between-statements", between_statements),
    path("in-stream", in_stream),
    path("in-transaction", in_transaction),
    path("in-transaction-of-child", in_transaction_of_child),
    path("events", events),
    path("open-gate", open_gate),
    path("state", state),
]
settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="faults",
    INSTALLED_APPS=["scoped"],
    MIDDLEWARE=[f"{__name__}.Unavailable"],
    LOGGING={
        "version": 1,
        "disable_existing_loggers": False,  # uvicorn's
        "handlers": {"stderr": {"class": "logging.StreamHandler"}},
        "loggers": {"django": {"handlers": ["stderr"]}},
    },
    SCOPED={"TEARDOWN_TIMEOUT": float(os.environ.get("TEARDOWN_TIMEOUT", "5"))},
)
handler = get_asgi_application()


async def application(scope, receive, send):
    set_up["request"] += scope["type"] == "http"
    try:
        await handler(scope, receive, send)
    finally:
        torn_down["request"] += scope["type"] == "http"
