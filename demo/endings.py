"""
A view for each way in which a request can end. Each is served twice: urls.py
hands it ``db``, which is ours from resources.py, or that of stock.py.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from asgiref.sync import async_to_sync
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.http import require_POST

from demo.resources import db, transaction
from scoped import spawn

Db = Callable[[], Awaitable[Any]]

WORK = "SELECT pg_sleep(0.4)"


class DeliberateError(Exception):
    """What fails here fails on purpose."""


@require_POST
async def fine(request: HttpRequest, db: Db) -> HttpResponse:
    await (await db()).execute(WORK)
    return HttpResponse("All is well.")


@require_POST
def sync(request: HttpRequest, db: Db) -> HttpResponse:
    @async_to_sync
    async def work() -> None:
        await (await db()).execute(WORK)

    work()
    return HttpResponse("All is well, in a thread.")


@require_POST
async def raises(request: HttpRequest, db: Db) -> HttpResponse:
    await (await db()).execute(WORK)
    raise DeliberateError("The view raises.")


@require_POST
async def missing(request: HttpRequest, db: Db) -> HttpResponse:
    await (await db()).execute(WORK)
    raise Http404


@require_POST
async def children(request: HttpRequest, db: Db) -> HttpResponse:
    async def child() -> Any:
        return await db()

    connections = await asyncio.gather(*(child() for _ in range(10)))
    await connections[0].execute(WORK)
    return HttpResponse(f"Ten children asked, {len(set(connections))} got set up.")


@require_POST
async def stream(request: HttpRequest, db: Db) -> StreamingHttpResponse:
    connection = await db()

    async def body() -> AsyncIterator[str]:
        for number in range(1, 6):
            await connection.execute("SELECT pg_sleep(0.2)")
            yield f"{number} "

    return StreamingHttpResponse(body())


@require_POST
async def broken_stream(request: HttpRequest, db: Db) -> StreamingHttpResponse:
    connection = await db()

    async def body() -> AsyncIterator[str]:
        for number in range(1, 4):
            await connection.execute("SELECT pg_sleep(0.2)")
            yield f"{number} "
        raise DeliberateError("The stream raises.")

    return StreamingHttpResponse(body())


@require_POST
async def leave(request: HttpRequest, db: Db) -> HttpResponse:
    await (await db()).execute("SELECT pg_sleep(10)")  # the page waits for less
    return HttpResponse("Who reads this has waited long.")


# What stock.py has no counterpart of.


@require_POST
async def commit(request: HttpRequest) -> HttpResponse:
    connection = await transaction()
    await connection.execute(WORK)
    await connection.execute("INSERT INTO likes (message_id) VALUES (0)")  # there is no message 0
    return HttpResponse("Liked.")  # which the client never hears


@require_POST
async def background(request: HttpRequest) -> HttpResponse:
    spawn(count_likes(), name="count likes")
    return HttpResponse("Counting.", status=202)


async def count_likes() -> None:
    await (await db()).fetchval("SELECT count(*) FROM likes, pg_sleep(1.2)")


urlpatterns = [
    path("fine", fine),
    path("sync", sync),
    path("raises", raises),
    path("missing", missing),
    path("children", children),
    path("stream", stream),
    path("broken-stream", broken_stream),
    path("leave", leave),
]


@dataclass(frozen=True)
class Ending:
    """A button of the page."""

    name: str
    label: str
    here: str  # what becomes of it with scoped
    has_counterpart: bool = True


ENDINGS = [
    Ending("fine", "Fine", "200"),
    Ending("sync", "Sync view", "200, in a thread"),
    Ending("children", "Ten children", "200, one set-up"),
    Ending("stream", "Stream", "200, held to its end"),
    Ending("missing", "Not found", "404"),
    Ending("raises", "View raises", "500"),
    Ending("broken-stream", "Stream raises", "breaks off"),
    Ending("leave", "Client leaves", "cancelled"),
    Ending("commit", "COMMIT fails", "500, no row", has_counterpart=False),
    Ending("background", "Background", "202, then works on", has_counterpart=False),
]
