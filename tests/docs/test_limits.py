"""docs/limits.md: each limit is as the page says, and its remedy helps."""

import asyncio
import contextvars
import gc
import logging
import sqlite3
import sys
import threading
from contextlib import nullcontext
from types import ModuleType

import pytest
from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished
from django.dispatch import receiver
from django.http import HttpResponse
from django.urls import path

from scoped import (
    AsyncResourceError,
    LifetimeError,
    ScopeClosedError,
    TeardownError,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.asgi import ScopedASGIHandler
from scoped.wsgi import ScopedWSGIHandler
from tests.connection import Connection
from tests.docs.project import its_leaks_ignored, urls
from tests.slowness import within
from tests.wsgi_server import call, environ

CANCELLATIONS = ("limits.md", "Cancellations that get lost")
STREAMS = ("limits.md", "Streams")
ANYIO = ("limits.md", "anyio")
THREADS = ("limits.md", "Threads")
FACTORIES = ("limits.md", "Factories")
RESPONSES = ("limits.md", "Responses")

log: list[str] = []


@pytest.fixture(autouse=True)
def _fresh():
    log.clear()


def module(monkeypatch, name, **names):
    made = ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    return made


# Cancellations


@request_scoped
async def witness():
    try:
        yield
    except BaseException as error:
        log.append(f"witness saw {type(error).__name__}")
        raise
    else:
        log.append("witness saw success")


@pytest.mark.parametrize("handler", [ScopedASGIHandler, ASGIHandler])
@pytest.mark.parametrize(("view", "second_runs"), [("in_two_steps", True), ("in_one_step", False)])
async def test_a_cancellation_between_two_calls_is_lost(
    project, monkeypatch, handler, view, second_runs
):
    reached = asyncio.Event()

    async def first():
        if handler is ScopedASGIHandler:
            await witness()
        reached.set()
        if view == "in_one_step":
            await asyncio.sleep(0.05)

    async def second():
        await asyncio.sleep(0)
        log.append("second")

    module(monkeypatch, "steps", first=first, second=second)
    views = project(CANCELLATIONS).views
    with its_leaks_ignored(), urls(path("", getattr(views, view))):
        connection = Connection(handler(), "/")
        task = connection.start()
        await reached.wait()
        connection.disconnect()
        await asyncio.wait([task])
    assert ("second" in log) is second_runs
    if handler is ScopedASGIHandler:
        assert log[-1] == "witness saw CancelledError"


@pytest.mark.only_if(sys.version_info < (3, 12), reason="mended in Python 3.12")
async def test_wait_for_swallows_a_cancellation_on_python_3_11():
    done = asyncio.Event()

    async def wait():
        await asyncio.wait_for(done.wait(), 5)
        log.append("goes on")

    task = asyncio.create_task(wait())
    for _ in range(3):
        await asyncio.sleep(0)
    done.set()
    await asyncio.sleep(0)  # what is awaited is done, and its task has yet to hear of it
    task.cancel()
    await task
    assert log == ["goes on"]


# Streams


@pytest.mark.parametrize("how", ["plain", "wrapped", "left out"])
async def test_a_stream_in_a_wrapper(project, serve, monkeypatch, how):
    middleware = [] if how == "plain" else ["django.middleware.gzip.GZipMiddleware"]
    stuck, is_open = asyncio.Event(), True
    late = []

    class Rows:
        async def rows(self):
            while True:
                yield b"x" * 1000

        async def note(self, text):
            log.append("noted while open" if is_open else "noted while closed")
            if not is_open:
                try:
                    await db()
                except ScopeClosedError:
                    late.append(True)

    @request_scoped
    async def db():
        nonlocal is_open
        try:
            yield Rows()
        finally:
            is_open = False
            log.append("closed")

    module(monkeypatch, "resources", db=db)
    export = project(STREAMS).streams.export

    async def view(request):
        response = await export(request)
        if how == "left out":
            response.headers["Content-Encoding"] = "identity"
        return response

    async def send(number, message):
        if number == 3:
            stuck.set()
            await asyncio.Event().wait()

    async with serve(path("", view), MIDDLEWARE=middleware) as site:
        connection = site.open("/", headers=[(b"accept-encoding", b"gzip")], before_send=send)
        task = connection.start()
        await stuck.wait()
        connection.disconnect()
        await task
        gc.collect()
        await asyncio.sleep(0.01)
    if how == "wrapped":
        assert log == ["closed", "noted while closed"]
        assert late, "db() raises ScopeClosedError"
    else:
        assert log == ["noted while open", "closed"]


# anyio


@pytest.mark.parametrize(("view", "status"), [("wrong", 500), ("right", 200)])
async def test_an_anyio_scope_across_the_yield(project, serve, view, status, caplog):
    scopes = project(ANYIO).scopes
    async with serve(path("", getattr(scopes, view))) as site:
        assert (await site.get("/")).status == status
    said = "Attempted to exit a cancel scope that isn't the current " in caplog.text
    assert said is (status == 500)


async def test_in_a_task_of_its_own_it_has_the_scope_to_itself(project, serve):
    import anyio

    limited = project(ANYIO).scopes.limited

    async def view(request):
        with anyio.move_on_after(5):
            await asyncio.create_task(limited())
        return HttpResponse()

    async with serve(path("", view)) as site:
        assert (await site.get("/")).status == 200


async def test_asyncios_need_not_nest(serve):
    @request_scoped
    async def limited():
        async with asyncio.timeout(5), asyncio.TaskGroup():
            yield

    async def view(request):
        async with asyncio.timeout(4), asyncio.TaskGroup():
            await limited()
        return HttpResponse()

    async with serve(path("", view)) as site:
        assert (await site.get("/")).status == 200


# Threads


@pytest.mark.parametrize(("view", "same"), [("other_thread", False), ("same_thread", True)])
async def test_the_thread_of_a_teardown(project, serve, view, same):
    threads = project(THREADS).threads
    async with serve(path("", getattr(threads, view))) as site:
        await site.get("/")
    assert (len(set(threads.seen)) == 1) is same
    assert threading.get_ident() not in threads.seen


@pytest.mark.parametrize("thread_sensitive", [True, False])
async def test_sqlite_refuses_another_thread(serve, thread_sensitive, caplog):
    opened = []

    @request_scoped
    def connection():
        opened.append(sqlite3.connect(":memory:"))
        try:
            yield opened[-1]
        finally:
            opened[-1].close()

    async def view(request):
        await sync_to_async(connection, thread_sensitive=thread_sensitive)()
        return HttpResponse()

    with its_leaks_ignored():
        async with serve(path("", view)) as site:
            assert (await site.get("/")).status == 200
        opened.clear()
        refused = [record for record in caplog.records if record.name == "scoped"]
        assert bool(refused) is not thread_sensitive
        for record in refused:
            assert isinstance(record.exc_info[1].exceptions[0], sqlite3.ProgrammingError)
        caplog.clear()
        refused.clear()


# Factories


@pytest.mark.parametrize(("name", "closed"), [("bare", []), ("guarded", ["closed"])])
async def test_a_bare_yield(project, serve, name, closed):
    clients = project(FACTORIES).clients

    async def view(request):
        await getattr(clients, name)()
        raise ValueError

    async with serve(path("", view)) as site:
        await site.get("/")
    assert clients.log == closed


@pytest.mark.parametrize("where", ["owner", "child"])
async def test_a_scope_across_the_yield(project, where):
    client = project(FACTORIES).clients.guarded

    @lifespan_scoped
    async def asks_after_it():
        async with request_scope():
            yield await client()
            await client()

    @lifespan_scoped
    async def has_it():
        async with request_scope():
            value = await client()
            yield value
            log.append(value)

    async def use(resource):
        async with lifespan_scope():
            await (asyncio.create_task(resource()) if where == "child" else resource())

    await use(has_it)
    assert log == ["client"]
    with pytest.raises(TeardownError) as caught:
        await use(asks_after_it)
    [error] = caught.value.exceptions
    assert isinstance(error, LifetimeError)


# Servers; daphne and the kill are in docs/servers.md


def test_wsgi_without_close():
    @request_scoped
    def tenant():
        log.append("+tenant")
        try:
            yield object()
        finally:
            log.append("-tenant")

    def view(request):
        return HttpResponse(id(tenant()))

    def run():
        application = ScopedWSGIHandler()
        abandoned = application(environ(), lambda status, headers: None)
        status, _ = call(application)
        assert status == "200 OK"
        assert log == ["+tenant", "+tenant", "-tenant"]
        abandoned.close()

    def forget():
        context = contextvars.copy_context()
        context.run(ScopedWSGIHandler(), environ(), lambda status, headers: None)
        del context
        gc.collect()

    with urls(path("", view)):
        contextvars.copy_context().run(run)
        assert log == ["+tenant", "+tenant", "-tenant", "-tenant"]
        with pytest.warns(ResourceWarning, match=r"GET / was never closed, .*tenant"):
            forget()


# Security


async def test_what_is_logged_has_the_path_and_no_query(serve, caplog):
    @request_scoped
    async def broken():
        yield "a secret value"
        raise OSError("the factory's own words")

    async def view(request):
        await broken()
        return HttpResponse("a secret body")

    with caplog.at_level(logging.INFO):
        async with serve(path("where", view)) as site:
            await site.get("/where?key=secret", headers=[(b"x-key", b"secret")])
    [record] = [record for record in caplog.records if record.name == "scoped"]
    assert "the request GET /where" in record.getMessage()
    assert "secret" not in record.getMessage()


async def test_a_scope_says_no_more_of_itself():
    async with request_scope() as scope:
        assert str(scope) == "the request scope"


@pytest.mark.parametrize("is_opened", [False, True])
def test_without_an_event_loop_who_ends_a_lifespan_that_nobody_opened_ends_what_it_holds(is_opened):
    seen = []

    @lifespan_scoped
    def cache():
        seen.append(threading.get_ident())
        yield "cache"
        seen.append(threading.get_ident())

    def use(set_up, go_on):
        with request_scope():
            assert cache() == "cache"
            set_up.set()
            assert go_on.wait(within(10))

    with lifespan_scope() if is_opened else nullcontext():
        set_up, go_on = threading.Event(), threading.Event()
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(use, set_up, go_on))
        thread.start()
        assert set_up.wait(within(10))
        with request_scope():
            assert cache() == "cache"
            go_on.set()
            thread.join()
    assert len(seen) == 2
    assert (seen[0] == seen[1]) is is_opened


@pytest.mark.parametrize("lifetime", [request_scoped, lifespan_scoped])
def test_a_second_event_loop_in_one_thread(lifetime):
    @lifetime
    async def db():
        return asyncio.get_running_loop()

    scope, context = request_scope(), contextvars.copy_context()

    async def begin():
        await scope.__aenter__()
        return await db()

    async def use():
        return await db()

    async def end():
        await scope.__aexit__(None, None, None)

    with asyncio.Runner() as first, asyncio.Runner() as second:
        assert first.run(begin(), context=context) is first.get_loop()
        if sys.version_info >= (3, 12):
            with pytest.raises(AsyncResourceError):
                second.run(use(), context=context)
        else:
            assert second.run(use(), context=context) is first.get_loop()
        first.run(end(), context=context)


@pytest.mark.parametrize("first_in_a_child", [False, True])
async def test_a_scope_that_one_task_opens_and_another_leaves(first_in_a_child):
    variable = contextvars.ContextVar("variable")

    @request_scoped
    async def db():
        token = variable.set("the factory's")
        task = asyncio.current_task()
        yield
        log.append("the same task" if asyncio.current_task() is task else "another task")
        variable.reset(token)

    scope = request_scope()

    async def begin():
        await scope.__aenter__()
        await (asyncio.create_task(db()) if first_in_a_child else db())

    async def end():
        await scope.__aexit__(None, None, None)

    await asyncio.create_task(begin())
    if first_in_a_child:
        await asyncio.create_task(end())
        assert log == ["the same task"]
        return
    with pytest.raises(TeardownError) as caught:
        await asyncio.create_task(end())
    assert "was created in a different Context" in str(caught.value.exceptions[0])
    assert log == ["another task"]


# Responses


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("HttpResponse", ["one more", "metrics torn down"]),
        ("Download", ["metrics torn down", "too late", "closed"]),
    ],
)
async def test_a_response_with_a_close_of_its_own(project, serve, name, told):
    downloads = project(RESPONSES).downloads

    @request_scoped
    async def metrics():
        yield downloads.log
        downloads.log.append("metrics torn down")

    @receiver(request_finished)
    async def count(sender, **kwargs):
        try:
            (await metrics()).append("one more")
        except ScopeClosedError:
            downloads.log.append("too late")

    async def view(request):
        await metrics()
        return getattr(downloads, name)("data")

    try:
        async with serve(path("", view)) as site:
            assert (await site.get("/")).status == 200
    finally:
        request_finished.disconnect(count)
    assert downloads.log == told
