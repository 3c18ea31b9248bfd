"""docs/until-response.md."""

import asyncio
import json

import asyncpg
import pytest
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import got_request_exception
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient as DjangosAsyncClient
from django.test import Client as DjangosClient
from django.test import override_settings
from django.urls import path
from django.utils.decorators import async_only_middleware

from scoped import (
    LifetimeError,
    NoScopeError,
    ScopeClosedError,
    TeardownError,
    request_scope,
    request_scoped,
    spawn,
)
from scoped.testing import AsyncClient, Client
from scoped.wsgi import ScopedWSGIHandler
from tests.connection import Connection
from tests.wsgi_server import call

COMMIT = ("until-response.md", "A COMMIT before the answer")
STREAM = ("until-response.md", "With a stream")
USERS = ("until-response.md", "Who may use it")
OUTSIDE = ("until-response.md", "Without a request")


@pytest.fixture
async def seats(postgres_url, monkeypatch, project):
    """The booked ones, as another connection sees them."""
    monkeypatch.setenv("DATABASE_URL", postgres_url)
    connection = await asyncpg.connect(postgres_url)
    await connection.execute("DROP TABLE IF EXISTS seats")
    await connection.execute(project(COMMIT).views.TABLE)

    async def numbers():
        rows = await connection.fetch("SELECT number FROM seats ORDER BY number")
        return [row["number"] for row in rows]

    yield numbers
    await connection.execute("DROP TABLE seats")
    await connection.close()


async def test_a_commit_that_fails_is_a_500_and_never_a_false_200(project, serve, seats, caplog):
    views, told = project(COMMIT).views, []

    def receiver(**kwargs):
        told.append(True)

    got_request_exception.connect(receiver)
    try:
        async with serve(path("", views.book)) as site:
            first = await site.post("/", seat="1")
            second = await site.post("/", seat="1")
            third = await site.post("/", seat="2")
    finally:
        got_request_exception.disconnect(receiver)
    assert (first.status, first.body) == (200, b"Booked.")
    assert second.status == 500
    assert b"Booked" not in second.body
    assert third.status == 200
    assert await seats() == [1, 2]
    assert told == [True]
    [record] = [record for record in caplog.records if record.name == "django.request"]
    error = record.exc_info[1]
    assert isinstance(error, TeardownError)
    assert isinstance(error.exceptions[0], asyncpg.UniqueViolationError)


async def test_the_commit_is_before_the_first_byte(project, serve, seats):
    views, seen = project(COMMIT).views, []

    async def look(number, message):
        seen.append((message["type"], await seats()))

    async with serve(path("", views.book)) as site:
        await site.post("/", seat="1", before_send=look)
    assert seen[0] == ("http.response.start", [1])


@pytest.mark.parametrize("how", ["raises", "not found", "client gone"])
async def test_what_a_failed_view_wrote_is_rolled_back(project, serve, seats, how):
    views, reached = project(COMMIT).views, asyncio.Event()

    async def view(request):
        await views.book(request)
        if how == "raises":
            raise ValueError
        if how == "not found":
            raise Http404
        reached.set()
        await asyncio.Event().wait()

    async with serve(path("", view)) as site:
        connection = site.open("/", form={"seat": "1"})
        task = connection.start()
        if how == "client gone":
            await reached.wait()
            connection.disconnect()
        await task
        assert await seats() == []
    if how != "client gone":
        assert connection.status == {"raises": 500, "not found": 404}[how]


async def test_a_view_that_returns_an_error_commits(project, serve, seats):
    views = project(COMMIT).views

    async def view(request):
        await views.book(request)
        return HttpResponse(status=400)

    async with serve(path("", view)) as site:
        assert (await site.post("/", seat="1")).status == 400
    assert await seats() == [1]


@async_only_middleware
def booking_middleware(get_response):
    async def middleware(request):
        from resources import transaction

        response = await get_response(request)
        connection = await transaction()
        await connection.execute("INSERT INTO seats VALUES (99)")
        response.headers["X-Middleware"] = "was here"
        return response

    return middleware


async def test_what_middleware_does_is_in_it_and_its_headers_are_not_on_the_500(
    project, serve, seats
):
    views = project(COMMIT).views
    middleware = [f"{__name__}.booking_middleware"]
    async with serve(path("", views.book), MIDDLEWARE=middleware) as site:
        good = await site.post("/", seat="1")
        assert (b"X-Middleware", b"was here") in good.sent[0]["headers"]
        assert await seats() == [1, 99]
        bad = await site.post("/", seat="2")  # 99 is taken now
        assert bad.status == 500
        assert b"X-Middleware" not in dict(bad.sent[0]["headers"])
        assert await seats() == [1, 99]


async def test_a_streaming_body_comes_after_the_commit(project, serve, seats):
    views = project(COMMIT, STREAM).views

    async def too_late(request):
        await views.transaction()

        async def body():
            try:
                await views.transaction()
            except ScopeClosedError as error:
                yield json.dumps(str(error))

        return StreamingHttpResponse(body())

    async with serve(path("", views.export), path("late", too_late)) as site:
        assert (await site.post("/")).body == b"7\n"
        late = await site.get("/late")
    assert "torn down before the first byte" in json.loads(late.body)


async def test_who_lives_longer_may_not_use_it(project, seats):
    modules = project(COMMIT, USERS)
    async with request_scope():
        with pytest.raises(LifetimeError, match=r"notes .* asked for .*transaction"):
            await modules.longer.notes()
    async with request_scope():
        notes = await modules.longer.notes_until_response()
        assert notes.connection is await modules.resources.db()


@request_scoped(until="response")
def early():
    log.append("+early")
    yield "early"
    log.append("-early")


@request_scoped
def late():
    log.append("+late")
    yield "late"
    log.append("-late")


log: list[str] = []


def sync_view(request):
    return HttpResponse(early() + late())


async def async_view(request):
    return HttpResponse(early() + late())


urlpatterns = [path("sync", sync_view), path("async", async_view)]
ALL = ["+early", "+late", "-early", "-late"]


async def test_what_serves_it(serve):
    log.clear()
    with override_settings(ROOT_URLCONF=__name__):
        async with serve(*urlpatterns) as site:
            await site.get("/async")
        assert log == ALL
        log.clear()
        await AsyncClient().get("/async")
        assert log == ALL
        log.clear()
        async with request_scope():
            early(), late()
        assert log == ALL
        log.clear()

        async def work():
            early(), late()

        await spawn(work())
        assert log == ALL


def test_what_serves_it_in_sync_code():
    with override_settings(ROOT_URLCONF=__name__):
        for get in (Client().get, lambda where: call(ScopedWSGIHandler(), where)):
            log.clear()
            get("/sync")
            assert log == ALL
        log.clear()
        with request_scope():
            early(), late()
        assert log == ALL


async def test_djangos_own_refuse_it(caplog):
    log.clear()
    with override_settings(ROOT_URLCONF=__name__):
        with pytest.raises(NoScopeError):
            await DjangosAsyncClient().get("/async")
        connection = Connection(ASGIHandler(), "/async")
        await connection.run()
        assert connection.status == 500
    assert "NoScopeError" in caplog.text
    assert log == []


def test_djangos_own_refuse_it_in_sync_code(caplog):
    log.clear()
    with override_settings(ROOT_URLCONF=__name__):
        with pytest.raises(NoScopeError, match="does not say when"):
            DjangosClient().get("/sync")
        assert call(WSGIHandler(), "/sync")[0].startswith("500")
    assert "does not say when" in caplog.text
    assert log == []


async def test_outside_a_request_the_block_raises_what_failed(project, seats):
    book = project(COMMIT, OUTSIDE).book.book
    await book(1)
    with pytest.raises(TeardownError) as raised:
        await book(1)
    [error] = raised.value.exceptions
    assert isinstance(error, asyncpg.UniqueViolationError)
    assert await seats() == [1]
