"""``scoped.signals`` and ``inspect()``: what happens to scopes, for those who want to know."""

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from asgiref.sync import markcoroutinefunction, sync_to_async
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import path

from scoped import (
    OpenScope,
    ScopeClosedError,
    inspect,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
    signals,
    spawn,
)
from scoped.asgi import ScopedASGIHandler
from scoped.core import observer as events
from scoped.core.lifespan import LifespanScope
from scoped.core.request import RequestScope
from scoped.core.scope import Scope
from tests.connection import Connection
from tests.slowness import within

NAMES = ("scope_opened", "scope_closed", "resource_set_up", "resource_torn_down")


def name_of(thing: Any) -> str:
    return thing.factory.name.rpartition(".")[2]


class Listener:
    """Keeps what it is told, in words."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.told: list[dict[str, Any]] = []

    def scope_opened(self, scope: Scope, **kwargs: Any) -> None:
        self.note(f"opened {scope}", kwargs)

    def scope_closed(self, scope: Scope, seconds: float, error: Any, **kwargs: Any) -> None:
        assert seconds > 0
        self.note(f"closed {scope}" + (f", {error!r}" if error else ""), kwargs)

    def resource_set_up(
        self, resource: Any, scope: Scope, seconds: float, error: Any, asked_by: Any, **kwargs: Any
    ) -> None:
        assert seconds > 0
        line = f"{name_of(resource)} set up"
        if asked_by is not None:
            line += f" for {name_of(asked_by)}"
        self.note(line + (f", {error!r}" if error else ""), kwargs | {"seconds": seconds})

    def resource_torn_down(
        self, resource: Any, scope: Scope, seconds: float, error: Any, **kwargs: Any
    ) -> None:
        assert seconds > 0
        line = f"{name_of(resource)} torn down" + (f", {error!r}" if error else "")
        self.note(line, kwargs | {"seconds": seconds})

    def note(self, line: str, kwargs: dict[str, Any]) -> None:
        self.log.append(line)
        self.told.append(kwargs)


@pytest.fixture(autouse=True)
def _nobody_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo, which other tests import, does as long as the process lives."""
    for name in NAMES:
        monkeypatch.setattr(getattr(signals, name), "receivers", [])
    monkeypatch.setattr(events, "observer", None)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    for name in NAMES:
        getattr(signals, name).connect(getattr(listener, name))
    yield listener
    for name in NAMES:
        getattr(signals, name).disconnect(getattr(listener, name))
    assert events.observer is None


@lifespan_scoped
async def pool() -> AsyncIterator[str]:
    yield "pool"


@request_scoped
async def db() -> AsyncIterator[str]:
    yield f"db of {await pool()}"


@request_scoped
async def user() -> str:
    return f"user of {await db()}"


@request_scoped
def tenant() -> Iterator[str]:
    yield "tenant"


@pytest.mark.parametrize("held_by", ["async code", "sync code", "a request"])
def test_who_hears_that_a_lifespan_opens_may_open_a_request_in_it(held_by: str) -> None:
    log: list[object] = []

    @lifespan_scoped
    def settings() -> Iterator[str]:
        log.append("set up")
        yield "settings"
        log.append("torn down")

    def hear(scope: Scope, **kwargs: Any) -> None:
        log.append(str(scope))
        if isinstance(scope, LifespanScope):
            with request_scope():
                log.append(settings())

    async def hold() -> None:
        async with lifespan_scope(), request_scope():
            log.append(settings())

    async def imply() -> None:
        async with request_scope():
            log.append(settings())

    signals.scope_opened.connect(hear)
    try:
        if held_by == "sync code":
            with lifespan_scope(), request_scope():
                log.append(settings())
        else:
            asyncio.run(hold() if held_by == "async code" else imply())
    finally:
        signals.scope_opened.disconnect(hear)
    request = ["the request scope"]
    assert log == [
        *(request if held_by == "a request" else []),
        *("the lifespan", "the request scope", "set up", "settings"),
        *([] if held_by == "a request" else request),
        *("settings", "torn down"),
    ]


async def test_who_hears_that_a_background_task_begins_may_use_a_lifespan_in_it() -> None:
    log: list[object] = []

    @lifespan_scoped
    def settings() -> Iterator[str]:
        yield "settings"
        log.append("torn down")

    def hear(scope: Scope, **kwargs: Any) -> None:
        if isinstance(scope, RequestScope):
            log.append(settings())

    async def work() -> None:
        log.append("work")

    signals.scope_opened.connect(hear)
    try:
        await spawn(work())
    finally:
        signals.scope_opened.disconnect(hear)
    assert log == ["settings", "work", "torn down"]


async def test_they_tell_who_asked_for_what_and_the_order_of_it_all(listener: Listener) -> None:
    async with lifespan_scope():
        async with request_scope():
            await user()
            await db()
            tenant()
    assert listener.log == [
        "opened the lifespan",
        "opened the request scope",
        "pool set up for db",
        "db set up for user",
        "user set up",
        "tenant set up",
        "tenant torn down",
        "db torn down",
        "closed the request scope",
        "pool torn down",
        "closed the lifespan",
    ]


async def test_in_child_tasks_and_threads_too(listener: Listener) -> None:
    async with lifespan_scope(), request_scope():
        await asyncio.gather(user(), asyncio.sleep(0))
        await sync_to_async(tenant)()
    assert listener.log[2:-1] == [
        "pool set up for db",
        "db set up for user",
        "user set up",
        "tenant set up",
        "tenant torn down",
        "db torn down",
        "closed the request scope",
        "pool torn down",
    ]


async def test_seconds_are_those_that_it_took(listener: Listener) -> None:
    @request_scoped
    async def slow() -> AsyncIterator[None]:
        await asyncio.sleep(0.05)
        yield
        await asyncio.sleep(0.1)

    async with request_scope():
        await slow()
    seconds = dict(zip(listener.log, listener.told, strict=True))
    assert seconds["slow set up"]["seconds"] > 0.04
    assert seconds["slow torn down"]["seconds"] > 0.09


async def test_errors_are_told(listener: Listener) -> None:
    @request_scoped
    async def broken() -> None:
        raise OSError("no server")

    @request_scoped
    async def fragile() -> AsyncIterator[None]:
        yield
        raise OSError("no commit")

    with pytest.raises(ExceptionGroup):
        async with request_scope():
            with pytest.raises(OSError, match="no server"):
                await broken()
            await fragile()
    with pytest.raises(ValueError, match="the body's"):
        async with request_scope():
            raise ValueError("the body's")
    assert listener.log == [
        "opened the request scope",
        "broken set up, OSError('no server')",
        "fragile set up",
        "fragile torn down, OSError('no commit')",
        "closed the request scope",
        "opened the request scope",
        'closed the request scope, ValueError("the body\'s")',
    ]


async def test_what_is_released_is_torn_down_and_told_of_once(listener: Listener) -> None:
    async with request_scope():
        await db()
        await db.release()
        assert listener.log[-1] == "db torn down"
    assert listener.log.count("db torn down") == 1


async def test_what_a_released_ones_teardown_asks_for_is_asked_for_by_no_factory(
    listener: Listener,
) -> None:
    @request_scoped
    async def audit() -> str:
        return "audit"

    @request_scoped
    async def session() -> AsyncIterator[str]:
        yield "session"
        await audit()

    async with request_scope():
        await session()
        await session.release()
    assert [line for line in listener.log if "audit" in line] == ["audit set up"]


@pytest.mark.parametrize("uses", [True, False])
async def test_a_lifespan_waits_for_who_hears_that_a_request_in_it_has_closed(uses: bool) -> None:
    waited_for: list[str] = []

    def hear(scope: Scope, **kwargs: Any) -> None:
        if isinstance(scope, RequestScope):
            waited_for.append(lifespan.in_use_by())

    signals.scope_closed.connect(hear)
    async with lifespan_scope():
        async with request_scope() as scope:
            assert scope.lifespan is not None
            lifespan = scope.lifespan
            if uses:
                await db()
        assert lifespan.in_use_by() == ""
    signals.scope_closed.disconnect(hear)
    assert waited_for == ["the request scope"]


async def test_what_lives_until_the_response_is_part_of_its_request(listener: Listener) -> None:
    @request_scoped(until="response")
    async def transaction() -> AsyncIterator[None]:
        await db()
        yield

    async def view(request: HttpRequest) -> HttpResponse:
        await transaction()
        return HttpResponse()

    class Urls:
        urlpatterns = (path("", view),)

    with override_settings(ROOT_URLCONF=Urls):
        async with lifespan_scope():
            await Connection(ScopedASGIHandler(), "/").run()
    assert listener.log[1:-2] == [
        "opened the request GET /",
        "pool set up for db",
        "db set up for transaction",
        "transaction set up",
        "transaction torn down",
        "db torn down",
        "closed the request GET /",
    ]


async def test_a_receiver_that_raises_is_logged_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def raises(**kwargs: Any) -> None:
        raise RuntimeError("a receiver's")

    for name in NAMES:
        getattr(signals, name).connect(raises)
    try:
        async with request_scope():
            assert await user() == "user of db of pool"
    finally:
        for name in NAMES:
            getattr(signals, name).disconnect(raises)
    names = {record.name for record in caplog.records}
    assert names - {"asyncio"} == {"django.dispatch"}  # asyncio's says that logging is slow


def test_an_async_receiver_is_refused() -> None:
    async def receiver(**kwargs: Any) -> None: ...

    def marked(**kwargs: Any) -> Any: ...

    markcoroutinefunction(marked)  # as asgiref and Django do what is async and no `async def`
    for refused in (receiver, marked):
        with pytest.raises(TypeError, match="Connect a sync function"):
            signals.scope_opened.connect(refused)
    assert events.observer is None


async def test_when_the_last_receiver_is_gone_nothing_is_sent_any_more() -> None:
    def connect() -> None:
        def receiver(**kwargs: Any) -> None: ...

        signals.scope_opened.connect(receiver)

    connect()
    assert events.observer is not None
    gc.collect()  # receivers are held weakly
    async with request_scope():
        pass
    assert events.observer is None


async def test_who_ceases_to_listen_while_something_is_set_up_hears_no_more_of_it() -> None:
    def hear(**kwargs: Any) -> None:
        pytest.fail("it was told")

    signals.resource_set_up.connect(hear)

    @request_scoped
    async def db() -> str:
        signals.resource_set_up.disconnect(hear)
        return "db"

    async with request_scope():
        assert await db() == "db"


async def test_where_nobody_listens_a_set_up_fails_as_it_does_elsewhere() -> None:
    @request_scoped
    async def db() -> str:
        raise ValueError("no db")

    @request_scoped
    def tenant() -> str:
        raise ValueError("no tenant")

    assert events.observer is None
    async with request_scope():
        with pytest.raises(ValueError, match="no db"):
            await db()
        with pytest.raises(ValueError, match="no tenant"):
            tenant()


def holding(*names: str) -> list[OpenScope]:
    """Those that hold resources of this module: other tests' may be open, too."""
    ours = {f"{__name__}.{name}" for name in names}
    return [one for one in inspect() if ours & set(one.resources)]


async def test_inspect_shows_what_is_open_and_what_it_holds() -> None:
    gate = asyncio.Event()

    @request_scoped
    async def slow() -> None:
        await gate.wait()

    async with lifespan_scope(), request_scope() as scope:
        await db()
        task = asyncio.create_task(slow())
        await asyncio.sleep(0.01)
        lifespan, request = holding("pool", "db")
        assert (lifespan.name, request.name) == ("the lifespan", str(scope))
        assert [one.rpartition(".")[2] for one in lifespan.resources] == ["pool"]
        assert [one.rpartition(".")[2] for one in request.resources] == ["db"]
        assert [one.rpartition(".")[2] for one in request.being_set_up] == ["slow"]
        assert lifespan.seconds >= request.seconds > 0.009
        gate.set()
        await task
    assert holding("pool", "db") == []


def test_inspect_sees_other_threads() -> None:
    held, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with request_scope():
            tenant()
            held.set()
            go_on.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert held.wait(10)
    [one] = holding("tenant")
    assert one.name == "the request scope"
    go_on.set()
    thread.join()
    assert holding("tenant") == []


async def test_a_slow_teardown_is_logged_with_its_resource(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Scope, "slow_teardown", 0.02)

    @request_scoped
    async def slow() -> AsyncIterator[None]:
        yield
        await asyncio.sleep(0.05)

    async with request_scope():
        await slow()
        await db()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "slow" in record.getMessage()
    assert "of the request scope took 0.1 seconds to be torn down." in record.getMessage()


async def test_what_is_used_after_the_end_raises_though_somebody_listens(
    listener: Listener,
) -> None:
    async with request_scope():
        task = asyncio.create_task(asyncio.sleep(0.01))
        late = asyncio.create_task(_late(task))
    with pytest.raises(ScopeClosedError):
        await late


async def _late(task: "asyncio.Task[None]") -> None:
    await task
    await db()


def test_whoever_connects_while_another_thread_looks_for_receivers_is_told() -> None:
    looking, go_on = threading.Event(), threading.Event()

    class Collected(weakref.ref[Any]):
        """A receiver that is no more, as the first look at it finds out in its time."""

        def __call__(self) -> Any:
            if not looking.is_set():
                looking.set()
                assert go_on.wait(within(20))
            return None

    def receiver(**kwargs: Any) -> None: ...

    def look() -> None:
        signals.resource_set_up.disconnect(receiver)

    signals.resource_torn_down.connect(receiver)
    lookup, _, *rest = signals.resource_torn_down.receivers[-1]
    signals.resource_torn_down.receivers[-1] = (lookup, Collected(receiver), *rest)
    looks = threading.Thread(target=look)
    connects = threading.Thread(target=signals.scope_opened.connect, args=(receiver,))
    try:
        looks.start()
        assert looking.wait(within(20))
        connects.start()
        connects.join(0.1)  # it need not be done, but what it would do by itself it has done
        go_on.set()
        looks.join()
        connects.join()
        assert events.observer is not None
    finally:
        signals.scope_opened.disconnect(receiver)
        signals.resource_torn_down.disconnect(receiver)
