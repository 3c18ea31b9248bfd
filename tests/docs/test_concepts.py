"""docs/concepts.md."""

import asyncio
import gc
from contextlib import asynccontextmanager, contextmanager

import pytest
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.urls import path
from django.utils.decorators import async_only_middleware

from scoped import current_scope, lifespan_scope, request_scope, spawn
from tests import pages

EXAMPLE = ("concepts.md", "Concepts")
KINDS = ("concepts.md", "Four kinds of factory")
OUTSIDE = ("concepts.md", "Outside a request")
SEEN = ("concepts.md", "What is raised at the `yield`")
CHILDREN = ("concepts.md", "Who runs a factory")


async def test_the_example_logs_what_the_page_says(project, serve):
    modules = project(EXAMPLE)
    [expected] = pages.blocks(pages.DOCS / "concepts.md", "Concepts", "text")
    async with serve(path("", modules.views.index)) as site:
        assert (await site.get("/")).body == b"12"
        assert modules.resources.log == expected.splitlines()
    assert modules.resources.log[-1] == "pool is torn down"


class Thing:
    async def look(self):
        return "seen"


class SyncThing:
    def look(self):
        return "seen"


async def test_the_four_kinds(project, monkeypatch):
    closed = []

    @asynccontextmanager
    async def open_something():
        yield Thing()
        closed.append("async")

    @contextmanager
    def open_sync():
        yield SyncThing()
        closed.append("sync")

    kinds = project(KINDS).kinds
    monkeypatch.setattr(kinds, "open_something", open_something, raising=False)
    monkeypatch.setattr(kinds, "open_sync", open_sync, raising=False)
    async with request_scope():
        assert await kinds.returning() == kinds.returning_sync() == "seen"
    assert closed == ["sync", "async"]


@async_only_middleware
def tenant_middleware(get_response):
    from tenants import tenant

    async def middleware(request):
        middleware_saw.append(tenant())
        return await get_response(request)

    return middleware


middleware_saw: list[str] = []


async def test_a_factory_sees_the_request(project, serve):
    tenant = project(KINDS).tenants.tenant

    async def view(request):
        return HttpResponse(tenant())

    middleware = [f"{__name__}.tenant_middleware"]
    async with serve(path("", view), MIDDLEWARE=middleware) as site:
        assert (await site.get("/", headers=[(b"x-tenant", b"acme")])).body == b"acme"
        assert (await site.get("/")).body == b"public"
    assert middleware_saw == ["acme", "public"]


async def test_elsewhere_there_is_no_request():
    async def work():
        assert current_scope().request is None

    async with request_scope() as scope:
        assert scope.request is None
        task = spawn(work())
        await task


@pytest.mark.parametrize(
    ("how", "seen"),
    [
        ("ok", "success"),
        ("400", "success"),
        ("view", "ValueError"),
        ("404", "Http404"),
        ("403", "PermissionDenied"),
        ("stream", "KeyError"),
        ("gone in the view", "CancelledError"),
        ("gone in the stream", "CancelledError"),
        ("cancelled", "CancelledError"),
        ("send", "OSError"),
    ],
)
async def test_what_a_factory_sees(project, serve, how, seen):
    module, reached = project(SEEN).seen, asyncio.Event()

    async def hang():
        reached.set()
        await asyncio.Event().wait()

    async def body():
        yield b"1"
        if how == "stream":
            raise KeyError
        await hang()

    async def view(request):
        await module.witness()
        match how:
            case "view":
                raise ValueError
            case "404":
                raise Http404
            case "403":
                raise PermissionDenied
            case "stream" | "gone in the stream":
                return StreamingHttpResponse(body())
            case "gone in the view" | "cancelled":
                await hang()
        return HttpResponse(status=400 if how == "400" else 200)

    async def send(number, message):
        if how == "send":
            raise OSError

    async with serve(path("", view)) as site:
        connection = site.open("/", before_send=send)
        task = connection.start()
        if how.startswith(("gone", "cancelled")):
            await reached.wait()
            if how == "cancelled":
                task.cancel()
            else:
                connection.disconnect()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
    assert module.log == [seen]


async def test_the_middlewares_exception_is_seen(project, serve):
    module = project(SEEN).seen

    async def view(request):
        await module.witness()
        return HttpResponse()

    middleware = [f"{__name__}.raising_middleware"]
    async with serve(path("", view), MIDDLEWARE=middleware) as site:
        assert (await site.get("/")).status == 500
    assert module.log == ["RuntimeError"]


@async_only_middleware
def raising_middleware(get_response):
    async def middleware(request):
        await get_response(request)
        raise RuntimeError

    return middleware


async def test_outside_a_request_each_call_has_a_scope_and_a_scope_its_lifespan(project):
    modules = project(EXAMPLE, OUTSIDE)
    log = modules.resources.log
    assert await modules.jobs.report() == "user"
    each = ["pool is set up", "db is set up", "db is torn down", "pool is torn down"]
    assert log == [*each[:2], "user is set up", "user is torn down", *each[2:]]
    log.clear()
    for _ in range(2):
        assert await modules.jobs.nightly() == "db"
    assert log == each * 2
    log.clear()
    async with lifespan_scope():
        for _ in range(2):
            await modules.jobs.nightly()
    assert log == [each[0], *each[1:3] * 2, each[3]]


def test_a_scope_that_is_collected_open_says_what_it_held(project):
    async def abandon():
        await request_scope().__aenter__()
        await resources.db()

    def run():
        asyncio.run(abandon())
        gc.collect()

    resources = project(EXAMPLE).resources
    with pytest.warns(ResourceWarning, match=r"never closed, .* resources\.db "):
        run()


@pytest.mark.parametrize("view", ["in_view", "in_child"])
async def test_who_runs_a_factory(project, serve, view):
    children = project(CHILDREN).children

    async def asserts(request):
        await getattr(children, view)(request)
        return HttpResponse()

    async with serve(path("", asserts)) as site:
        assert (await site.get("/")).status == 200
