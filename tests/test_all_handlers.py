"""
Promises 11, 12 and 18: a test client serves exactly as the handler that it stands for. The
table of ``docs/sync.md``, row by row, under all ways of serving in which a scope is opened.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import django
import pytest
from asgiref.sync import iscoroutinefunction, sync_to_async
from django import test
from django.core.exceptions import BadRequest, PermissionDenied
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import override_settings
from django.urls import path
from django.utils.decorators import sync_and_async_middleware

from scoped import NoScopeError, current_scope, request_scoped, testing
from scoped.asgi import ScopedASGIHandler
from scoped.wsgi import ScopedWSGIHandler
from tests.connection import Connection
from tests.wsgi_server import call

log: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    log.clear()
    with override_settings(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        MIDDLEWARE=[f"{__name__}.refuses", f"{__name__}.answers"],
    ):
        yield


class told:  # noqa: N801 (it is used as a function)
    """Logs what a factory sees at its `yield`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        log.append(f"{self.name} saw {kind.__name__ if kind else 'success'}")


@request_scoped
def plain() -> Iterator[str]:
    with told("plain"):
        yield "plain"


@request_scoped(until="response")
def boundary() -> Iterator[str]:
    with told("boundary"):
        yield "boundary"


ERRORS = {"404": Http404, "403": PermissionDenied, "400": BadRequest, "500": ValueError}


@sync_and_async_middleware
def refuses(get_response: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """After the view."""
    if iscoroutinefunction(get_response):

        async def middleware(request: HttpRequest) -> Any:
            response = await get_response(request)
            if "refuse" in request.GET:
                raise ERRORS[request.GET["refuse"]]
            return response

    else:

        def middleware(request: HttpRequest) -> Any:
            response = get_response(request)
            if "refuse" in request.GET:
                raise ERRORS[request.GET["refuse"]]
            return response

    return middleware


class answers:  # noqa: N801 (a middleware)
    """What the view raises."""

    sync_capable, async_capable = True, False

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        return HttpResponse("answered") if "answer" in request.GET else None


def view(request: HttpRequest) -> HttpResponse:
    plain()
    if "boundary" in request.GET:
        try:
            boundary()
        except NoScopeError:
            log.append("NoScopeError")
    if request.GET.get("request"):
        assert current_scope().request is request
        log.append("request")
    if "raise" in request.GET:
        raise ERRORS[request.GET["raise"]]
    return HttpResponse("x")


def stream(request: HttpRequest) -> StreamingHttpResponse:
    plain()
    if "boundary" in request.GET:
        boundary()

    def body() -> Iterator[str]:
        yield plain()
        if "raise" in request.GET:
            raise ERRORS[request.GET["raise"]]
        log.append("last byte")

    return StreamingHttpResponse(body())


urlpatterns = [path("view", view), path("stream", stream)]


# The ways of serving. Each returns the status, or None where the stream has failed.


async def over_asgi(handler: Any, where: str) -> int | None:
    path, _, query = where.partition("?")
    connection = Connection(handler, path, query_string=query.encode())
    try:
        await connection.run()
    except ValueError:
        return None
    return connection.status


def over_wsgi(handler: Any, where: str) -> int | None:
    path, _, query = where.partition("?")
    try:
        return int(call(handler, path, QUERY_STRING=query)[0].split()[0])
    except ValueError:
        return None


def by_client(client: Any, where: str) -> int | None:
    response = client.get(where)
    try:
        b"".join(response)
    except ValueError:
        return None
    finally:
        response.close()
    return int(response.status_code)


async def by_async_client(client: Any, where: str) -> int | None:
    response = await client.get(where)
    try:
        await sync_to_async(b"".join)(response)
    except ValueError:
        return None
    finally:
        response.close()
    return int(response.status_code)


Way = Callable[[str], Awaitable[int | None]]

OURS: dict[str, Way] = {
    "scoped.asgi": lambda where: over_asgi(ScopedASGIHandler(), where),
    "scoped.wsgi": lambda where: sync_to_async(over_wsgi)(ScopedWSGIHandler(), where),
    "scoped.testing.AsyncClient": lambda where: by_async_client(
        testing.AsyncClient(raise_request_exception=False), where
    ),
    "scoped.testing.Client": lambda where: sync_to_async(by_client)(
        testing.Client(raise_request_exception=False), where
    ),
}
DJANGOS: dict[str, Way] = {
    "Django's WSGI handler": lambda where: sync_to_async(over_wsgi)(WSGIHandler(), where),
    "Django's Client": lambda where: sync_to_async(by_client)(
        test.Client(raise_request_exception=False), where
    ),
}
if django.VERSION >= (6, 1):  # before, its scope is lost on the way to the view
    DJANGOS |= {
        "Django's ASGI handler": lambda where: over_asgi(ASGIHandler(), where),
        "Django's AsyncClient": lambda where: by_async_client(
            test.AsyncClient(raise_request_exception=False), where
        ),
    }

# What is asked for; what it is under ours, and under Django's own where that differs.
ROWS: dict[str, tuple[int | None, list[str], list[str] | None]] = {
    # Sync resources, torn down after the last byte; the request.
    "/view?": (200, ["plain saw success"], None),
    "/view?request=1": (200, ["request", "plain saw success"], None),
    "/stream?": (200, ["last byte", "plain saw success"], None),
    # A factory sees a view that raises.
    "/view?raise=500": (500, ["plain saw ValueError"], None),
    # A factory sees Http404, PermissionDenied, BadRequest, and what a middleware answers for.
    "/view?raise=404": (404, ["plain saw Http404"], ["plain saw success"]),
    "/view?raise=403": (403, ["plain saw PermissionDenied"], ["plain saw success"]),
    "/view?raise=400": (400, ["plain saw BadRequest"], ["plain saw success"]),
    "/view?raise=500&answer=1": (200, ["plain saw ValueError"], ["plain saw success"]),
    # The same of middleware.
    "/view?refuse=500": (500, ["plain saw ValueError"], None),
    "/view?refuse=404": (404, ["plain saw Http404"], ["plain saw success"]),
    "/view?refuse=403": (403, ["plain saw PermissionDenied"], ["plain saw success"]),
    "/view?refuse=400": (400, ["plain saw BadRequest"], ["plain saw success"]),
    # And a streaming body that raises.
    "/stream?raise=500": (None, ["plain saw ValueError"], ["plain saw success"]),
    # until="response"
    "/view?boundary=1": (
        200,
        ["boundary saw success", "plain saw success"],
        ["NoScopeError", "plain saw success"],
    ),
    "/view?boundary=1&refuse=403": (
        403,
        ["boundary saw PermissionDenied", "plain saw PermissionDenied"],
        ["NoScopeError", "plain saw success"],
    ),
}


CASES = [
    (way, where)
    for way in (*OURS, *DJANGOS)
    for where, (status, _, _) in ROWS.items()
    # It never ends such a request: docs/guarantees.md says so.
    if not (way == "Django's ASGI handler" and status is None)
]


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators")
@pytest.mark.parametrize(("way", "where"), CASES)
async def test_every_way_of_serving_keeps_what_docs_sync_promises_of_it(
    way: str, where: str
) -> None:
    status, ours, djangos = ROWS[where]
    expected = ours if way in OURS or djangos is None else djangos
    assert await {**OURS, **DJANGOS}[way](where) == status
    async with asyncio.timeout(30):
        while len(log) < len(expected):  # Django's AsyncClient closes in a task of its own
            await asyncio.sleep(0)
    assert log == expected
