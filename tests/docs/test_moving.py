"""docs/moving.md."""

import django
import pytest
from asgiref.sync import async_to_sync
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished, request_started
from django.db import close_old_connections
from django.http import HttpResponse, StreamingHttpResponse
from django.test import AsyncClient
from django.urls import path

from scoped.asgi import ScopedASGIHandler
from tests.connection import Connection
from tests.docs.project import its_leaks_ignored, urls

MIDDLEWARE = ("moving.md", "From a middleware that opens a container")
SIGNALS = ("moving.md", "From signals and ContextVars")


async def test_the_middleware_closes_before_the_stream_begins(project, serve):
    before = project(MIDDLEWARE).before
    middleware = ["before.container_middleware"]
    async with serve(path("", before.export), MIDDLEWARE=middleware) as site:
        with pytest.raises(RuntimeError, match="the connection is closed"):
            await site.get("/")


async def test_a_resource_lives_to_the_last_byte_also_beside_the_middleware(project, serve):
    modules = project(MIDDLEWARE)
    for middleware in ([], ["before.container_middleware"]):
        async with serve(path("", modules.after.export), MIDDLEWARE=middleware) as site:
            assert (await site.get("/")).body == b"0\n1\n2\n"


@pytest.fixture
def signals(project):
    module = project(MIDDLEWARE, SIGNALS).signals
    yield module
    for sender in (None, ScopedASGIHandler):
        request_started.disconnect(module.open_connection, sender=sender)
        request_finished.disconnect(module.close_connection, sender=sender)


async def get(handler, where="/"):
    connection = Connection(handler(), where)
    await connection.run()
    return connection


async def test_the_signals_under_djangos_handler(signals):
    signals.connect()
    with urls(path("", signals.index)):
        seen = (await get(ASGIHandler)).body
    assert seen == (b"True" if django.VERSION >= (6, 1) else b"False")


@pytest.mark.parametrize("handler", [ASGIHandler, ScopedASGIHandler])
async def test_the_signals_when_a_stream_fails(signals, handler):
    signals.connect()
    seen = []

    async def view(request):
        signals.connection.set(signals.Connection())
        seen.append(signals.connection.get())

        async def body():
            yield "1"
            raise ValueError

        return StreamingHttpResponse(body())

    with its_leaks_ignored(), urls(path("", view)):
        with pytest.raises((ValueError, ExceptionGroup)):
            await get(handler)
    assert seen[0].is_open is (handler is ASGIHandler)


async def test_the_signals_under_ours_connected_for_it_alone(signals, serve):
    signals.connect(sender=ScopedASGIHandler)
    opened = []

    async def view(request):
        opened.append(signals.connection.get())
        return await signals.index(request)

    async with serve(path("", view)) as site:
        assert (await site.get("/")).body == b"True"
    assert [connection.is_open for connection in opened] == [False]


async def test_connected_for_every_sender_djangos_client_fails_on_streams(signals):
    async def view(request):
        async def body():
            yield "1"

        return StreamingHttpResponse(body())

    async def read():
        response = await AsyncClient().get("/")
        return [part async for part in response.streaming_content]

    with its_leaks_ignored(), urls(path("", view)):
        signals.connect(sender=ScopedASGIHandler)
        assert await read() == [b"1"]
        signals.connect()
        with pytest.raises(RuntimeError):
            await read()
        request_finished.connect(close_old_connections)  # the client has lost it on its way


async def test_the_resource_in_async_and_in_sync_code(project, serve):
    connection = project(MIDDLEWARE, SIGNALS).resources.connection

    async def view(request):
        return HttpResponse(str((await connection()).is_open))

    def sync_view(request):
        return HttpResponse(str(async_to_sync(connection)().is_open))

    async with serve(path("", view), path("sync", sync_view)) as site:
        assert (await site.get("/")).body == (await site.get("/sync")).body == b"True"
