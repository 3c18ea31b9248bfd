"""
Random requests through ``ScopedASGIHandler``: views, streams, middleware and receivers that ask,
fail and hang about; clients that go, servers that cancel, ``send()`` that fails.

Promised, and looked for: what was set up is torn down once, before what it has used, in its own
thread; ``request_finished`` is sent once for each ``request_started``; messages come in order, and
none follows the last; what fails before the first byte (``until="response"``) never has a 200;
a thread is lent without a transaction; nothing hangs, and nothing is left.
"""

import asyncio
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from django.core.signals import request_finished, request_started
from django.db import connection, transaction
from django.http import (
    FileResponse,
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    StreamingHttpResponse,
)
from django.test import override_settings
from django.urls import path
from django.utils.decorators import async_only_middleware, sync_only_middleware

from scoped import ScopedError, lifespan_scope, lifespan_scoped, request_scoped, spawn
from scoped.asgi import ScopedASGIHandler
from scoped.core.current import scope_here
from scoped.core.lifespan import lifespans
from scoped.core.request import ServedScope
from tests.fuzz.world import DEADLINE, Attempt, PlannedError, World

__all__ = ["run"]

EXPECTED = (PlannedError, ScopedError, asyncio.CancelledError, TimeoutError, OSError)
# What asgiref says to sync code whose caller, or whose thread, has gone.
ASGIREFS = ("CurrentThreadExecutor", "has exited", "after shutdown")


def is_expected(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_expected, error.exceptions))
    if isinstance(error, RuntimeError) and any(word in str(error) for word in ASGIREFS):
        return True
    return isinstance(error, EXPECTED)


class Site(World):
    """One request, and what becomes of it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.decided: dict[str, bool] = {}
        self.strays: list[asyncio.Task[Any]] = []
        self.started = self.finished = 0
        self.sent: list[dict[str, Any]] = []
        self.failed_before_response = False

    def does(self, what: str, probability: float = 0.2) -> bool:
        """The same for the whole request."""
        return self.decided.setdefault(what, self.chance(probability))

    async def ask(self) -> None:
        for _ in range(self.dice.randint(1, 3)):
            resource = self.dice.choice([pool, user, db, orders, report, commit])
            how = self.dice.choice(["here", "here", "child", "gather", "timeout"])
            if how == "here":
                await resource()
            elif how == "child":
                await asyncio.create_task(resource())
            elif how == "gather":
                await asyncio.gather(resource(), db(), lock(self.dice.randint(0, 2)))
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.0005):
                        await resource()

    def ask_sync(self) -> None:
        for _ in range(self.dice.randint(1, 3)):
            if self.chance(0.5):
                self.dice.choice([tenant, rights, clock])()
            else:
                async_to_sync(self.dice.choice([db, orders, report, commit]))()

    async def ask_again_and_again(self) -> None:
        for _ in range(3):
            await asyncio.sleep(self.dice.choice([0, 0.001]))
            try:
                await self.ask()
            except Exception as error:
                if not is_expected(error):
                    self.problem("a stray:", *traceback.format_exception(error))


# The request at hand: one after the other.
now: Site


# Resources


def _end(site: Site, name: str, failure: BaseException | None) -> None:
    if site.does(f"{name} fails to end", 0.1):
        if name == "commit" and isinstance(scope_here(), ServedScope):
            site.failed_before_response = True
        raise PlannedError(f"the end of {name}")
    if failure is not None and not site.does(f"{name} swallows", 0.1):
        raise failure


def resource(name: str, *uses: Any, declare: Any = request_scoped) -> Any:
    async def factory(*key: int) -> AsyncIterator[Attempt]:
        site, failure = now, None
        attempt = Attempt(name, True, scope_here(), key)
        with site.running(attempt):
            await site.pause(site.does(f"{name} pauses"))
            for use in uses:
                attempt.used.append(await use())
            if site.does(f"{name} fails", 0.05):
                raise PlannedError(name)
            site.up(attempt)
            try:
                yield attempt
            except BaseException as error:
                failure = error
            site.going(attempt)
            try:
                await site.pause(site.does(f"{name} ends slowly"))
                _end(site, name, failure)
            finally:
                failure = None  # no cycle with this frame

    factory.__qualname__ = name
    return declare(factory)


def sync_resource(name: str, *uses: Any, declare: Any = request_scoped) -> Any:
    def factory() -> Iterator[Attempt]:
        site, failure = now, None
        attempt = Attempt(name, True, scope_here(), thread=threading.get_ident())
        with site.running(attempt):
            for use in uses:
                attempt.used.append(use())
            site.up(attempt)
            try:
                yield attempt
            except BaseException as error:
                failure = error
            site.going(attempt)
            if attempt.thread != threading.get_ident():
                site.problem("torn down in another thread:", attempt)
            if site.does(f"{name} ends slowly"):
                time.sleep(0.0005)
            try:
                _end(site, name, failure)
            finally:
                failure = None

    factory.__qualname__ = name
    return declare(factory)


pool = resource("pool", declare=lifespan_scoped)
clock = sync_resource("clock", declare=lifespan_scoped)
tenant = sync_resource("tenant")
rights = sync_resource("rights", tenant)
user = resource("user")
db = resource("db", pool)
lock = resource("lock", db, declare=request_scoped(keyed=True))
report = resource("report", db, user)
commit = resource("commit", db, declare=request_scoped(until="response"))


@request_scoped
async def orders() -> object:
    return await db()


# Views


async def view(request: HttpRequest) -> HttpResponseBase:
    site = now
    await site.ask()
    await site.pause(site.dice.choice([0, 1, 4]))
    if site.does("the view calls sync code"):
        await sync_to_async(site.ask_sync)()
    if site.does("the view spawns"):
        site.strays.append(spawn(site.ask()))
        if site.chance(0.3):
            site.strays[-1].cancel()
    if site.does("the view leaves a task"):
        site.strays.append(asyncio.create_task(site.ask_again_and_again()))
    if site.does("the view releases"):
        with suppress(ScopedError):
            await user.release()
    if site.does("the view finds nothing"):
        raise Http404
    if site.does("the view fails"):
        raise PlannedError("the view")
    if site.does("the view streams", 0.4):
        return StreamingHttpResponse(body(site))
    if site.does("the view sends a file"):
        return FileResponse(Path(__file__).open("rb"))  # noqa: ASYNC230
    return HttpResponse("async")


async def body(site: Site) -> AsyncIterator[bytes]:
    try:
        for _ in range(4):
            await site.dice.choice([db, user, report])()
            yield b"x" * 10
            await site.pause(site.does("the stream pauses"))
            if site.does("the stream fails"):
                raise PlannedError("the stream")
    finally:
        await site.pause(site.does("the stream ends slowly"))


def sync_view(request: HttpRequest) -> HttpResponseBase:
    site = now
    if connection.in_atomic_block:
        site.problem("the thread was lent with a transaction")
    site.ask_sync()
    with connection.cursor() as cursor:
        cursor.execute("select 1")
    with suppress(PlannedError), transaction.atomic():
        if site.does("the sync view takes its time"):
            time.sleep(0.002)
        site.ask_sync()
        if site.does("its transaction fails"):
            raise PlannedError("the transaction")
    if site.does("the sync view fails"):
        raise PlannedError("the sync view")
    if site.does("the sync view streams"):
        return StreamingHttpResponse(str(tenant()).encode() for _ in range(3))
    return HttpResponse("sync")


urlpatterns = [path("async", view), path("sync", sync_view)]


# Middleware


@sync_only_middleware
def sync_middleware(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Any:
    def middleware(request: HttpRequest) -> HttpResponseBase:
        site = now
        if site.does("sync middleware asks"):
            site.ask_sync()
        if site.does("sync middleware answers", 0.1):
            return HttpResponse("early")
        response = get_response(request)
        if site.does("sync middleware fails", 0.1):
            raise PlannedError("sync middleware")
        return response

    return middleware


@async_only_middleware
def async_middleware(get_response: Callable[[HttpRequest], Awaitable[HttpResponseBase]]) -> Any:
    async def middleware(request: HttpRequest) -> HttpResponseBase:
        site = now
        if site.does("async middleware asks"):
            await site.ask()
        try:
            response = await get_response(request)
        except asyncio.CancelledError:
            if site.does("async middleware swallows a cancellation"):
                return HttpResponse("late")
            raise
        await site.pause(site.does("async middleware pauses"))
        return response

    return middleware


STACKS = [(), ("async",), ("sync",), ("sync", "async"), ("async", "sync")]


def handler(stack: tuple[str, ...]) -> ScopedASGIHandler:
    names = [f"{__name__}.{kind}_middleware" for kind in stack]
    with override_settings(MIDDLEWARE=names):
        return ScopedASGIHandler()


handlers = {stack: handler(stack) for stack in STACKS}


# The server


def started(**named: Any) -> None:
    now.started += 1


async def finished(**named: Any) -> None:
    now.finished += 1


def finished_sync(**named: Any) -> None:
    if now.does("a receiver fails"):
        raise PlannedError("a receiver")


async def exchange(site: Site) -> None:
    dice = site.dice
    gone_after = dice.choice([None, None, 0, 0.0003, 0.001, 0.003])
    killed_after = dice.choice([None, None, None, 0, 0.0003, 0.001, 0.003])
    fails_at = dice.choice([None] * 6 + [1, 2, 3])
    is_slow = site.chance(0.3)
    size = dice.choice([0, 10, 3_000_000])
    is_read = False

    async def receive() -> dict[str, Any]:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": b"x" * size}
        try:
            if gone_after is None:
                await asyncio.get_running_loop().create_future()
            else:
                await asyncio.sleep(gone_after)
        except asyncio.CancelledError:
            if not site.does("receive() makes a disconnect of a cancellation"):
                raise
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        last = site.sent[-1] if site.sent else {"type": "none"}
        if last["type"] == "http.response.body" and not last.get("more_body", False):
            site.problem("after the last message:", message)
        if (message["type"] == "http.response.start") is not (not site.sent):
            site.problem("out of order:", [one["type"] for one in site.sent], message["type"])
        if message.get("status", 500) < 400 and site.failed_before_response:
            site.problem("a false", message["status"])
        site.sent.append(message)
        if fails_at == len(site.sent):
            raise OSError("the client has gone")
        if is_slow:
            await asyncio.sleep(0.0004)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": dice.choice(["GET", "GET", "HEAD", "POST"]),
        "path": dice.choice(["/async", "/async", "/sync", "/nowhere"]),
        "headers": [],
        "query_string": b"",
    }
    application = handlers[dice.choice(STACKS)]
    task = asyncio.create_task(application(scope, receive, send))
    if killed_after is not None:
        await asyncio.sleep(killed_after)
        task.cancel()
        if site.chance(0.3):
            await asyncio.sleep(0)
            task.cancel()
    _, pending = await asyncio.wait([task], timeout=DEADLINE / 2)
    if pending:
        site.problem("it hangs:", scope["path"], *_waiting(task))
        task.cancel()
        await asyncio.wait([task], timeout=DEADLINE / 4)
    elif not task.cancelled() and not is_expected(error := task.exception() or PlannedError()):
        site.problem("it raised", *traceback.format_exception(error))


def _waiting(task: "asyncio.Task[Any]") -> list[str]:
    return [f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in task.get_stack()]


async def serve(site: Site) -> None:
    with suppress(ScopedError):  # a teardown of the lifespan's has failed
        async with lifespan_scope():
            await exchange(site)
            await asyncio.gather(*site.strays, return_exceptions=True)
    this = asyncio.current_task()
    while left := [task for task in asyncio.all_tasks() if task is not this]:
        await asyncio.wait(left, timeout=0.01)


def run(seed: int) -> Site:
    global now
    now = site = Site(seed)
    receivers: list[tuple[Any, Any]] = [
        (request_started, started),
        (request_finished, finished),
        (request_finished, finished_sync),
    ]
    for signal, receiver in receivers:
        signal.connect(receiver, sender=ScopedASGIHandler)

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE):
            await serve(site)

    try:
        with asyncio.Runner(debug=False) as runner:
            runner.run(bounded())
    except BaseException as error:
        site.problem("it raised", *traceback.format_exception(error))
    finally:
        for signal, receiver in receivers:
            signal.disconnect(receiver, sender=ScopedASGIHandler)
    site.check_attempts()
    if site.finished > 1 or site.started > site.finished:
        site.problem(site.started, "times request_started,", site.finished, "request_finished")
    if lifespans:
        site.problem("lifespans are left:", list(lifespans.values()))
        lifespans.clear()
    return site
