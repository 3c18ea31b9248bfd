"""docs/sync.md."""

import asyncio
import contextvars
import json
import re
import threading
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler

import httpx
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.handlers.wsgi import WSGIHandler
from django.core.servers.basehttp import WSGIServer
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.urls import path

from scoped import (
    AsyncResourceError,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.core import lifespan as lifespans
from scoped.core.waits import run_without_loop
from scoped.testing import Client
from scoped.wsgi import ScopedWSGIHandler
from tests.docs.project import urls
from tests.wsgi_server import call, form

SYNC = ("sync.md", "Sync code")
IN_SYNC_VIEWS = ("sync.md", "Async resources in a sync view")
WSGI = ("sync.md", "WSGI")
TESTS = ("sync.md", "In tests")
THREADS = ("sync.md", "Threads")

ROOT = Path(__file__).parents[2]
log: list[str] = []


def end_of_process():
    if lifespan := lifespans.lifespans.get(None):
        run_without_loop(lifespan.close())


@pytest.fixture(autouse=True)
def _fresh():
    log.clear()
    yield
    end_of_process()


async def test_the_views_under_asgi(project, serve, notes):
    views = project(SYNC).views
    async with serve(path("", views.index), path("post", views.post)) as site:
        assert (await site.post("/post", text="one")).body == b"Saved."
        assert (await site.get("/")).body == b"1"
    assert await notes() == ["one"]


@pytest.mark.parametrize("autocommit", [True, False])
async def test_it_commits_before_the_first_byte(project, serve, notes, autocommit):
    views, seen = project(SYNC).views, []

    def view(request):
        views.db().autocommit = autocommit
        views.index(request)  # another statement before
        return views.post(request)

    async def look(number, message):
        seen.append(await notes())

    async with serve(path("", view)) as site:
        await site.post("/", text="one", before_send=look)
    assert seen[0] == (["one"] if autocommit else [])
    assert await notes() == ["one"]


async def test_the_views_under_wsgi(project, notes):
    modules = project(SYNC, WSGI)
    views, application = modules.views, modules.wsgi.application
    assert isinstance(application, ScopedWSGIHandler)
    with urls(path("", views.index), path("post", views.post)):
        get = sync_to_async(call)
        assert await get(application, "/post") == ("405 Method Not Allowed", b"")
        assert await get(application, "/post", **form("text=one")) == ("200 OK", b"Saved.")
        assert await get(application, "/") == ("200 OK", b"1")
    assert await notes() == ["one"]


# Async resources in sync views


async def test_async_resources_in_sync_views(project, serve):
    modules = project(IN_SYNC_VIEWS)
    views = modules.async_views
    seen = []

    async def both(request):
        seen.append(await modules.async_resources.user())
        seen.append(await sync_to_async(async_to_sync(modules.async_resources.user))())
        seen.append(modules.async_resources.user.get_nowait())
        return HttpResponse()

    middleware = ["async_views.user_middleware"]
    async with serve(path("", views.index), path("both", both)) as site:
        assert (await site.get("/")).body == b"ada"
        assert (await site.get("/both")).status == 200
    assert seen[0] is seen[1] is seen[2]
    async with serve(path("", views.short), MIDDLEWARE=middleware) as site:
        assert (await site.get("/")).body == b"ada"


# WSGI


@request_scoped
def witness():
    try:
        yield "w"
    except BaseException as error:
        log.append(type(error).__name__)
        raise
    else:
        log.append("success")


def raises(request):
    witness()
    raise ValueError


def not_found(request):
    witness()
    raise Http404


def stream(request):
    witness()

    def body():
        yield "1"
        raise KeyError

    return StreamingHttpResponse(body())


@pytest.mark.parametrize(("view", "djangos"), [(raises, True), (not_found, False), (stream, False)])
def test_what_factories_see_under_wsgi(view, djangos):
    with urls(path("", view)):
        for handler, sees in [(ScopedWSGIHandler(), True), (WSGIHandler(), djangos)]:
            log.clear()
            if view is stream:
                with pytest.raises(KeyError):
                    call(handler, "/")
            else:
                call(handler, "/")
            expected = {"raises": "ValueError", "not_found": "Http404", "stream": "KeyError"}
            assert log == [expected[view.__name__] if sees else "success"]


def test_a_lifespan_resource_lives_until_the_process_ends():
    @lifespan_scoped
    def registry():
        yield "registry"
        log.append("torn down")

    with urls(path("", lambda request: HttpResponse(registry()))):
        for _ in range(2):
            assert call(ScopedWSGIHandler(), "/")[1] == b"registry"
    assert log == []
    end_of_process()
    assert log == ["torn down"]


class _Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        pass


def test_runserver_closes_what_it_serves():
    """Its server, in this process."""

    def body():
        witness()
        yield "streamed"
        log.append("last byte")

    with urls(path("", lambda request: StreamingHttpResponse(body()))):
        server = WSGIServer(("127.0.0.1", 0), _Quiet)
        server.set_app(ScopedWSGIHandler())
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        try:
            answer = httpx.get(f"http://127.0.0.1:{server.server_port}/", timeout=10)
        finally:
            thread.join()
            server.server_close()
    assert answer.text == "streamed"
    assert log == ["last byte", "success"]


# In tests


def test_the_tests_of_the_page_pass(project):
    modules = project(SYNC, TESTS)
    with urls(path("", modules.views.index)):
        modules.test_sync.test_with_the_client()
        modules.test_sync.test_the_view_alone()


# AsyncResourceError, each row of the table


def rows():
    text = (ROOT / "docs" / "sync.md").read_text()
    table = text.partition("## When it raises AsyncResourceError")[2].partition("## ")[0]
    return [row.split("|")[1].strip() for row in table.splitlines()[4:] if row.startswith("|")]


async def opened_by_sync_code(user):
    def use():
        with request_scope():
            async_to_sync(user)()

    await sync_to_async(use)()


async def another_loop(user):
    async with request_scope():
        await asyncio.to_thread(async_to_sync(user))


async def yet_another_loop(user):
    async with request_scope():
        await sync_to_async(lambda: asyncio.run(user()))()


async def not_set_up_yet(user):
    async with request_scope():
        user.get_nowait()


async def released_elsewhere(user):
    async with request_scope():
        await user()
        await asyncio.create_task(user.release())


async def another_thread(user):
    begun, go_on = threading.Event(), threading.Event()

    @request_scoped
    def slow():
        begun.set()
        go_on.wait(5)

    async with request_scope():
        thread = asyncio.create_task(sync_to_async(slow)())
        while not begun.is_set():
            await asyncio.sleep(0.001)
        try:
            slow()
        finally:
            go_on.set()
            await thread


async def waits_for_itself(user):
    @request_scoped
    def odd():
        return contextvars.Context().run(current.run, odd)  # no trace of who asks

    async with request_scope():
        current = contextvars.copy_context()
        odd()


async def needs_the_thread_that_waits(user):
    occupied, loop = asyncio.Event(), asyncio.get_running_loop()

    @request_scoped
    async def slow():
        await occupied.wait()
        await sync_to_async(lambda: None)()

    def view():
        loop.call_soon_threadsafe(occupied.set)
        async_to_sync(slow)()

    async with request_scope():
        first = asyncio.create_task(slow())
        await asyncio.sleep(0)
        try:
            await sync_to_async(view)()
        finally:
            await first


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (0, opened_by_sync_code),
        (1, another_loop),
        (1, yet_another_loop),
        (2, not_set_up_yet),
        (3, another_thread),
        (4, waits_for_itself),
        (5, needs_the_thread_that_waits),
        (6, released_elsewhere),
    ],
)
async def test_it_says_what_the_table_says(number, how, monkeypatch):
    monkeypatch.setattr("scoped.core.first_use._PATIENCE", 0.01)

    @request_scoped
    async def user():
        yield

    with pytest.raises(AsyncResourceError, match=re.escape(rows()[number])):
        await how(user)
    assert len(rows()) == 7


def test_the_client_and_wsgi_refuse_async_ones():
    @request_scoped
    async def user():
        yield

    def view(request):
        async_to_sync(user)()

    with urls(path("", view)):
        with pytest.raises(AsyncResourceError, match=re.escape(rows()[0])):
            Client().get("/")


# Threads


async def test_all_sync_code_of_a_request_runs_in_one_thread_which_is_lent_again(project, serve):
    views = project(THREADS).thread_views
    middleware = ["thread_views.sync_middleware"]
    seen = set()
    async with serve(
        path("sync", views.sync_view), path("async", views.async_view), MIDDLEWARE=middleware
    ) as site:
        for where in ["/sync", "/async", "/sync"]:
            threads = json.loads((await site.get(where)).body)
            assert len(set(threads)) == 1
            seen.update(threads)
    assert len(seen) == 1
    assert threading.get_ident() not in seen


async def test_a_lifespans_sync_generator_has_a_thread_of_its_own():
    threads = []

    def generator():
        threads.append(threading.get_ident())
        yield
        threads.append(threading.get_ident())

    elsewhere, here = lifespan_scoped(generator), lifespan_scoped(generator)
    async with lifespan_scope():
        async with request_scope():
            await asyncio.to_thread(elsewhere)
            here()
    own, loops, *ends = threads
    assert loops == threading.get_ident() != own
    assert ends == [loops, own]
    assert has_ended(own)


def has_ended(ident):
    for thread in threading.enumerate():
        if thread.ident == ident:
            thread.join(10)
            return not thread.is_alive()
    return True
