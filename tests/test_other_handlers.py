"""
Requests that other handlers than ours serve: Django's test clients, WSGI, the
stock ASGI handler. What works there works on sync receivers alone; the rest is
refused in words that say what to do. Promises 18 and 26.
"""

import asyncio
import contextvars
import io
from concurrent.futures import ThreadPoolExecutor

import django
import pytest
from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_finished, request_started
from django.db import close_old_connections
from django.http import HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path

from scoped import (
    AsyncResourceError,
    NoScopeError,
    current_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.core import lifespan as lifespans
from scoped.core.current import current
from scoped.core.waits import run_without_loop
from scoped.serving.receivers import close_foreign, open_foreign
from tests.connection import Connection

log: list[str] = []


@lifespan_scoped
def registry():
    log.append("registry set up")
    yield "registry"
    log.append("registry torn down")


@request_scoped
def tenant():
    log.append("tenant set up")
    try:
        yield registry()
    except Exception as error:
        log.append(f"tenant saw {type(error).__name__}")
        raise
    finally:
        log.append("tenant torn down")


@request_scoped
async def db():
    log.append("db set up")
    try:
        yield "db"
    finally:
        await asyncio.sleep(0)
        log.append("db torn down")


def sync_view(request):
    assert tenant() is tenant()
    return HttpResponse(tenant())


def sync_raises(request):
    tenant()
    raise ValueError


async def async_view(request):
    return HttpResponse(await db())


async def async_raises(request):
    await db()
    raise ValueError


async def streams(request):
    async def body():
        yield await db()
        log.append("streamed")
        yield "!"

    return StreamingHttpResponse(body())


def sync_streams(request):
    def body():
        yield tenant()
        log.append("streamed")

    return StreamingHttpResponse(body())


urlpatterns = [
    path("sync", sync_view),
    path("sync-raises", sync_raises),
    path("async", async_view),
    path("async-raises", async_raises),
    path("streams", streams),
    path("sync-streams", sync_streams),
]


@pytest.fixture(autouse=True)
def _fresh():
    log.clear()
    with override_settings(ROOT_URLCONF=__name__):
        yield
    assert current.get() is None


def of_tenant():
    return [entry for entry in log if entry.startswith("tenant")]


def test_our_receivers_for_others_are_sync_and_come_before_djangos():
    for signal, receiver in [(request_started, open_foreign), (request_finished, close_foreign)]:
        order = [reference() for _, reference, *_ in signal.receivers]
        assert order.index(receiver) < order.index(close_old_connections)
        assert not any(is_async for key, *_, is_async in signal.receivers if key[1] == id(None)), (
            "an async receiver for every sender breaks Django's AsyncClient"
        )


# The sync client


def test_the_client_uses_sync_resources():
    assert Client().get("/sync").content == b"registry"
    assert log == [
        "registry set up",
        "tenant set up",
        "tenant torn down",
        "registry torn down",
    ] or of_tenant() == ["tenant set up", "tenant torn down"]


def test_the_client_streams():
    response = Client().get("/sync-streams")
    assert b"".join(response.streaming_content) == b"registry"
    assert of_tenant() == ["tenant set up", "tenant torn down"]
    assert log.index("streamed") < log.index("tenant torn down")


def test_a_view_that_raises_is_seen_by_the_factory():
    assert Client(raise_request_exception=False).get("/sync-raises").status_code == 500
    assert of_tenant() == ["tenant set up", "tenant saw ValueError", "tenant torn down"]


def test_the_client_with_an_async_view_is_refused_in_clear_words():
    with pytest.raises(AsyncResourceError, match="serve the project over ASGI"):
        Client().get("/async")
    assert log == []


def test_the_client_in_a_scope_has_one_of_its_own():
    with request_scope() as outer:
        tenant()
        Client().get("/sync")
        assert current_scope() is outer
        assert of_tenant() == ["tenant set up", "tenant set up", "tenant torn down"]


# WSGI


@pytest.fixture
def _process_ends():
    """WSGI keeps its lifespan until the process ends."""
    yield
    if lifespan := lifespans.lifespans.get(None):
        run_without_loop(lifespan.close())


@pytest.mark.usefixtures("_process_ends")
def test_wsgi_without_a_path():
    assert call(WSGIHandler(), None)[0].startswith("404")


def call(application, where):
    statuses = []
    response = application(
        {
            "REQUEST_METHOD": "GET",
            **({"PATH_INFO": where} if where else {}),  # PEP 3333: may be absent if empty
            "wsgi.input": io.BytesIO(),
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
        },
        lambda status, headers: statuses.append(status),
    )
    try:
        return statuses[0], b"".join(response)
    finally:
        response.close()


@pytest.mark.usefixtures("_process_ends")
def test_wsgi_uses_sync_resources_and_keeps_the_lifespan_ones():
    application = WSGIHandler()
    for _ in range(3):  # in one thread, which carries its Context along
        assert call(application, "/sync") == ("200 OK", b"registry")
    assert of_tenant() == ["tenant set up", "tenant torn down"] * 3
    assert log.count("registry set up") <= 1
    assert "registry torn down" not in log


@pytest.mark.usefixtures("_process_ends")
def test_wsgi_after_a_request_that_the_server_never_closed_starts_afresh():
    application = WSGIHandler()

    def run():
        abandoned = application(
            {
                "REQUEST_METHOD": "GET",
                "PATH_INFO": "/sync",
                "wsgi.input": io.BytesIO(),
                "SERVER_NAME": "localhost",
                "SERVER_PORT": "80",
            },
            lambda status, headers: None,
        )
        assert call(application, "/sync")[0] == "200 OK"
        assert of_tenant() == ["tenant set up", "tenant set up", "tenant torn down"]
        abandoned.close()

    contextvars.copy_context().run(run)
    assert of_tenant().count("tenant torn down") == 2


async def test_the_sync_client_in_a_thread_of_an_async_test():
    assert (await sync_to_async(Client().get)("/sync")).content == b"registry"
    assert of_tenant() == ["tenant set up", "tenant torn down"]


# The async client and the stock ASGI handler: Django before 6.1 loses the Context

if django.VERSION >= (6, 1):

    @pytest.mark.parametrize("where", ["/async", "/sync", "/async-raises"])
    async def test_the_async_client_on_django_6_1(where):
        client = AsyncClient(raise_request_exception=False)
        await client.get(where)
        resource = where[1:].replace("sync", "tenant") if where == "/sync" else "db"
        assert log.count(f"{resource} set up") == log.count(f"{resource} torn down") == 1

    async def test_the_async_client_streams_on_django_6_1():
        response = await AsyncClient().get("/streams")
        chunks = [chunk async for chunk in response.streaming_content]
        assert chunks == [b"db", b"!"]
        for _ in range(10):  # it is closed in a task of its own
            await asyncio.sleep(0)
        assert log == ["db set up", "streamed", "db torn down"]

    async def test_the_stock_handler_on_django_6_1():
        handler = ASGIHandler()
        connection = Connection(handler, "/async")
        await connection.run()
        assert connection.body == b"db"
        connection = Connection(handler, "/async-raises")
        await connection.run()
        assert connection.status == 500
        assert log == ["db set up", "db torn down"] * 2

    def test_a_scope_that_sync_code_opens_is_of_the_event_loop_that_first_uses_it():
        """In a thread that belongs to no event loop yet."""

        def serve():
            request_started.send(ASGIHandler, scope={"method": "GET", "path": "/"})
            try:
                assert asyncio.run(db()) == "db"
                with pytest.raises(AsyncResourceError, match="another one"):
                    asyncio.run(db())
            finally:
                request_finished.send(ASGIHandler)

        with ThreadPoolExecutor(1) as thread:
            thread.submit(contextvars.Context().run, serve).result()
        assert log == ["db set up", "db torn down"]

else:

    async def test_the_async_client_before_6_1_raises_an_error_that_names_the_remedy():
        with pytest.raises(NoScopeError, match=r"async with request_scope\(\)"):
            await AsyncClient().get("/async")
        assert log == []

    async def test_the_remedy_works():
        async with request_scope():
            assert (await AsyncClient().get("/async")).content == b"db"
            assert log == ["db set up"]
        assert log == ["db set up", "db torn down"]

    async def test_the_stock_handler_before_6_1_raises_an_error_that_names_the_remedy(caplog):
        connection = Connection(ASGIHandler(), "/async")
        await connection.run()
        assert connection.status == 500
        assert "scoped.asgi.get_asgi_application()" in caplog.text
