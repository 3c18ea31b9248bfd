"""The Django project that the programs serve, under stock Django's handler or ours."""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from typing import Any

import django
from asgiref.sync import sync_to_async
from django.conf import settings
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

from scoped import request_scoped
from tests.connection import Connection

# What is done in a view, a stream, a teardown, is told to the neighbour under test.
tell: Callable[[str, str], Any] = lambda what, user: None  # noqa: E731
reached = asyncio.Event()


@request_scoped
async def db() -> AsyncIterator[str]:
    yield "db"
    tell("teardown", "")


@request_scoped
async def breaks() -> AsyncIterator[str]:
    yield "breaks"
    raise ValueError("boom")


async def view(request: HttpRequest) -> HttpResponse:
    tell("view", request.GET["user"])
    return HttpResponse()


def sync_view(request: HttpRequest) -> HttpResponse:
    tell("view", request.GET["user"])
    return HttpResponse()


async def raises(request: HttpRequest) -> HttpResponse:
    tell("view", request.GET["user"])
    raise ValueError("boom")


async def streams(request: HttpRequest) -> StreamingHttpResponse:
    tell("view", request.GET["user"])

    async def body() -> AsyncIterator[str]:
        yield "one"
        tell("stream", "")
        yield "two"

    return StreamingHttpResponse(body())


async def holds(request: HttpRequest) -> HttpResponse:
    await db()
    await sync_to_async(tell)("in a thread", request.GET["user"])
    return HttpResponse()


async def breaks_down(request: HttpRequest) -> HttpResponse:
    tell("view", request.GET["user"])
    return HttpResponse(await breaks())


async def hangs(request: HttpRequest) -> HttpResponse:
    tell("view", request.GET["user"])
    reached.set()
    await asyncio.Event().wait()
    return HttpResponse()


urlpatterns = [
    path("view", view),
    path("sync", sync_view),
    path("raises", raises),
    path("streams", streams),
    path("holds", holds),
    path("breaks", breaks_down),
    path("hangs", hangs),
]


def configure(**extra: Any) -> None:
    settings.configure(
        **{
            "SECRET_KEY": "neighbours",
            "ALLOWED_HOSTS": ["*"],
            "ROOT_URLCONF": "tests.neighbours.project",
            "INSTALLED_APPS": ["scoped"],
            "LOGGING_CONFIG": None,
            **extra,
        }
    )


def application(whose: str) -> Any:
    """That which the project's asgi.py makes."""
    if whose == "scoped":
        from scoped.asgi import get_asgi_application
    else:
        from django.core.asgi import get_asgi_application
    django.setup()
    return get_asgi_application()


async def get(application: Any, where: str, user: str) -> None:
    """As a server makes it, in a Context of its own; of `hangs` the client goes away."""
    reached.clear()
    query = f"user={user}".encode()
    connection = Connection(
        application, f"/{where}", query_string=query, headers=[(b"host", b"shop")]
    )
    task = contextvars.Context().run(connection.start)
    if where == "hangs":
        await reached.wait()
        connection.disconnect()
    await task
