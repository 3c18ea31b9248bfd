"""docs/background.md."""

import asyncio
from types import ModuleType

import pytest
from django.http import HttpResponse
from django.urls import path

from scoped import ScopeClosedError, current_scope, request_scoped, spawn
from scoped.testing import AsyncClient, assert_no_leaks
from tests.docs.project import urls

EXAMPLE = ("background.md", "Background tasks")
SYNC = ("background.md", "In sync code")
TESTS = ("background.md", "In tests")
AFTER = ("background.md", "After the response")

log: list[str] = []


class Connection:
    go_on: asyncio.Event | None = None  # a server that takes its time

    async def send(self, text):
        if self.go_on is not None:
            await self.go_on.wait()
        assert current_scope().request is None
        log.append(text)


class Rows:
    async def insert(self, user):
        log.append(f"insert {user}")


@request_scoped(until="response")
async def transaction():
    yield Rows()
    log.append("commit")


@request_scoped
async def db():
    log.append("+db")
    yield Connection()
    log.append("-db")


@pytest.fixture
def modules(project, monkeypatch):
    """With this module's ``db`` as the project's."""
    import sys

    log.clear()
    resources = ModuleType("resources")
    resources.db, resources.transaction = db, transaction
    monkeypatch.setitem(sys.modules, "resources", resources)
    return project(EXAMPLE, SYNC, TESTS, AFTER)


@pytest.mark.parametrize("where", ["views", "sync_views"])
async def test_the_answer_does_not_wait_and_the_shutdown_does(modules, where, monkeypatch):
    monkeypatch.setattr(Connection, "go_on", go_on := asyncio.Event())
    view = getattr(modules, where).register
    with assert_no_leaks(), urls(path("", view)):
        async with AsyncClient() as client:
            assert (await client.post("/", {"user": "ada"})).content == b"Welcome"
            assert "Welcome, ada" not in log
            asyncio.get_running_loop().call_later(0.01, go_on.set)
    assert log == ["+db", "Welcome, ada", "-db"]


async def test_the_test_of_the_page_passes(modules):
    with urls(path("", modules.views.register)):
        await modules.test_views.test_register()
    assert log == ["+db", "Welcome, ada", "-db"]


async def test_a_plain_task_is_told_that_its_scope_has_closed(modules):
    go_on, tasks = asyncio.Event(), []

    async def work():
        await go_on.wait()
        await db()

    async def view(request):
        tasks.append(asyncio.create_task(work()))
        return HttpResponse()

    with urls(path("", view)):
        await AsyncClient().get("/")
    go_on.set()
    with pytest.raises(ScopeClosedError):
        await tasks[0]


def test_without_an_event_loop_it_says_so(modules):
    with pytest.raises(RuntimeError, match="where no event loop runs"):
        spawn(modules.views.send_mail("ada"))


async def test_after_the_response_comes_after_the_commit(modules):
    with urls(path("", modules.orders.order)):
        async with AsyncClient() as client:
            assert (await client.post("/", {"user": "ada"})).content == b"Ordered"
    assert log == ["insert ada", "commit", "+db", "Welcome, ada", "-db"]


async def test_who_awaits_a_shielded_task_does_not_cancel_it(modules):
    tasks, reached = [], asyncio.Event()

    async def wait():
        tasks.append(task := spawn(modules.views.send_mail("ada")))
        reached.set()
        await asyncio.shield(task)

    waiting = asyncio.create_task(wait())
    await reached.wait()
    waiting.cancel()
    await asyncio.wait([waiting])
    await tasks[0]
    assert log == ["+db", "Welcome, ada", "-db"]
