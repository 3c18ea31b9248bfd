"""docs/release.md."""

import asyncio

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

from scoped import AsyncResourceError, TeardownError, lifespan_scoped, request_scope, request_scoped

EXAMPLE = ("release.md", "Early release")
WHERE = ("release.md", "Where it may be called")

log: list[str] = []


@pytest.fixture(autouse=True)
def _fresh():
    log.clear()


async def test_others_get_the_connection_while_the_stream_is_open(project, serve, notes):
    views = project(EXAMPLE).views
    counts = []

    async def look(number, message):
        if number == 1:
            counts.append((await site.get("/count")).body)

    async with serve(path("slowly", views.slowly), path("count", views.count)) as site:
        stream = await site.post("/slowly", before_send=look)
        assert stream.body == b"begun1"
    assert counts == [b"1"]


async def test_in_a_sync_view(project, serve, notes):
    modules = project(EXAMPLE, WHERE)

    async def idle(request):
        pool = await modules.resources.pool()
        return HttpResponse(pool.get_idle_size())

    async with serve(path("", modules.sync_views.sync_view), path("idle", idle)) as site:
        assert (await site.get("/")).body == b"released"
        assert (await site.get("/idle")).body == b"1"


def logging_resource(name, *used):
    @request_scoped
    async def resource():
        for other in used:
            await other()
        log.append(f"+{name}")
        try:
            yield object()
        except BaseException:
            log.append(f"{name} saw a failure")
            raise
        finally:
            log.append(f"-{name}")

    return resource


async def test_what_goes_with_it_and_what_stays():
    base = logging_resource("base")
    db = logging_resource("db", base)
    transaction = logging_resource("transaction", db)
    other = logging_resource("other")
    async with request_scope():
        await db.release()  # not set up
        assert log == []
        await transaction(), await other()
        first = await db()
        log.clear()
        await db.release()
        assert log == ["-transaction", "-db"]
        assert await db() is not first
        assert log == ["-transaction", "-db", "+db"]


async def test_a_teardown_that_fails_is_raised_there():
    @request_scoped
    async def fragile():
        try:
            yield
        finally:
            raise OSError

    users = logging_resource("user", fragile)
    async with request_scope():
        await users()
        with pytest.raises(TeardownError):
            await fragile.release()
        assert log == ["+user", "-user"]


def test_a_lifespan_resource_has_none():
    @lifespan_scoped
    async def pool():
        yield

    assert not hasattr(pool, "release")


# The table


async def test_first_used_in_view_middleware_or_body():
    async with request_scope():
        db = logging_resource("db")
        await db()
        with pytest.raises(AsyncResourceError, match="that is elsewhere"):
            await asyncio.create_task(db.release())
        assert log == ["+db"]
        await db.release()
        assert log == ["+db", "-db"]


async def test_the_streaming_body_releases_what_the_view_used(serve):
    db = logging_resource("db")

    async def view(request):
        await db()

        async def body():
            await db.release()
            log.append("body")
            yield "x"

        return StreamingHttpResponse(body())

    async with serve(path("", view)) as site:
        await site.get("/")
    assert log == ["+db", "-db", "body"]


@pytest.mark.parametrize("first", ["child", "thread"])
@pytest.mark.parametrize("then", ["owner", "child", "thread"])
async def test_first_used_elsewhere_it_may_be_released_anywhere(first, then):
    db = logging_resource("db")
    async with request_scope():
        for where, function in [(first, db), (then, db.release)]:
            if where == "owner":
                await function()
            elif where == "child":
                await asyncio.create_task(function())
            else:
                await sync_to_async(async_to_sync(function))()
        assert log == ["+db", "-db"]


async def test_a_sync_one_is_released_in_its_thread():
    @request_scoped
    def tenant():
        log.append("+tenant")
        yield
        log.append("-tenant")

    @request_scoped
    async def uses_it():
        tenant()
        yield
        log.append("-uses it")

    async with request_scope():
        await sync_to_async(tenant)()
        with pytest.raises(AsyncResourceError, match="that is elsewhere"):
            tenant.release()
        await sync_to_async(tenant.release)()
        assert log == ["+tenant", "-tenant"]

        await uses_it()
        with pytest.raises(AsyncResourceError, match="Release it first"):
            tenant.release()
        await uses_it.release()
        tenant.release()
        assert log[2:] == ["+tenant", "-uses it", "-tenant"]


async def test_not_while_another_task_sets_up_what_uses_it():
    db, reached = logging_resource("db"), asyncio.Event()

    @request_scoped
    async def slow():
        await db()
        reached.set()
        await asyncio.Event().wait()
        yield

    async with request_scope():
        await db()
        task = asyncio.create_task(slow())
        await reached.wait()
        with pytest.raises(AsyncResourceError, match="is being set up with it right now"):
            await db.release()
        assert log == ["+db"]
        task.cancel()
        await asyncio.wait([task])


async def test_two_at_once_take_their_turns():
    def slow_resource(name):
        @request_scoped
        async def resource():
            yield
            log.append(f"{name} begins")
            await asyncio.sleep(0.01)
            log.append(f"{name} ends")

        return resource

    one, other = slow_resource("one"), slow_resource("other")
    async with request_scope():
        await asyncio.gather(one(), other())
        await asyncio.gather(one.release(), other.release())
    assert log == ["one begins", "one ends", "other begins", "other ends"]
