"""docs/moving-libraries.md: what stands under "before" and under "after" runs."""

import asyncio
import json
import os
import subprocess
import sys

import httpx
import pytest
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

from scoped.testing import Client
from tests import pages
from tests.docs.project import urls

CONNECTIONS = ("moving-libraries.md", "Moving from other libraries")
FASTAPI = ("moving-libraries.md", "From FastAPI's Depends")
DEPENDENCY_INJECTOR = ("moving-libraries.md", "From dependency-injector")
DJANGO_INJECTOR = ("moving-libraries.md", "From django-injector")
FLASK = ("moving-libraries.md", "From Flask's g")

ROOT = pages.DOCS.parent


@pytest.fixture
def made(project, monkeypatch):
    """The connections that are made."""
    connections, opened = project(CONNECTIONS).connections, []

    class Connection(connections.Connection):
        def __init__(self):
            opened.append(self)

    monkeypatch.setattr(connections, "Connection", Connection)
    return opened


def closed(made, number=1):
    assert len(made) == number
    return not any(one.is_open for one in made)


# FastAPI


async def ask(application, where="/"):
    transport = httpx.ASGITransport(application, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        return await client.get(where)


async def test_fastapi_before(project, made):
    before = project(FASTAPI).before
    assert (await ask(before.app)).json() == "a row"
    assert closed(made)


async def test_fastapi_after(project, made, serve):
    after = project(FASTAPI).after

    async def twice(request):
        assert (await after.books()).connection is await after.db()
        return await after.index(request)

    async with serve(path("", twice)) as site:
        assert (await site.get("/")).body == b"a row"
    assert closed(made)


async def test_fastapis_function_scope_ends_before_the_response(project, made):
    from fastapi import Depends, FastAPI
    from fastapi.responses import StreamingResponse

    before, app, seen = project(FASTAPI).before, FastAPI(), []

    def stream(connection):
        async def body():
            seen.append(connection.is_open)
            yield "1"

        return StreamingResponse(body())

    @app.get("/request")
    async def until_the_last_byte(connection=Depends(before.db)):  # noqa: B008
        return stream(connection)

    @app.get("/function")
    async def until_the_response(connection=Depends(before.db, scope="function")):  # noqa: B008
        return stream(connection)

    await ask(app, "/request")
    await ask(app, "/function")
    assert seen == [True, False]


# dependency-injector


@pytest.fixture
def injector(project, made):
    modules = project(DEPENDENCY_INJECTOR)
    yield modules
    modules.before.container.unwire()


async def test_dependency_injector_before(injector, made, serve):
    async with serve(path("", injector.before.index)) as site:
        assert (await site.get("/")).body == b"a row"
    assert closed(made)


async def both_at_once(serve, view, go_on):
    async with serve(path("", view)) as site:
        first = asyncio.create_task(site.get("/?first"))
        second = asyncio.create_task(site.get("/"))
        await second
        go_on.set()
        return [(await first).status, second.result().status]


async def test_dependency_injector_shares_and_closes_for_all(injector, made, serve, caplog):
    from dependency_injector.wiring import Closing, Provide, inject

    go_on, container = asyncio.Event(), injector.before.container

    @inject
    async def view(request, connection=Closing[Provide[injector.before.Container.connection]]):
        if "first" in request.GET:
            await go_on.wait()
        return HttpResponse(connection.query())

    wired = sys.modules[__name__]
    wired.view = view
    try:
        container.wire(modules=[wired])
        assert await both_at_once(serve, wired.view, go_on) == [500, 200]
    finally:
        container.unwire()
        del wired.view
    assert closed(made)
    assert "the connection is closed" in caplog.text


async def test_dependency_injector_after(injector, made, serve):
    go_on, connection = asyncio.Event(), injector.after.connection

    async def view(request):
        mine = await connection()
        if "first" in request.GET:
            await go_on.wait()
        return HttpResponse(mine.query())

    assert await both_at_once(serve, view, go_on) == [200, 200]
    assert closed(made, 2)
    async with serve(path("", injector.after.index)) as site:
        assert (await site.get("/")).body == b"a row"
    assert closed(made, 3)


# django-injector, in a process of its own, as it changes the views of all of it


def test_django_injector_before(tmp_path):
    for section in (CONNECTIONS, DJANGO_INJECTOR):
        for name, text in pages.files(pages.DOCS / section[0], section[1]).items():
            (tmp_path / name).write_text(text)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.projects.injector"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    # One connection for two requests, of one thread, and open still.
    found = json.loads(ran.stdout)
    assert found["answers"] == ["a row"] * 2
    assert found["open"] == [True]
    assert "ASGI containers are not supported" in found["refused"]


@pytest.fixture
def after(project, made, tmp_path):
    # Without "before", which needs its library's application.
    text = pages.files(pages.DOCS / DJANGO_INJECTOR[0], DJANGO_INJECTOR[1])["after.py"]
    (tmp_path / "after.py").write_text(text)
    sys.modules.pop("after", None)
    import after

    yield after
    del sys.modules["after"]


async def test_django_injector_after(after, made, serve):
    async with serve(path("", after.index)) as site:
        assert (await site.get("/")).body == b"a row"
    assert closed(made)


def test_django_injector_after_in_sync_code(after, made):
    with urls(path("", after.index)):
        assert Client().get("/").content == b"a row"
    assert closed(made)


# Flask


def test_flask_before(project, made):
    app = project(FLASK).before.app
    assert app.test_client().get("/").text == "a row"
    assert closed(made)


def test_flask_needs_more_for_a_stream(project, made):
    from flask import stream_with_context

    before = project(FLASK).before

    def rows():
        yield before.db().query()

    before.app.add_url_rule("/bare", "bare", rows)
    before.app.add_url_rule("/with", "with", lambda: stream_with_context(rows()))
    client = before.app.test_client()
    with pytest.raises(RuntimeError, match="outside of application context"):
        client.get("/bare")
    assert client.get("/with").text == "a row"


async def test_flask_after(after, made, serve):
    async def view(request):
        async def body():
            yield after.connection().query()

        return StreamingHttpResponse(body())

    async with serve(path("", view)) as site:
        assert (await site.get("/")).body == b"a row"
    assert closed(made)
