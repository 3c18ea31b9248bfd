"""docs/why.md: its table is what happens, on this Django."""

import sys
from types import ModuleType

import pytest
from django.http import HttpResponse
from django.urls import path

from scoped import NoScopeError
from tests import pages, why
from tests.connection import Connection
from tests.docs.project import its_leaks_ignored, urls

RIVAL = ("why.md", "The rival")
AMBIENT = ("why.md", "Ambient state")


@pytest.fixture
def rival(project):
    return project(RIVAL).rival


def test_the_table_has_every_row():
    assert list(why.table()) == list(why.ROWS)


@pytest.mark.parametrize("how", why.ROWS)
async def test_a_row_under_the_rival(rival, how):
    found = await why.verdict(how, rival, is_ours=False)
    assert why.table()[how][why.COLUMN] == found, "run `python -m tests.why`"


@pytest.mark.parametrize("how", why.ROWS)
async def test_a_row_under_ours(rival, how):
    assert await why.verdict(how, rival, is_ours=True) == why.RIGHT
    assert why.table()[how][3] == why.RIGHT


def test_the_rival_is_as_short_as_it_is_said_to_be():
    lines = pages.files(why.PAGE, RIVAL[1])["rival.py"].splitlines()[1:]
    assert len([line for line in lines if line]) <= 15


async def test_its_application(project):
    modules = project(RIVAL)

    async def view(request):
        return HttpResponse(str(list(modules.rival.values.get())))

    with its_leaks_ignored(), urls(path("", view)):
        connection = Connection(modules.asgi.application)
        await connection.run()
    assert connection.body == b"['stack']"


RESOURCES = """\
from scoped import request_scoped


class Connection:
    async def execute(self, query, *values):
        log.append(values)


log = []


@request_scoped
async def db():
    return Connection()
"""


async def test_a_connection_that_is_asked_for_and_one_that_is_handed_on(
    project, serve, monkeypatch
):
    resources = ModuleType("resources")
    exec(RESOURCES, vars(resources))  # noqa: S102 (the page's)
    monkeypatch.setitem(sys.modules, "resources", resources)
    services, log = project(AMBIENT).services, resources.log

    async def hidden(request):
        await services.rename("1", "Ada")
        return HttpResponse()

    async def view(request):
        return await services.view(request) or HttpResponse()

    async with serve(path("", view), path("hidden", hidden)) as site:
        assert (await site.post("/", user="2", name="Eve")).status == 200
        assert (await site.get("/?user=2&name=Eve")).status == 405
        assert (await site.get("/hidden")).status == 200
    assert log == [("2", "Eve"), ("1", "Ada")]
    with pytest.raises(NoScopeError):
        await services.rename("1", "Ada")
