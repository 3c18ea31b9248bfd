"""
The Django project that the servers serve. What happens to its resources goes to
a log that the cases read: one line of JSON each, written in one step, so that
nothing is lost when the process is killed.
"""

import asyncio
import contextvars
import itertools
import json
import os
import zlib
from typing import Any, NamedTuple, Self

import asyncpg
from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.signals import request_finished
from django.http import JsonResponse, StreamingHttpResponse
from django.urls import path
from redis.asyncio import Redis

from scoped import current_scope, lifespan_scoped, request_scoped
from scoped.asgi import get_asgi_application

# Names this run of the server: to PostgreSQL as the application, to Redis as the channel.
TOKEN = os.environ["SERVERS_TOKEN"]
SERVER = os.environ["SERVERS_SERVER"]  # its package
POOL_SIZE = 5
FLOOD = [bytes([number]) * 65_536 for number in range(256)]  # 16 MB

_log = os.open(os.environ["SERVERS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
numbers = itertools.count(1)
visited = contextvars.ContextVar("visited", default="")
sent: dict[str, int] = {}  # chunks of each flood
meeting = asyncio.Barrier(POOL_SIZE)


def log(event: str, **facts: Any) -> None:
    os.write(_log, json.dumps({"event": event, **facts}).encode() + b"\n")


class Record:
    """Logs one resource: its set-up when told so, its teardown when that is complete."""

    def __init__(self, resource: str) -> None:
        self.facts: dict[str, Any] = {"resource": resource}

    def set_up(self, value: Any = None) -> "Held":
        # A scope's name ends with the path, and each path is asked for once.
        request = current_scope().name.rpartition("/")[2]
        self.facts.update(number=next(numbers), request=request)
        log("set up", **self.facts)
        return Held(self.facts["number"], value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if "number" in self.facts:
            log("torn down", **self.facts, failure=kind and kind.__name__)


class Held(NamedTuple):
    number: int
    value: Any


@lifespan_scoped
async def pool():
    with Record("pool") as record:
        async with asyncpg.create_pool(
            os.environ["DATABASE_URL"],
            min_size=POOL_SIZE,
            max_size=POOL_SIZE,
            server_settings={"application_name": TOKEN},
        ) as pool:
            record.set_up()
            yield pool


@lifespan_scoped
async def redis():
    with Record("redis") as record:
        async with Redis.from_url(os.environ["REDIS_URL"]) as client:
            record.set_up()
            yield client


@request_scoped
async def db():
    with Record("db") as record:
        async with (await pool()).acquire() as connection:
            yield record.set_up(connection)


@request_scoped
async def subscription():
    with Record("subscription") as record:
        async with (await redis()).pubsub(ignore_subscribe_messages=True) as subscription:
            await subscription.subscribe(TOKEN)
            yield record.set_up(subscription)


@request_scoped
async def lingering():
    """
    Takes its time to be torn down, which a server that shuts down has to grant. Set
    up first, so that it is the last of its request, when the pool is whole again.
    """
    with Record("lingering") as record:
        try:
            yield record.set_up()
        finally:
            await asyncio.sleep(0.3)


async def finished(**_: Any) -> None:
    """
    Sees what the view has set. Its time passes before the scope closes, while the
    next request of the same connection may have begun.
    """
    await asyncio.sleep(0.02)
    log("finished", request=visited.get())


async def use(name: str) -> dict[str, Any]:
    """Use both resources; what the client is told about that."""
    before = visited.get()
    visited.set(name)
    log("asked", request=name)
    connection = await db()
    await connection.value.fetchval("SELECT 1")
    return {"db": connection.number, "subscription": (await subscription()).number, "in": before}


async def sleep_in_database(name: str) -> None:
    connection = await db()
    log("reached", request=name)
    await connection.value.execute("SELECT pg_sleep(60)")


async def wait_for_message() -> Any:
    while True:  # the confirmation of the subscription comes as None
        if message := await (await subscription()).value.get_message(timeout=None):
            return message


# Views that end by themselves


async def async_view(request, name):
    return JsonResponse(await use(name))


def sync_view(request, name):
    return JsonResponse(async_to_sync(use)(name))


async def raises(request, name):
    await use(name)
    raise ValueError("the view's")


async def in_children(request, name):
    visited.set(name)
    one, other, third = await asyncio.gather(db(), db(), subscription())
    assert one is other
    return JsonResponse({"db": one.number, "subscription": third.number, "in": ""})


async def stream(request, name):
    async def body():
        yield json.dumps(await use(name)) + "\n"
        for number in range(3):
            yield f"{await (await db()).value.fetchval('SELECT $1::int', number)}\n"

    return StreamingHttpResponse(body())


async def stream_raises(request, name):
    async def body():
        yield json.dumps(await use(name)) + "\n"
        raise KeyError("the stream's")

    return StreamingHttpResponse(body())


async def receive_body(request, name):
    log("view", request=name)
    return JsonResponse({**await use(name), "crc": zlib.crc32(request.body)})


async def flood(request, name):
    async def body():
        await use(name)
        try:
            for number, chunk in enumerate(FLOOD, 1):
                yield chunk
                sent[name] = number
        finally:
            log("closed", request=name)

    return StreamingHttpResponse(body())


async def brief(request, name):
    answer = await use(name)
    log("reached", request=name)
    await wait_for_message()
    return JsonResponse({**answer, "still": await (await db()).value.fetchval("SELECT 1")})


async def meet(request, name):
    """Answers when as many are here as there are connections."""
    answer = await use(name)
    async with asyncio.timeout(20):
        await meeting.wait()
    return JsonResponse(answer)


# Views that do not


async def hang(request, name):
    await lingering()
    await use(name)
    await sleep_in_database(name)


def sync_hang(request, name):
    async_to_sync(use)(name)
    async_to_sync(sleep_in_database)(name)


async def hang_in_children(request, name):
    visited.set(name)
    await asyncio.gather(db(), subscription())
    await asyncio.gather(wait_for_message(), sleep_in_database(name))


async def stream_hangs(request, name):
    async def body():
        visited.set(name)
        await lingering()
        await subscription()
        yield "subscribed\n"
        log("reached", request=name)
        yield str(await wait_for_message())

    return StreamingHttpResponse(body())


async def state(request):
    """What is open in this process; uses no request's resource itself."""
    connections = await pool()
    await redis()
    return JsonResponse(
        {
            "token": TOKEN,
            "busy": connections.get_size() - connections.get_idle_size(),
            "tasks": sorted(filter(None, map(_name, asyncio.all_tasks()))),
            "sent": sent,
        }
    )


def _name(task: asyncio.Task[Any]) -> str:
    """What it runs; nothing where that is the server's own, as timers of connections are."""
    coroutine: Any = task.get_coro()
    file = getattr(getattr(coroutine, "cr_code", None), "co_filename", "")
    return "" if f"{os.sep}{SERVER}{os.sep}" in file else coroutine.__qualname__


urlpatterns = [
    path("state", state),
    path("async/<name>", async_view),
    path("sync/<name>", sync_view),
    path("raises/<name>", raises),
    path("children/<name>", in_children),
    path("stream/<name>", stream),
    path("stream-raises/<name>", stream_raises),
    path("body/<name>", receive_body),
    path("flood/<name>", flood),
    path("brief/<name>", brief),
    path("meet/<name>", meet),
    path("hang/<name>", hang),
    path("sync-hang/<name>", sync_hang),
    path("children-hang/<name>", hang_in_children),
    path("stream-hang/<name>", stream_hangs),
]
settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="servers",
    INSTALLED_APPS=["scoped"],
)
request_finished.connect(finished)
application = get_asgi_application()
