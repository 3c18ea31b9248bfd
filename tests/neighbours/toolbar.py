"""django-debug-toolbar's panels on some requests: what it shows of each, in a page's HTML."""

import asyncio
import json
import logging
import re
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any

from asgiref.sync import sync_to_async
from django.http import HttpRequest, HttpResponse
from django.urls import include, path

from scoped import request_scoped
from tests.connection import Connection
from tests.neighbours import project

HEADERS = [(b"host", b"shop"), (b"accept", b"text/html")]


@request_scoped
async def tenant() -> Any:
    yield "ada"


def count() -> int:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM notes")
        return int(cursor.fetchone()[0])


def sync_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"<html><body>{count()}</body></html>")


async def async_view(request: HttpRequest) -> HttpResponse:
    counted = await sync_to_async(count)()
    return HttpResponse(f"<html><body>{counted}</body></html>")


async def raises(request: HttpRequest) -> HttpResponse:
    raise ValueError("boom")


def urls() -> list[Any]:
    return [
        path("sync", sync_view),
        path("async", async_view),
        path("raises", raises),
        path("__debug__/", include("debug_toolbar.urls")),
    ]


async def main(whose: str) -> None:
    application = project.application(whose)
    globals()["urlpatterns"] = urls()
    found = []
    for where in ("sync", "async", "raises", "sync"):
        connection = Connection(application, f"/{where}", headers=HEADERS)
        await connection.run()
        page = connection.body.decode()
        queries = re.search(r"(\d+) quer(?:y|ies) in", page)
        found.append([where, connection.status, "djDebug" in page, queries and int(queries[1])])
    print(json.dumps(found))


if __name__ == "__main__":
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "db.sqlite3"
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE notes (n)")
        database.close()
        project.configure(
            ROOT_URLCONF=__name__,
            DEBUG=True,
            DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": file}},
            INSTALLED_APPS=["django.contrib.staticfiles", "debug_toolbar", "scoped"],
            MIDDLEWARE=["debug_toolbar.middleware.DebugToolbarMiddleware"],
            STATIC_URL="static/",
            TEMPLATES=[
                {"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}
            ],
            DEBUG_TOOLBAR_CONFIG={"SHOW_TOOLBAR_CALLBACK": lambda request: True},
        )
        asyncio.run(main(sys.argv[1]))
