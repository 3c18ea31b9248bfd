import asyncio
import json

import pytest
from django.http import Http404, HttpResponse
from django.urls import path
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, InvalidRequestError

from scoped import request_scoped

SESSION = ("sqlalchemy.md", "AsyncSession")


@pytest.fixture
def project(recipe, notes):
    return recipe(SESSION)


async def checked_out(project):
    return (await project.resources.engine()).pool.checkedout()


async def test_success_commits(project, serve, notes):
    views = project.views
    async with serve(path("post", views.post), path("save", views.save)) as site:
        assert (await site.post("/post", text="one")).status == 204
        assert await notes() == ["one"]
        assert (await site.post("/save", text="two")).body == b"Saved as 2."
        assert await notes() == ["one", "two"]
        assert await checked_out(project) == 0


@pytest.mark.parametrize("error", [ValueError, Http404])
async def test_failure_rolls_back(project, serve, notes, error):
    async def view(request):
        await project.views.post(request)
        await (await project.resources.session()).flush()
        raise error

    async with serve(path("", view)) as site:
        assert (await site.post("/", text="never")).status == (404 if error is Http404 else 500)
        assert await notes() == []
        assert await checked_out(project) == 0


async def test_the_client_goes_away_and_it_rolls_back(project, serve, notes, backends):
    reached = asyncio.Event()

    async def view(request):
        await project.views.post(request)
        await (await project.resources.session()).flush()
        reached.set()
        await asyncio.Event().wait()

    before = await backends()
    async with serve(path("", view)) as site:
        connection = site.open("/", form={"text": "never"})
        task = connection.start()
        await reached.wait()
        connection.disconnect()
        await task
        assert not connection.sent
        assert await notes() == []
        assert await checked_out(project) == 0
    await backends.reach(before)  # the engine is disposed of


async def test_what_was_committed_in_the_view_stays(project, serve, notes):
    async def view(request):
        await project.views.save(request)
        raise ValueError

    async with serve(path("", view)) as site:
        assert (await site.post("/", text="kept")).status == 500
    assert await notes() == ["kept"]


async def test_a_commit_that_fails_after_the_answer_is_logged(project, serve, notes, caplog):
    async def view(request):
        note = project.models.Note(text=None)
        (await project.resources.session()).add(note)
        return HttpResponse("done")

    async with serve(path("", view)) as site:
        assert (await site.get("/")).body == b"done"
        assert await checked_out(project) == 0
    [record] = caplog.records
    [error] = record.exc_info[1].exceptions
    assert isinstance(error, IntegrityError)


async def test_until_the_response_a_commit_that_fails_is_a_500(project, serve, notes):
    factory = project.resources.session.resource.factory.function
    session = request_scoped(until="response")(factory)
    seen = []

    async def view(request):
        (await session()).add(project.models.Note(text=request.POST.get("text")))
        return HttpResponse("done")

    async def look(number, message):
        seen.append(await notes())

    async with serve(path("", view)) as site:
        assert (await site.post("/", text="kept", before_send=look)).body == b"done"
        assert seen[0] == ["kept"]
        assert (await site.get("/")).status == 500
        assert await checked_out(project) == 0
    assert await notes() == ["kept"]


async def test_children_have_sessions_of_their_own(project, serve, notes):
    async with serve(path("", project.views.summary)) as site:
        assert json.loads((await site.get("/")).body) == {"count": 0, "longest": None}
        assert await checked_out(project) == 0


async def test_one_session_is_not_for_two_tasks(project, serve, notes):
    async def query():
        await (await project.resources.session()).execute(text("SELECT pg_sleep(0.01)"))

    async def view(request):
        first, second = await asyncio.gather(query(), query(), return_exceptions=True)
        assert first is None
        assert isinstance(second, InvalidRequestError)
        assert "concurrent operations are not permitted" in str(second)
        return HttpResponse()

    async with serve(path("", view)) as site:
        assert (await site.get("/")).status == 200
        assert await checked_out(project) == 0
