"""
Promises 6, 7, 8 and trap 2: whatever happens at whichever await. A whole request
through the handler, and a whole ``request_scope()``, are run again and again;
each time something happens at the next suspension, of whichever task, until
nothing is left to suspend.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core.signals import request_finished, request_started
from django.http import HttpResponse, StreamingHttpResponse
from django.test import override_settings
from django.urls import path

from scoped import lifespan_scope, lifespan_scoped, request_scope, request_scoped
from scoped.asgi import ScopedASGIHandler
from tests.connection import Connection
from tests.lockstep import observe, tick
from tests.slowness import within
from tests.tables import what_is_kept

# Seconds after which one run, of some milliseconds, is taken to hang.
DEADLINE = within(10)

log: list[str] = []


def tracked(name: str) -> Iterator[str]:
    log.append(f"+{name}")
    try:
        yield name
    finally:
        log.append(f"-{name}")


@lifespan_scoped
async def pool() -> AsyncIterator[str]:
    await tick()
    for name in tracked("pool"):
        yield name
        await tick()


@lifespan_scoped
async def cache() -> AsyncIterator[str]:
    await pool()
    for name in tracked("cache"):
        try:
            yield name
        finally:
            await tick()


@request_scoped
async def db() -> AsyncIterator[str]:
    await pool()
    await tick()
    for name in tracked("db"):
        try:
            yield name
        finally:
            await tick()
            await pool()


@request_scoped
def tenant() -> Iterator[str]:
    yield from tracked("tenant")


@request_scoped
async def user() -> AsyncIterator[str]:
    await asyncio.gather(db(), cache())
    tenant()
    for name in tracked("user"):
        try:
            yield name
        finally:
            await tick()
            await db()


@request_scoped
async def broken() -> AsyncIterator[str]:
    await db()
    for name in tracked("broken"):
        try:
            yield name
        finally:
            await tick()
            raise ValueError("teardown")


async def async_view(request: Any) -> HttpResponse:
    try:
        await user()
        await tick()
    except asyncio.CancelledError:
        log.append("view cancelled")
        for _ in range(4):
            await tick()
        log.append("view cleaned up")
        raise
    return HttpResponse("ok")


def sync_view(request: Any) -> HttpResponse:
    tenant()
    async_to_sync(user)()
    return HttpResponse("ok")


async def children_view(request: Any) -> HttpResponse:
    first = asyncio.create_task(db())
    first.add_done_callback(lambda task: task.cancelled() or task.exception())
    await asyncio.gather(user(), user(), broken())
    await first
    return HttpResponse("ok")


async def mixed_view(request: Any) -> HttpResponse:
    """Threads in the request, and a request in it, both with first uses."""
    await sync_to_async(tenant)()
    await sync_to_async(async_to_sync(db))()
    async with request_scope():
        await asyncio.create_task(user())
    await user()
    return HttpResponse("ok")


async def stream_view(request: Any) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        try:
            yield await db()
            yield await asyncio.create_task(user())
        finally:
            log.append("stream closed")
            await tick()

    return StreamingHttpResponse(body())


async def raising_view(request: Any) -> HttpResponse:
    await broken()
    await user()
    raise ValueError("view")


def sync_middleware(get_response: Callable[..., Any]) -> Callable[..., Any]:
    def middleware(request: Any) -> Any:
        tenant()
        return get_response(request)

    return middleware


urlpatterns = [
    path("async", async_view),
    path("sync", sync_view),
    path("children", children_view),
    path("mixed", mixed_view),
    path("stream", stream_view),
    path("raises", raising_view),
]


class Attack:
    """What happens at the n-th suspension, counted over all tasks of a run."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind = kind
        self.at = at
        self.suspensions = 0
        self.struck = False
        self.is_over = False  # what the run has set up for the lifespan suspends later too
        self.task: asyncio.Task[Any] | None = None  # the server's, or the scope's owner
        self.disconnect: Callable[[], None] = lambda: None

    def __str__(self) -> str:
        return f"{self.kind} at suspension {self.at}: {log}"

    def __call__(self, coroutine: Any) -> None:
        number = self.suspensions - self.at
        self.suspensions += 1
        again = (number > 0 and self.kind == "again and again") or (
            number == 3 and "twice" in self.kind
        )
        if number != 0 and not again:
            return
        task = asyncio.current_task() if self.kind == "the task itself" else self.task
        assert task is not None
        if self.is_over or task.done():
            return
        self.struck = True
        if self.kind == "client":
            self.disconnect()
        else:
            task.cancel()


async def until(truth: Callable[[], object], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not truth():
        assert time.monotonic() < deadline, what()
        await asyncio.sleep(0)


async def run_under(attack: Attack, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    """Run it, in a task of its own, to its end."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(observe(attack))
    try:
        attack.task = loop.create_task(coroutine)
        await asyncio.wait([attack.task], timeout=DEADLINE)
    finally:
        loop.set_task_factory(None)
        attack.is_over = True
    assert attack.task.done(), f"hangs: {attack}"
    return attack.task


OF_REQUEST = {"db", "tenant", "user", "broken"}
OF_LIFESPAN = {"pool", "cache"}


def held(names: set[str]) -> list[str]:
    """What is set up now; and what was set up last has been torn down first."""
    names_held: list[str] = []
    for entry in log:
        if entry[1:] in names:
            if entry[0] == "+":
                names_held.append(entry[1:])
            else:
                assert names_held, log
                assert names_held.pop() == entry[1:], log
    return names_held


def others() -> "set[asyncio.Task[Any]]":
    me: Any = asyncio.current_task()
    return asyncio.all_tasks() - {me}


@asynccontextmanager
async def server(handler: ScopedASGIHandler) -> AsyncIterator[None]:
    """The lifespan protocol, as a server speaks it."""
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    task = asyncio.create_task(handler({"type": "lifespan"}, events.get, sent.put))
    for phase in ("startup", "shutdown"):
        events.put_nowait({"type": f"lifespan.{phase}"})
        assert await asyncio.wait_for(sent.get(), DEADLINE) == {
            "type": f"lifespan.{phase}.complete"
        }
        if phase == "startup":
            yield
    await task


@pytest.fixture
def signals() -> Iterator[list[str]]:
    """The signals of a request, as async receivers see them."""
    seen: list[str] = []

    async def started(**kwargs: Any) -> None:
        seen.append("started")
        await tick()

    async def finished(**kwargs: Any) -> None:
        seen.append("finished")
        await tick()

    request_started.connect(started)
    request_finished.connect(finished)
    yield seen
    request_started.disconnect(started)
    request_finished.disconnect(finished)


@pytest.fixture
def sync_receivers(signals: list[str]) -> Iterator[None]:
    """A project's own, for which each signal takes a hop to the request's thread."""

    def started(**kwargs: Any) -> None:
        signals.append("started, sync")

    def finished(**kwargs: Any) -> None:
        signals.append("finished, sync")

    request_started.connect(started)
    request_finished.connect(finished)
    yield
    request_started.disconnect(started)
    request_finished.disconnect(finished)


ATTACKS = ["server", "client", "the task itself", "server, twice", "again and again"]
ON_ATTACKS = pytest.mark.parametrize("kind", ATTACKS)


@ON_ATTACKS
@pytest.mark.parametrize("where", ["/async", "/sync", "/children", "/mixed", "/stream", "/raises"])
async def test_a_whole_request_ends_well(where: str, kind: str, signals: list[str]) -> None:
    await attack_each_await(kind, where, signals)


@ON_ATTACKS
async def test_a_request_with_sync_middleware_ends_well(kind: str, signals: list[str]) -> None:
    with override_settings(MIDDLEWARE=[f"{__name__}.sync_middleware"]):
        await attack_each_await(kind, "/mixed", signals)


async def test_the_teardowns_of_a_cancelled_request_may_use_task_groups() -> None:
    """A group leaves alone who was cancelled before it; so the request must not seem to be."""
    reached = asyncio.Event()

    async def fail() -> None:
        raise ValueError

    @request_scoped
    async def group() -> AsyncIterator[None]:
        try:
            yield
        finally:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(fail())
            except* ValueError:
                log.append("handled")
            await tick()
            log.append("torn down")

    async def view(request: Any) -> HttpResponse:
        await group()
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    log.clear()
    with override_settings(ROOT_URLCONF=type("urls", (), {"urlpatterns": [path("", view)]})):
        task = Connection(ScopedASGIHandler()).start()
        await asyncio.wait_for(reached.wait(), DEADLINE)
        task.cancel()
        await asyncio.wait([task], timeout=DEADLINE)
    assert task.cancelled()
    assert log == ["handled", "torn down"]


@ON_ATTACKS
@pytest.mark.usefixtures("sync_receivers")
async def test_a_request_with_sync_receivers_ends_well(kind: str, signals: list[str]) -> None:
    def check(attack: Attack) -> None:
        assert signals.count("finished, sync") == signals.count("finished"), str(attack)

    await attack_each_await(kind, "/stream", signals, check)


async def attack_each_await(
    kind: str, where: str, signals: list[str], check: Callable[[Attack], None] = lambda _: None
) -> None:
    points = 0
    while await attack_request(attack := Attack(kind, points), where, signals):
        check(attack)
        points += 1
    assert points > 15  # else it has not reached what it is to reach


async def attack_request(attack: Attack, where: str, signals: list[str]) -> bool:
    """Returns whether there was an await to strike at."""
    log.clear()
    signals.clear()
    with override_settings(ROOT_URLCONF=__name__):
        handler = ScopedASGIHandler()
        async with server(handler):
            connection = Connection(handler, where, before_send=lambda *_: tick())
            attack.disconnect = connection.disconnect
            task = await run_under(attack, connection.run())
            assert not held(OF_REQUEST), str(attack)
            check_end(attack, task)
            assert signals.count("started") <= signals.count("finished") <= 1, str(attack)
            assert "finished" in signals or not log, str(attack)
            if attack.kind != "the task itself":  # one cancellation comes to the view, no second
                assert log.count("view cancelled") == log.count("view cleaned up"), str(attack)
            if "+db" in log and where == "/stream":
                assert log.index("stream closed") < log.index("-db"), str(attack)
            after = Connection(handler, "/async")  # what came before has broken nothing
            await after.run()
            assert after.status == 200, str(attack)
    await until(lambda: not others(), others)
    assert not held(OF_LIFESPAN), str(attack)
    assert log.count("+pool") == log.count("+cache") == 1, str(attack)
    return attack.struck


def check_end(attack: Attack, task: "asyncio.Task[Any]") -> None:
    error = None if task.cancelled() else task.exception()
    if attack.kind == "the task itself":  # by nobody who may end a request: so it has failed
        known = ("neither by its client nor by the server", "teardown", "torn down")
        assert error is None or any(one in str(error) for one in known), str(attack)
    else:
        assert error is None, str(attack)
        assert task.cancelled() is (attack.struck and attack.kind != "client"), str(attack)


@pytest.mark.parametrize("kind", ["owner", "the task itself", "owner, twice", "again and again"])
@pytest.mark.parametrize("is_held", [True, False])
async def test_a_whole_scope_ends_well(kind: str, is_held: bool) -> None:
    at = 0
    while await attack_scope(Attack(kind, at), is_held):
        at += 1
    assert at > 20


async def attack_scope(attack: Attack, is_held: bool) -> bool:
    async def body() -> None:
        async with ThreadSensitiveContext():
            async with request_scope() as scope:
                scopes.append(scope)
                await mixed_view(None)
                await children()

    async def children() -> None:
        await asyncio.gather(user(), db(), cache())

    log.clear()
    scopes: list[Any] = []
    async with lifespan_scope() if is_held else nullcontext():
        task = await run_under(attack, body())
        check_end(attack, task)
        # A thread that sets up finds out itself that its scope has closed meanwhile.
        await until(lambda: not held(OF_REQUEST), lambda: str(attack))
        await until(lambda: not any(map(what_is_kept, scopes)), lambda: str(attack))
    await until(lambda: not others(), others)
    assert not held(OF_LIFESPAN), str(attack)
    return attack.struck
