import asyncio
import io
import json
import logging
import logging.config
import re

import pytest
import structlog
from asgiref.sync import sync_to_async
from django.core.signals import request_finished, request_started
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path
from structlog.contextvars import bind_contextvars

from scoped import lifespan_scoped, request_scoped
from scoped.asgi import ScopedASGIHandler

STRUCTLOG = ("logging.md", "structlog")
LOGGING = ("logging.md", "logging")


@pytest.fixture
def project(recipe):
    project = recipe(STRUCTLOG)
    yield project
    assert request_started.disconnect(project.logs.start, sender=ScopedASGIHandler)
    assert request_finished.disconnect(project.logs.finish, sender=ScopedASGIHandler)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def lines(capsys):
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]


async def test_both_lines_have_what_the_view_bound(project, serve, lines):
    async with serve(path("export", project.views.export)) as site:
        for user in ["ada", "grace"]:
            assert (await site.get(f"/export?user={user}")).body == b"0\n1\n2\n"
            bound = {"path": "/export", "user": user}
            assert lines() == [
                {"event": "finished", **bound},
                {"event": "counted", "rows": 3, **bound},
            ]
    documented = json_of_the_page()
    assert documented == [
        {"event": "finished", "path": "/export", "user": "ada"},
        {"event": "counted", "rows": 3, "path": "/export", "user": "ada"},
    ]


def json_of_the_page():
    from tests.recipes import pages

    [text] = [
        text
        for language, text in pages.BLOCK.findall(pages.sections("logging.md")["structlog"])
        if language == "json"
    ]
    return [json.loads(line) for line in text.splitlines()]


async def test_they_come_however_the_request_ends(project, serve, lines):
    reached = asyncio.Event()

    async def raises(request):
        await project.views.export(request)
        raise ValueError

    async def stream_raises(request):
        await project.views.export(request)

        async def body():
            yield "one"
            raise ValueError

        return StreamingHttpResponse(body())

    async def hangs(request):
        await project.views.export(request)
        reached.set()
        await asyncio.Event().wait()

    async with serve(
        path("raises", raises), path("stream", stream_raises), path("hangs", hangs)
    ) as site:
        assert (await site.get("/raises?user=ada")).status == 500
        assert [(line["event"], line["user"]) for line in lines()] == [
            ("finished", "ada"),
            ("counted", "ada"),
        ]
        with pytest.raises(ValueError):
            await site.open("/stream?user=ada").run()
        assert [line["user"] for line in lines()] == ["ada", "ada"]
        for end in ["client", "server"]:
            reached.clear()
            connection = site.open("/hangs?user=ada")
            task = connection.start()
            await reached.wait()
            if end == "client":
                connection.disconnect()
                await task
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert [line["user"] for line in lines()] == ["ada", "ada"]


async def test_what_a_sync_view_bound(project, serve, lines):
    def view(request):
        bind_contextvars(user="ada")
        return HttpResponse()

    async with serve(path("", view)) as site:
        await site.get("/")
    assert lines() == [{"event": "finished", "path": "/", "user": "ada"}]


async def test_what_a_child_bound_only_the_child_sees(project, serve, lines):
    async def child():
        bind_contextvars(child=True)
        await project.resources.counts()
        bind_contextvars(later=True)

    async def view(request):
        await asyncio.gather(child())
        bind_contextvars(user="ada")
        return HttpResponse()

    async with serve(path("", view)) as site:
        await site.get("/")
    assert lines() == [
        {"event": "finished", "path": "/", "user": "ada"},
        {"event": "counted", "path": "/", "child": True},
    ]


async def test_what_was_bound_before_the_request_is_cleared(project, serve, lines):
    async def view(request):
        return HttpResponse()

    bind_contextvars(user="of the request before")
    async with serve(path("", view)) as site:
        await site.get("/")
    assert lines() == [{"event": "finished", "path": "/"}]


async def test_a_lifespan_resource_logs_nothing_of_a_request(project, serve, lines):
    @lifespan_scoped
    async def pool():
        structlog.get_logger().info("opened")
        yield
        structlog.get_logger().info("closed")

    async def view(request):
        bind_contextvars(user="ada")
        await pool()
        return HttpResponse()

    async with serve(path("", view)) as site:
        await site.get("/")
    assert [line for line in lines() if line["event"] != "finished"] == [
        {"event": "opened"},
        {"event": "closed"},
    ]


# logging


@pytest.fixture
def logs(recipe):
    project = recipe(LOGGING)
    yield project
    assert request_started.disconnect(project.logs.start, sender=ScopedASGIHandler)


@request_scoped
async def db():
    logging.getLogger("db").info("set up")
    try:
        yield
    finally:
        logging.getLogger("db").info("torn down")


@lifespan_scoped
async def pool():
    logging.getLogger("pool").info("set up")
    yield


@pytest.fixture
def written(logs):
    """The lines that the page's handler writes."""
    before, level = logging.root.handlers[:], logging.root.level
    logging.config.dictConfig(logs.settings.LOGGING)
    [handler] = logging.root.handlers
    handler.setStream(io.StringIO())
    yield lambda: handler.stream.getvalue().splitlines()
    logging.root.handlers[:] = before
    logging.root.setLevel(level)
    handler.close()


@pytest.mark.parametrize("end", ["well", "fails", "client gone"])
async def test_every_line_of_a_request_has_its_id(written, serve, end):
    reached = asyncio.Event()

    async def view(request):
        logging.getLogger("view").info("begins")
        await pool()
        await asyncio.create_task(db())
        await sync_to_async(logging.getLogger("thread").info)("in a thread")

        async def body():
            yield "1"
            logging.getLogger("body").info("streams")
            reached.set()
            if end == "fails":
                raise ValueError
            if end == "client gone":
                await asyncio.Event().wait()

        return StreamingHttpResponse(body())

    async with serve(path("", view)) as site:
        connection = site.open("/", headers=[(b"x-request-id", b"given-7")])
        task = connection.start()
        await reached.wait()
        if end == "client gone":
            connection.disconnect()
        await asyncio.wait([task])
        task.exception()
    lines = written()
    assert [line for line in lines if line.endswith(": set up")] == [
        "- INFO pool: set up",
        "given-7 INFO db: set up",
    ]
    for line in ["view: begins", "thread: in a thread", "body: streams", "db: torn down"]:
        assert f"given-7 INFO {line}" in lines


@pytest.mark.parametrize("given", [b"", b"a\nb", b"x" * 65, "ä".encode("latin-1")])
async def test_an_id_that_could_forge_a_line_is_replaced(written, serve, given):
    async def view(request):
        logging.getLogger("view").info("begins")
        return HttpResponse()

    async with serve(path("", view)) as site:
        await site.get("/", headers=[(b"x-request-id", given)] if given else [])
    [line] = [line for line in written() if "begins" in line]
    assert re.fullmatch("[0-9a-f]{32} INFO view: begins", line)
