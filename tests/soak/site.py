"""The site that is visited: it runs the programs of its visitors, and watches itself."""

import asyncio
import gc
import json
import logging
import os
import resource
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import asyncpg
from asgiref.sync import async_to_sync, markcoroutinefunction, sync_to_async
from django.conf import settings
from django.http import Http404, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from scoped import ScopeClosedError, lifespan_scoped, request_scoped
from scoped.asgi import get_asgi_application
from scoped.core.scope import Scope
from tests.connection import Connection
from tests.soak import dice
from tests.soak.ledger import ExhaustedError, PlannedError, Watch, is_expected, is_fault, ledger

POOL_SIZE = 5
ACQUIRE_TIMEOUT = 3.0

# Which failure of the resource `flaky` a request has planned.
flaw: ContextVar[str] = ContextVar("flaw", default="")
stragglers: set[asyncio.Task[None]] = set()
requests: list[str] = []  # that are open
live: dict[str, Any] = {}


class Held:
    """The value of a request's resource: whose it is, and whether it still is."""

    def __init__(self, number: int, thing: Any = None) -> None:
        self.number = number
        self.thing = thing
        self.token: str | None = None
        self.open = True


@lifespan_scoped
async def pool():
    with ledger.entry("pool"):
        async with asyncpg.create_pool(
            os.environ["DATABASE_URL"],
            min_size=0,
            max_size=POOL_SIZE,
            command_timeout=5,
            server_settings={"application_name": "soak site"},
        ) as pool:
            live["pool"] = pool
            yield pool


@lifespan_scoped
async def redis():
    with ledger.entry("redis"):
        async with Redis.from_url(
            os.environ["REDIS_URL"],
            decode_responses=True,
            max_connections=90,
            socket_timeout=5,
            socket_connect_timeout=5,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            live["redis"] = client
            yield client


@request_scoped
def ticket():
    with ledger.entry("ticket") as number:
        held = Held(number)
        try:
            yield held
        finally:
            held.open = False


@request_scoped
async def db():
    owner, connections = ticket(), await pool()
    try:
        connection = await connections.acquire(timeout=ACQUIRE_TIMEOUT)
    except TimeoutError:
        raise ExhaustedError from None
    held = Held(owner.number, connection)
    try:
        with ledger.entry("db"):
            yield held
    finally:
        held.open = False
        ledger.expect(owner.open, "a resource was torn down before what uses it")
        await connections.release(connection)


@request_scoped
async def subscription():
    owner = ticket()
    async with (await redis()).pubsub(ignore_subscribe_messages=True) as messages:
        await messages.subscribe("news")
        held = Held(owner.number, messages)
        try:
            with ledger.entry("subscription"):
                yield held
        finally:
            held.open = False


@request_scoped
async def flaky():
    await asyncio.sleep(0)
    if flaw.get() == "set-up":
        raise PlannedError
    with ledger.entry("flaky"):
        try:
            yield
        finally:
            await asyncio.sleep(0)
            if flaw.get() == "teardown":
                raise PlannedError


class Visit:
    """One request, as its visitor wants it."""

    def __init__(self, request: Any) -> None:
        self.token: str = request.GET["token"]
        self.steps = [step for step in request.GET["steps"].split(".") if step]
        self.end: str = request.GET["end"]
        self.size = int(request.GET.get("size", 0))
        self.wrote = False
        self.random = dice(os.environ["SOAK_SEED"], self.token)
        # A server may start a pipelined request in the Context of the one before.
        flaw.set("")
        self.claim()

    def claim(self) -> Held:
        """The request's ticket; nobody else's."""
        held = ticket()
        if held.token is None:
            held.token = self.token
        ledger.expect(held.token == self.token, "a request has seen another's resource")
        ledger.expect(held.open, "a request was given a resource that is torn down")
        return held

    async def get(self, resource: Any) -> Held:
        held = await resource()
        ledger.expect(held.number == self.claim().number, "a resource is of another request")
        ledger.expect(held.open, "a request was given a resource that is torn down")
        return held

    async def take(self, step: str) -> None:
        await getattr(self, f"take_{step}")()

    async def take_db(self) -> None:
        held = await self.get(db)
        answer = await held.thing.fetchval("SELECT $1::text", self.token)
        ledger.expect(answer == self.token, "a request was given another's answer by PostgreSQL")
        ledger.expect(held.open, "a resource was torn down under its user")

    async def take_write(self) -> None:
        held = await self.get(db)
        await held.thing.execute("INSERT INTO written VALUES ($1)", int(self.token))
        self.wrote = True

    async def take_redis(self) -> None:
        answer = await (await redis()).echo(self.token)
        ledger.expect(answer == self.token, "a request was given another's answer by Redis")

    async def take_subscription(self) -> None:
        held = await self.get(subscription)
        await (await redis()).publish("news", self.token)
        await held.thing.get_message(timeout=0.05)
        ledger.expect(held.open, "a resource was torn down under its user")

    async def take_flaky(self) -> None:
        await flaky()

    async def take_bad_setup(self) -> None:
        flaw.set("set-up")
        with suppress(PlannedError):
            await flaky()

    async def take_bad_teardown(self) -> None:
        flaw.set("teardown")
        await flaky()

    async def take_children(self) -> None:
        values = await asyncio.gather(*[db() for _ in range(3)], asyncio.create_task(db()))
        ledger.expect(len(set(values)) == 1, "children were given different resources")

    async def take_cancelled_child(self) -> None:
        child, waiter = (asyncio.create_task(self.get(db)) for _ in range(2))
        for task in (child, waiter):
            # Its error is of no use where this request ends before it.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        for _ in range(self.random.randrange(5)):
            await asyncio.sleep(0)
        child.cancel()
        await asyncio.wait([child, waiter])
        ledger.expect(not waiter.cancelled(), "a task was cancelled with the one it waited for")
        await waiter

    async def take_timeout(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.random.random() / 100):
                await self.get(db)

    async def take_thread(self) -> None:
        sensitive = self.random.random() < 0.5
        claim = sync_to_async(self.claim, thread_sensitive=sensitive)
        ledger.expect(await claim() is self.claim(), "a thread was given another resource")
        if sensitive:
            await sync_to_async(async_to_sync(self.get))(db)

    async def take_nested(self) -> None:
        """A request inside this one, in the same task."""
        around = self.claim()
        query = f"token={self.token}i&steps=redis.flaky&end=fine".encode()
        inner = Connection(handler, "/async", query_string=query)
        await inner.run()
        if inner.status == 200:
            answer = json.loads(inner.body)
            ledger.expect(answer["ticket"] != around.number, "a nested request has its outer's")
        ledger.expect(self.claim() is around, "a nested request replaced what was around it")

    async def take_straggler(self) -> None:
        self.claim()
        task = asyncio.create_task(self.straggle())
        stragglers.add(task)
        task.add_done_callback(stragglers.discard)

    async def straggle(self) -> None:
        """Asks again and again, until the request has ended, and is told so."""
        while True:
            await asyncio.sleep(self.random.random() / 5)
            try:
                await self.get(db)
            except ScopeClosedError:
                return
            except Exception as error:
                if not is_fault(error):
                    raise

    async def take_sleep(self) -> None:
        await asyncio.sleep(self.random.random() / 50)

    async def take_hang(self) -> None:
        """For a visitor who leaves: only that ends it."""
        await asyncio.Event().wait()

    def answer(self) -> dict[str, Any]:
        return {"token": self.token, "ticket": self.claim().number, "wrote": self.wrote}

    def finish(self) -> None:
        if self.end == "raise":
            raise PlannedError
        if self.end == "404":
            raise Http404


async def async_view(request):
    visit = Visit(request)
    for step in visit.steps:
        await visit.take(step)
    visit.finish()
    return JsonResponse(visit.answer())


def sync_view(request):
    visit = Visit(request)
    for step in visit.steps:
        async_to_sync(visit.take)(step)
    visit.finish()
    return JsonResponse(visit.answer())


async def stream_view(request):
    visit = Visit(request)
    if visit.random.random() < 0.5:  # else the first use is in the stream
        await visit.take("flaky")

    async def body() -> AsyncIterator[str]:
        held = visit.claim()
        with ledger.entry("stream"):
            try:
                for step in visit.steps:
                    await visit.take(step)
                    yield json.dumps(visit.answer() | {"padding": "x" * visit.size}) + "\n"
                visit.finish()
                yield json.dumps(visit.answer() | {"end": True}) + "\n"
            finally:
                ledger.expect(held.open, "a stream was closed after what it used")

    return StreamingHttpResponse(body())


class Failures:
    """Answers 503 for a fault, 500 for what was planned. The rest is a violation."""

    sync_capable = False
    async_capable = True

    def __init__(self, get_response):
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request):
        return await self.get_response(request)

    async def process_exception(self, request, error):
        if isinstance(error, Http404):
            return None
        if isinstance(error, PlannedError):
            return HttpResponse("planned", status=500)
        if is_fault(error):
            return HttpResponse(type(error).__name__, status=503)
        ledger.violate(f"a view raised {error!r}")
        return HttpResponse(repr(error), status=500)


urlpatterns = [path("async", async_view), path("sync", sync_view), path("stream", stream_view)]
settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="soak",
    INSTALLED_APPS=["scoped"],
    MIDDLEWARE=[f"{__name__}.Failures"],
    LOGGING_CONFIG=None,
)
logging.captureWarnings(True)
for name in ("scoped", "asyncio", "py.warnings"):
    logging.getLogger(name).addHandler(Watch())
    logging.getLogger(name).propagate = False
# These say again what the ledger knows.
logging.getLogger("django").setLevel(logging.CRITICAL)
logging.getLogger("asyncpg").setLevel(logging.CRITICAL)
logging.getLogger("uvicorn.error").addFilter(lambda record: not record.exc_info)
handler = get_asgi_application()


def memory() -> int:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:  # elsewhere than on Linux: the most that it ever was
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def state() -> dict[str, Any]:
    """``open`` is what must be as it was once all has come to rest."""
    gc.collect()
    scopes = [thing for thing in gc.get_objects() if issubclass(type(thing), Scope)]
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return {
        "open": {
            "requests": requests,
            "resources": sorted(ledger.open.values()),
            "scopes": sorted(str(scope) for scope in scopes if scope.is_open),
            "tasks": sorted(task.get_coro().__qualname__ for task in tasks),
            "connections": live["pool"].get_size() - live["pool"].get_idle_size(),
            "redis connections": len(live["redis"].connection_pool._in_use_connections),
        },
        "scope objects": len(scopes),
        "memory": memory(),
        "threads": threading.active_count(),
        "set up": sum(ledger.set_up.values()),
        "torn down": sum(ledger.torn_down.values()),
        "violations": ledger.violations,
    }


async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        await handler(scope, receive, send)
        print("LEDGER", json.dumps([ledger.open, ledger.violations]), file=sys.stderr, flush=True)
    elif scope["path"] == "/state":
        body = json.dumps(state()).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
    else:
        request = f"{scope['path']}?{scope['query_string'].decode()}"
        requests.append(request)
        try:
            await handler(scope, receive, send)
        except Exception as error:
            if not is_expected(error):
                ledger.violate(f"the handler raised {error!r}")
            raise
        finally:
            requests.remove(request)
