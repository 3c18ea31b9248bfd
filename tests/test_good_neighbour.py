"""
Promise 18: what hooks into Django's handlers works as under Django's own. Real ones are in
tests/neighbours; here is how they hook in.
"""

import asyncio
import contextvars
import functools
import inspect
import io
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import PermissionDenied, RequestAborted
from django.core.handlers import base, exception
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.base import BaseHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import got_request_exception
from django.db import close_old_connections
from django.dispatch import Signal
from django.http import Http404, HttpResponse
from django.http.response import HttpResponseBase
from django.test import AsyncClient as DjangosAsyncClient
from django.test import Client as DjangosClient
from django.test import override_settings
from django.urls import get_urlconf
from django.utils.decorators import async_only_middleware

from scoped import Scope, current_scope, lifespan_scope, lifespan_scoped, request_scoped
from scoped.asgi import ScopedASGIHandler
from scoped.testing import AsyncClient, Client
from scoped.wsgi import ScopedWSGIHandler
from tests.connection import Connection
from tests.slowness import within
from tests.views import Views

log: list[object] = []
variable = contextvars.ContextVar("variable", default="nothing")
view = Views()
urlpatterns = view.urlpatterns


@pytest.fixture(autouse=True)
def _fresh():
    log.clear()
    with override_settings(ROOT_URLCONF=__name__):
        yield


@request_scoped
def tenant() -> Iterator[int]:
    """A thread's own, as a SQLite connection is."""
    thread = threading.get_ident()
    try:
        yield thread
    except BaseException as error:
        log.append(type(error).__name__)
        raise
    finally:
        log.append("its thread" if threading.get_ident() == thread else "another thread")


@view
async def plain(request):
    return HttpResponse()


async def get(where, handler=None):
    connection = Connection(handler or ScopedASGIHandler(), where)
    await connection.run()
    return connection


# Patches, wherever they are made, and whenever


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (ASGIHandler, "__call__"),
        (ASGIHandler, "create_request"),
        (ASGIHandler, "send_response"),
        (BaseHandler, "get_response_async"),
        (BaseHandler, "_get_response_async"),
        (HttpResponseBase, "close"),
    ],
)
async def test_what_is_patched_after_we_were_imported_is_called_once_for_each_request(
    cls, name, monkeypatch
):
    patched = getattr(cls, name)

    def calls(self, *args):
        log.append(name)
        return patched(self, *args)

    if inspect.iscoroutinefunction(patched):

        async def patch(self, *args):
            return await calls(self, *args)
    else:
        patch = calls
    monkeypatch.setattr(cls, name, patch)
    handler = ScopedASGIHandler()
    for _ in range(2):
        assert (await get("/plain", handler)).status == 200
    assert log == [name, name]


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (WSGIHandler, "__call__"),
        (BaseHandler, "get_response"),
        (BaseHandler, "_get_response"),
        (HttpResponseBase, "close"),
    ],
)
def test_under_wsgi_too(cls, name, monkeypatch):
    patched = getattr(cls, name)

    def patch(self, *args):
        log.append(name)
        return patched(self, *args)

    monkeypatch.setattr(cls, name, patch)
    call(ScopedWSGIHandler(), "/sync/shown")
    assert [entry for entry in log if entry == name] == [name]


@async_only_middleware
def refuses(get_response):
    async def middleware(request):
        await get_response(request)
        raise PermissionDenied

    return middleware


@pytest.mark.parametrize("kind", ["functools", "a proxy"])
async def test_who_wraps_djangos_converter_is_called_and_we_see_the_failure_all_the_same(
    kind, monkeypatch
):
    converter = base.convert_exception_to_response

    class Proxy:
        """As wrapt makes them: it shows what is its function's."""

        def __init__(self, wrapped):
            self.__wrapped__ = wrapped
            self.__code__ = wrapped.__code__

        _is_coroutine_marker = None

        async def __call__(self, request):
            log.append("wrapped")
            return await self.__wrapped__(request)

    def wraps_it(get_response):
        converted = converter(get_response)
        if kind == "a proxy":
            return Proxy(converted)

        @functools.wraps(converted)
        async def wrapper(request):
            log.append("wrapped")
            return await converted(request)

        return wrapper

    @view
    async def uses(request):
        await sync_to_async(tenant)()
        return HttpResponse()

    monkeypatch.setattr(base, "convert_exception_to_response", wraps_it)
    with override_settings(MIDDLEWARE=[f"{__name__}.refuses"]):
        handler = ScopedASGIHandler()
    assert (await get("/uses", handler)).status == 403
    assert log == ["wrapped", "wrapped", "PermissionDenied", "its thread"]


async def test_who_replaces_the_maker_of_error_pages_makes_them(monkeypatch):
    def makes(request, error):
        return HttpResponse(f"ours, of {type(error).__name__}", status=404)

    @view
    async def missing(request):
        raise Http404

    monkeypatch.setattr(exception, "response_for_exception", makes)
    assert (await get("/missing")).body == b"ours, of Http404"


# Error pages, in the request's thread on every Django (ticket 36027)


@view
def sync_missing(request):
    tenant()
    raise Http404


@view
async def async_missing(request):
    await sync_to_async(tenant)()
    raise Http404


@view
async def unused_missing(request):
    raise Http404


@async_only_middleware
def misses(get_response):
    async def middleware(request):
        await sync_to_async(tenant)()
        raise Http404

    return middleware


def handler404(request, exception):
    """The project's page uses what belongs to the request's thread."""
    return HttpResponse(str(tenant() == threading.get_ident()), status=404)


@pytest.mark.parametrize(
    "where", ["/sync/sync_missing", "/async_missing", "/unused_missing", "/no/such/path"]
)
async def test_an_error_page_is_made_in_the_requests_thread(where):
    connection = await get(where)
    assert (connection.status, connection.body) == (404, b"True")
    assert log[0] in ("Http404", "Resolver404")
    assert log[1:] == ["its thread"]


async def test_that_of_async_middleware_too():
    with override_settings(MIDDLEWARE=[f"{__name__}.misses"]):
        connection = await get("/plain")
    assert (connection.status, connection.body) == (404, b"True")
    assert log == ["Http404", "its thread"]


said = contextvars.ContextVar("said", default=None)


@async_only_middleware
def says_what_was_said(get_response):
    async def middleware(request):
        response = await get_response(request)
        response["Said"] = said.get()
        return response

    return middleware


@pytest.mark.parametrize("where", ["/sync/sync_missing", "/async_missing", "/no/such/path"])
async def test_what_an_error_page_sets_in_contextvars_is_seen_after_it(where, monkeypatch):
    """As the language that it activates is, by LocaleMiddleware."""

    def page(request, exception):
        said.set("by the page")
        return HttpResponse(status=404)

    monkeypatch.setitem(globals(), "handler404", page)
    with override_settings(MIDDLEWARE=[f"{__name__}.says_what_was_said"]):
        connection = await get(where)
    assert dict(connection.sent[0]["headers"])[b"Said"] == b"by the page"


async def test_what_hears_of_an_exception_sets_contextvars_too():
    """Under Django a sync receiver of got_request_exception is part of the request's Context."""

    def notes(**kwargs):
        said.set("by a receiver")

    @view
    async def async_fails(request):
        raise ValueError

    got_request_exception.connect(notes)
    try:
        with override_settings(MIDDLEWARE=[f"{__name__}.says_what_was_said"]):
            connection = await get("/async_fails")
    finally:
        got_request_exception.disconnect(notes)
    assert connection.status == 500
    assert dict(connection.sent[0]["headers"])[b"Said"] == b"by a receiver"


# Wrapped receivers


async def test_a_test_keeps_its_connections_though_somebody_wraps_each_receiver(monkeypatch):
    live = Signal._live_receivers
    closed = []

    def wrapped(self, sender):
        def wrap(receiver):
            @functools.wraps(receiver)
            def wrapper(*args, **kwargs):
                closed.append(receiver is close_old_connections)
                return receiver(*args, **kwargs)

            return wrapper

        sync_receivers, async_receivers = live(self, sender)
        return [wrap(receiver) for receiver in sync_receivers], async_receivers

    monkeypatch.setattr(Signal, "_live_receivers", wrapped)
    assert (await AsyncClient().get("/plain")).status_code == 200
    assert closed  # others are called
    assert True not in closed


async def test_who_wraps_receivers_after_the_first_request_is_honoured(monkeypatch):
    handler, live, called = ScopedASGIHandler(), Signal._live_receivers, []

    def wrapped(self, sender):
        def wrap(receiver):
            @functools.wraps(receiver)
            def wrapper(*args, **kwargs):
                called.append(receiver)
                return receiver(*args, **kwargs)

            return wrapper

        sync_receivers, async_receivers = live(self, sender)
        return [wrap(receiver) for receiver in sync_receivers], async_receivers

    for patched in (False, True, False):
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(Signal, "_live_receivers", wrapped)
            await Connection(handler, "/plain").run()
        assert (close_old_connections in called) is patched
        called.clear()


# ContextVars of a request, in the test that sent it


@view
async def sets(request):
    variable.set("the view's")
    return HttpResponse()


@view
def sets_in_thread(request):
    variable.set("the sync view's")
    return HttpResponse()


@pytest.mark.parametrize(
    ("where", "value"), [("/sets", "the view's"), ("/sync/sets_in_thread", "the sync view's")]
)
@pytest.mark.parametrize("client", [AsyncClient, DjangosAsyncClient])
async def test_what_a_request_sets_in_a_contextvar_the_test_that_sent_it_sees(client, where, value):
    await client().get(where)
    assert variable.get() == value
    assert get_urlconf() is None


async def test_but_not_what_is_the_requests_own():
    async with lifespan_scope() as around:
        await AsyncClient().get("/sets")
        assert current_scope() is around
        assert await sync_to_async(lambda: "still works")() == "still works"


# The request, under every handler that opens a scope


@view
async def shown_async(request):
    log.append(current_scope().request is request)
    return HttpResponse()


@view
def shown(request):
    log.append(current_scope().request is request)
    return HttpResponse()


def call(application, where):
    response = application(
        {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": where,
            "wsgi.input": io.BytesIO(),
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
        },
        lambda status, headers: None,
    )
    response.close()


def over_asgi(handler):
    return lambda where: async_to_sync(Connection(handler(), where).run)()


def over_wsgi(handler):
    return lambda where: call(handler(), where)


def by_async_client(client):
    def get(where):
        return async_to_sync(client().get)(where)

    return get


def by_client(client):
    return lambda where: client().get(where)


WAYS = {
    "scoped.asgi": over_asgi(ScopedASGIHandler),
    "scoped.wsgi": over_wsgi(ScopedWSGIHandler),
    "scoped.testing.AsyncClient": by_async_client(AsyncClient),
    "scoped.testing.Client": by_client(Client),
    "django.core.wsgi": over_wsgi(WSGIHandler),
    "django.test.Client": by_client(DjangosClient),
}
if django.VERSION >= (6, 1):  # before, these lose the scope
    WAYS |= {
        "django.core.asgi": over_asgi(ASGIHandler),
        "django.test.AsyncClient": by_async_client(DjangosAsyncClient),
    }


@pytest.mark.parametrize("where", ["/sync/shown", "/shown_async"])
@pytest.mark.parametrize("way", WAYS)
def test_the_scope_knows_its_request(way, where):
    WAYS[way](where)
    assert log == [True]


def test_it_can_be_annotated():
    def name_of(scope: Scope) -> str:
        return scope.name

    @view
    def annotated(request):
        log.append(name_of(current_scope()))
        return HttpResponse()

    Client().get("/sync/annotated")
    assert log == ["the request GET /sync/annotated"]


def test_each_of_two_requests_one_inside_the_other_is_known():
    @view
    def outer(request):
        DjangosClient().get("/sync/shown")
        log.append(current_scope().request is request)
        return HttpResponse()

    DjangosClient().get("/sync/outer")
    assert log == [True, True]


# Promise 16: a lifespan that no server has begun


@lifespan_scoped
async def pool():
    yield "pool"


@view
async def uses_pool(request):
    return HttpResponse(await pool())


def logged(caplog):
    return [record for record in caplog.records if "has not begun one" in record.getMessage()]


def test_a_server_that_begins_no_lifespan_is_told_so_once(caplog):
    async def serve():
        handler = ScopedASGIHandler()
        for _ in range(3):
            assert (await get("/uses_pool", handler)).body == b"pool"

    asyncio.run(serve())
    [record] = logged(caplog)
    assert record.levelname == "WARNING"
    assert "lifespan_scope()" in record.getMessage()


def test_one_that_does_is_not_nor_is_a_test_client(caplog):
    async def serve():
        async with lifespan_scope():
            assert (await get("/uses_pool")).body == b"pool"
        assert (await AsyncClient().get("/uses_pool")).content == b"pool"

    asyncio.run(serve())
    assert logged(caplog) == []


@pytest.mark.parametrize("where", ["of the loop", "of its class"])
async def test_whoever_has_wrapped_create_task_sees_the_requests_task_before_its_first_step(
    monkeypatch, where
) -> None:
    """New Relic does: what it knows of a task it knows by the one that has created it."""
    loop = asyncio.get_running_loop()
    wrapped = loop if where == "of the loop" else asyncio.BaseEventLoop
    known: set[asyncio.Task[object] | None] = {asyncio.current_task()}

    @functools.wraps(wrapped.create_task)
    def create_task(*args: object, **kwargs: object) -> asyncio.Task[object]:
        task = create_task.__wrapped__(*args, **kwargs)
        if asyncio.current_task() in known:
            known.add(task)
        return task

    @view
    async def look(request):
        log.append(asyncio.current_task() in known)
        return HttpResponse()

    with monkeypatch.context() as patched:
        patched.setattr(wrapped, "create_task", create_task)
        await Connection(ScopedASGIHandler(), "/look").start()
    assert log == [True]


@pytest.mark.parametrize("how", ["patched", "overridden between"])
async def test_whoever_reads_bodies_in_djangos_place_reads_the_empty_ones_too(
    monkeypatch, how
) -> None:
    djangos = ASGIHandler.read_body

    async def read_body(self, receive):
        log.append("read")
        return await djangos(self, receive)

    @view
    async def look(request):
        return HttpResponse(request.body)

    handler = ScopedASGIHandler
    if how == "patched":
        monkeypatch.setattr(ASGIHandler, "read_body", read_body)
    else:
        between = type("Between", (ASGIHandler,), {"read_body": read_body})
        handler = type("Handler", (ScopedASGIHandler, between), {})
    connection = Connection(handler(), "/look")
    await connection.start()
    assert (connection.body, log) == (b"", ["read"])


async def test_whoever_bounds_the_reading_of_bodies_bounds_it_from_the_first_message_on(
    monkeypatch,
) -> None:
    async def read_body(self, receive):
        try:
            async with asyncio.timeout(0.01):
                await receive()
        except TimeoutError:
            raise RequestAborted from None

    monkeypatch.setattr(ASGIHandler, "read_body", read_body)
    connection = Connection(ScopedASGIHandler(), "/look", body=())
    async with asyncio.timeout(within(10)):
        await connection.start()
    assert connection.sent == []


@pytest.mark.parametrize("wraps", ["functools.wraps(djangos)", "lambda function: function"])
def test_whoever_has_patched_the_reading_of_bodies_before_is_called_too(wraps) -> None:
    program = f"""
import asyncio, functools
from django.conf import settings
settings.configure(ROOT_URLCONF=(), ALLOWED_HOSTS=["*"])
from django.core.handlers.asgi import ASGIHandler
djangos = ASGIHandler.read_body

@{wraps}
async def read_body(self, receive):
    print("read")
    return await djangos(self, receive)

ASGIHandler.read_body = read_body
from scoped.asgi import get_asgi_application
from tests.connection import Connection
async def main():
    connection = Connection(get_asgi_application())
    await connection.start()
    print(connection.status)
asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout.split() == ["read", "404"], ended.stderr


async def test_of_a_body_that_comes_slowly_nothing_is_kept_that_has_been_read() -> None:
    class Part(dict):
        """A message whose end can be seen."""

    @view
    async def look(request):
        return HttpResponse(request.body)

    connection = Connection(ScopedASGIHandler(), "/look", body=())
    first = Part(type="http.request", body=b"first", more_body=True)
    end = weakref.ref(first)
    connection.messages.put_nowait(first)
    del first
    task = connection.start()
    for _ in range(5):
        await asyncio.sleep(0)
    assert connection.messages.empty()
    connection.messages.put_nowait({"type": "http.request", "body": b"more", "more_body": True})
    for _ in range(5):
        await asyncio.sleep(0)
    assert end() is None
    connection.messages.put_nowait({"type": "http.request", "body": b"last", "more_body": False})
    await task
    assert connection.body == b"firstmorelast"


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "http.request"}],
        [{"type": "http.request", "body": b""}],
        [{"type": "http.request", "body": b"", "more_body": False}],
        [{"type": "http.request", "more_body": True}, {"type": "http.request", "body": b"x"}],
        [
            {"type": "http.request", "body": b"", "more_body": True},
            {"type": "http.request", "body": b"x", "more_body": True},
            {"type": "http.request", "body": b"", "more_body": False},
        ],
        [{"type": "http.request", "body": b"x", "more_body": False}],
    ],
)
async def test_a_body_is_read_to_its_end_however_a_server_cuts_it(messages) -> None:
    streams: list[Any] = []

    @view
    async def look(request):
        streams.append(request._stream)
        return HttpResponse(request.body)

    connection = Connection(ScopedASGIHandler(), "/look", body=())
    for message in messages:
        connection.messages.put_nowait(message)
    await connection.start()
    assert connection.body == b"".join(message.get("body", b"") for message in messages)
    assert streams[0].closed
