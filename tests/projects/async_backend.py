"""
django-async-backend, whose app changes every model and every request of its process. Prints,
as JSON, the connections that each ending of a request leaves open under Django's handler or
under ours::

    DATABASE_URL=... python -m tests.projects.async_backend django|scoped
"""

import asyncio
import json
import logging
import os
import sys
from urllib.parse import urlsplit

import django
import psycopg
from django.conf import settings

# Not an argument: every account of the machine could read its password.
URL, [HANDLER] = os.environ["DATABASE_URL"], sys.argv[1:]
url = urlsplit(URL)
settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={
        "default": {
            "ENGINE": "django_async_backend.db.backends.postgresql",
            "NAME": url.path.strip("/"),
            "USER": url.username or "",
            "PASSWORD": url.password or "",
            "HOST": url.hostname,
            "PORT": url.port,
            "OPTIONS": {"application_name": "async"},
        }
    },
    INSTALLED_APPS=["scoped", "django_async_backend"],
    LOGGING_CONFIG=None,
    ROOT_URLCONF=__name__,
    SECRET_KEY="backend",
    USE_TZ=True,
)
django.setup()
logging.disable()

from async_views import book  # noqa: E402  (the page's)
from django.core.handlers.asgi import ASGIHandler  # noqa: E402
from django.http import HttpResponse, StreamingHttpResponse  # noqa: E402
from django.urls import path  # noqa: E402
from django_async_backend.db import async_connections  # noqa: E402
from resources import async_transaction  # noqa: E402

from scoped.asgi import ScopedASGIHandler  # noqa: E402
from tests.connection import Connection  # noqa: E402

reached = asyncio.Event()


async def select():
    async with await async_connections["default"].cursor() as cursor:
        await cursor.execute("SELECT 1")
        return (await cursor.fetchone())[0]


# Django's handler has no transaction for a request.
USED_BY = {"django": select, "scoped": async_transaction}
use = USED_BY[HANDLER]


async def answers(request):
    await use()
    return HttpResponse(await select())


async def raises(request):
    await use()
    raise ValueError


async def streams(request):
    await use()

    async def body():
        for _ in range(3):
            yield str(await select())

    return StreamingHttpResponse(body())


async def stream_raises(request):
    await use()

    async def body():
        yield str(await select())
        raise ValueError

    return StreamingHttpResponse(body())


async def hangs(request):
    await use()
    reached.set()
    await asyncio.Event().wait()


async def stream_hangs(request):
    await use()

    async def body():
        yield str(await select())
        reached.set()
        await asyncio.Event().wait()

    return StreamingHttpResponse(body())


async def child(request):
    return HttpResponse(await asyncio.create_task(select()))


async def fails(request):
    await book(request)
    raise ValueError


VIEWS = [answers, raises, streams, stream_raises, hangs, stream_hangs, child]
urlpatterns = [path(view.__name__, view) for view in [*VIEWS, book, fails]]
ENDINGS = [
    ("answers", ""),
    ("raises", ""),
    ("streams", ""),
    ("stream_raises", ""),
    ("hangs", "client gone"),
    ("hangs", "server cancels"),
    ("stream_hangs", "client gone"),
    ("stream_hangs", "server cancels"),
    ("child", ""),
]


async def end(handler, name, how):
    reached.clear()
    request = Connection(handler, f"/{name}", method="POST")
    task = request.start()
    if how:
        await reached.wait()
        if how == "client gone":
            request.disconnect()
        else:
            task.cancel()
    await asyncio.wait([task])
    task.cancelled() or task.exception()
    return request


async def main():
    handler = {"django": ASGIHandler, "scoped": ScopedASGIHandler}[HANDLER]()
    own = psycopg.connect(URL, autocommit=True)

    def left_open():
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'async'"
        return own.execute(query).fetchone()[0]

    def titles():
        return [row[0] for row in own.execute("SELECT title FROM shows_show").fetchall()]

    left = {}
    for name, how in ENDINGS:
        before = left_open()
        await end(handler, name, how)
        for _ in range(200):  # the server takes a moment to see that one was closed
            if left_open() == before:
                break
            await asyncio.sleep(0.01)
        left[f"{name} {how}".strip()] = left_open() - before
    own.execute("CREATE TABLE shows_show (title text)")
    found = {"left": left}
    if HANDLER == "scoped":
        seen = []

        async def look(number, message):
            seen.append(titles())

        failed = await end(handler, "fails", "")
        found["failed"] = [failed.status, titles()]
        request = Connection(handler, "/book", method="POST", before_send=look)
        await request.run()
        found["booked"] = [request.status, seen[0]]
    own.execute("DROP TABLE shows_show")
    own.close()
    print(json.dumps(found))


asyncio.run(main())
