import asyncio
import json
from contextlib import AsyncExitStack

import asyncpg
import psycopg
import pytest
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.urls import path

from scoped import request_scoped

ASYNCPG = ("postgresql.md", "asyncpg")
PSYCOPG = ("postgresql.md", "psycopg")
SLEEPS = "wait_event = 'PgSleep'"


@pytest.fixture
def project(recipe, request):
    return recipe(request.param)


async def test_what_the_view_wrote_is_committed(recipe, serve, notes):
    project = recipe(ASYNCPG)
    views = project.views
    async with serve(
        path("", views.index), path("post", views.post), path("save", views.save)
    ) as site:
        assert (await site.post("/post", text="one")).status == 204
        assert (await site.post("/save", text="two")).body == b"Saved."
        assert await notes() == ["one", "two"]
        assert (await site.get("/")).body == b"2"
        await returned(await project.resources.pool())


def failing_views(project):
    async def raises(request):
        await project.views.post(request)
        raise ValueError

    async def not_found(request):
        await project.views.post(request)
        raise Http404

    async def stream(request):
        await project.views.post(request)

        async def body():
            yield "one"
            raise ValueError

        return StreamingHttpResponse(body())

    return [path("raises", raises), path("not-found", not_found), path("stream", stream)]


@pytest.mark.parametrize("section", [ASYNCPG, PSYCOPG], ids=lambda section: section[1])
async def test_what_a_failed_request_wrote_is_rolled_back(recipe, serve, notes, section):
    project = recipe(section)
    async with serve(*failing_views(project)) as site:
        assert (await site.post("/raises", text="never")).status == 500
        assert (await site.post("/not-found", text="never")).status == 404
        broken = site.open("/stream", form={"text": "never"})
        with pytest.raises(ValueError):
            await broken.run()
        assert not broken.complete
        assert await notes() == []
        await returned(await project.resources.pool())


async def returned(pool, *, soon=False):
    """Every connection is back; psycopg's pool takes them back in a task of its own."""

    def is_back():
        if isinstance(pool, asyncpg.Pool):
            return pool.get_idle_size() == pool.get_size() > 0
        stats = pool.get_stats()
        return stats["pool_available"] == stats["pool_size"] > 0

    async with asyncio.timeout(20):
        while (soon or not isinstance(pool, asyncpg.Pool)) and not is_back():
            await asyncio.sleep(0.01)
    assert is_back()


@pytest.mark.parametrize("project", [ASYNCPG, PSYCOPG], ids=["asyncpg", "psycopg"], indirect=True)
@pytest.mark.parametrize("in_stream", [False, True], ids=["view", "stream"])
async def test_when_the_client_goes_away_it_is_rolled_back(
    project, serve, notes, backends, in_stream
):
    reached = asyncio.Event()

    async def view(request):
        await project.views.post(request)

        async def body():
            yield "one"
            reached.set()
            await asyncio.Event().wait()

        if not in_stream:
            reached.set()
            await asyncio.Event().wait()
        return StreamingHttpResponse(body())

    before = await backends()
    async with serve(path("", view)) as site:
        connection = site.open("/", form={"text": "never"})
        task = connection.start()
        await reached.wait()
        connection.disconnect()
        await task
        assert not connection.complete
        assert await notes() == []
        await returned(await project.resources.pool())
    await backends.reach(before)


async def test_a_view_that_returns_an_error_commits(recipe, serve, notes):
    project = recipe(ASYNCPG)

    async def view(request):
        await project.views.post(request)
        return HttpResponse(status=400)

    async with serve(path("", view)) as site:
        assert (await site.post("/", text="kept")).status == 400
    assert await notes() == ["kept"]


async def test_a_commit_that_fails_after_the_answer_is_logged(recipe, serve, notes, caplog):
    project = recipe(ASYNCPG)

    async def view(request):
        connection = await project.resources.transaction()
        await connection.execute(
            "CREATE TEMPORARY TABLE unique_numbers (n int UNIQUE DEFERRABLE INITIALLY DEFERRED);"
            " INSERT INTO unique_numbers VALUES (1), (1)"
        )
        return HttpResponse("done")

    async with serve(path("", view)) as site:
        assert (await site.get("/")).body == b"done"
        await returned(await project.resources.pool())
    [record] = caplog.records
    [error] = record.exc_info[1].exceptions
    assert isinstance(error, asyncpg.UniqueViolationError)


async def test_psycopg_commits_until_the_response_or_it_is_a_500(recipe, serve, notes):
    factory = recipe(PSYCOPG).resources.db.resource.factory.function
    db = request_scoped(until="response")(factory)
    seen = []

    async def view(request):
        connection = await db()
        await connection.execute(
            "CREATE TEMPORARY TABLE unique_numbers (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
            " ON COMMIT DROP"
        )
        await connection.execute("INSERT INTO notes (text) VALUES ('kept')")
        for _ in range(int(request.GET["times"])):
            await connection.execute("INSERT INTO unique_numbers VALUES (1)")
        return HttpResponse("done")

    async def look(number, message):
        seen.append(await notes())

    async with serve(path("", view)) as site:
        assert (await site.get("/?times=1", before_send=look)).body == b"done"
        assert seen[0] == ["kept"]
        assert (await site.get("/?times=2")).status == 500
    assert await notes() == ["kept"]


# Child tasks


@pytest.mark.parametrize(
    "sections", [("postgresql.md", "asyncpg", "In child tasks"), PSYCOPG], ids=lambda s: s[-1]
)
async def test_children_query_at_once(recipe, serve, notes, sections):
    project = recipe(sections)
    pool = project.resources.pool
    async with serve(path("", project.views.summary)) as site:
        for _ in range(3):
            assert json.loads((await site.get("/")).body) == {"count": 0, "longest": None}
            await returned(await pool())


async def test_one_asyncpg_connection_does_one_thing_at_a_time(recipe, serve, notes, caplog):
    project = recipe(ASYNCPG)

    async def query():
        return await (await project.resources.db()).fetchval(
            "SELECT pg_backend_pid() FROM pg_sleep(0.05)"
        )

    async def waits_for_all(request):
        first, second = await asyncio.gather(query(), query(), return_exceptions=True)
        assert isinstance(second, asyncpg.InterfaceError)
        assert "another operation is in progress" in str(second)
        return HttpResponse(first)

    async def leaves_one_behind(request):
        await asyncio.gather(query(), query())

    async with serve(path("waits", waits_for_all), path("leaves", leaves_one_behind)) as site:
        pids = [(await site.get("/waits")).body for _ in range(2)]
        assert pids[0] == pids[1]
        pool = await project.resources.pool()
        await returned(pool)
        assert not caplog.records
        assert (await site.get("/leaves")).status == 500
        # One more InterfaceError: the connection cannot be reset. So the pool gives it up.
        assert [record.name for record in caplog.records] == ["django.request", "scoped"]
        after = await site.get("/waits")
        assert after.status == 200
        assert after.body not in pids
        await returned(pool, soon=True)


async def test_children_share_one_psycopg_connection_in_turn(recipe, serve, notes):
    project = recipe(PSYCOPG)
    connections = []

    async def query():
        connection = await project.resources.db()
        connections.append(connection)
        cursor = await connection.execute("SELECT pg_backend_pid() FROM pg_sleep(0.01)")
        return await cursor.fetchone()

    async def view(request):
        pids = await asyncio.gather(*[query() for _ in range(5)])
        assert len(set(pids)) == len(set(connections)) == 1
        return HttpResponse()

    async with serve(path("", view)) as site:
        assert (await site.get("/")).status == 200


@pytest.mark.parametrize("section", [ASYNCPG, PSYCOPG], ids=lambda section: section[1])
async def test_gather_leaves_nothing_behind(recipe, serve, notes, backends, section):
    """First use in children: all goes well; one of them fails; the client goes away."""
    project = recipe(section)
    pool, db = project.resources.pool, project.resources.db
    strays: list[asyncio.Task[None]] = []

    async def shares():
        await db()

    async def acquires(seconds=0.01):
        # asyncpg's word and psycopg's
        acquire = getattr(await pool(), "acquire" if section == ASYNCPG else "connection")
        async with acquire(timeout=10) as connection:
            await connection.execute(f"SELECT pg_sleep({seconds})")

    async def fails(sleeping=None):
        await db()
        if sleeping is not None:
            await backends.reach(sleeping, SLEEPS)
        raise ValueError("one child")

    async def well(request):
        await asyncio.gather(*[shares() for _ in range(5)], *[acquires() for _ in range(5)])
        return HttpResponse()

    async def one_fails(request):
        # gather() lets the siblings run on, beyond the request; TaskGroup cancels them.
        strays.extend(asyncio.create_task(acquires()) for _ in range(3))
        with pytest.raises(ValueError):
            await asyncio.gather(fails(), *strays)
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(acquires(60))
            group.create_task(fails(sleeping=3))

    async def gathers(request):
        await asyncio.gather(shares(), *[acquires(60) for _ in range(5)])

    async def groups(request):
        async with asyncio.TaskGroup() as group:
            for child in [shares(), *[acquires(60) for _ in range(5)]]:
                group.create_task(child)

    before = await backends()
    async with serve(
        *[path(view.__name__, view) for view in [well, one_fails, gathers, groups]]
    ) as site:
        assert (await site.get("/well")).status == 200
        await returned(await pool())
        assert (await site.get("/one_fails")).status == 500
        await asyncio.gather(*strays)
        await returned(await pool())
        for view in [gathers, groups]:
            connection = site.open(f"/{view.__name__}")
            task = connection.start()
            await backends.reach(5, SLEEPS)
            connection.disconnect()
            await task
            # A gather() that is cancelled does not wait for all of its children to end.
            await returned(await pool(), soon=view is gathers)
    await backends.reach(before)


async def test_a_pool_that_is_exhausted_says_so_in_time(recipe, serve, notes):
    project = recipe(ASYNCPG)

    async def view(request):
        pool = await project.resources.pool()
        await project.resources.db()
        async with AsyncExitStack() as others:
            for _ in range(pool.get_max_size() - 1):
                await others.enter_async_context(pool.acquire())
            with pytest.raises(TimeoutError):
                await others.enter_async_context(pool.acquire(timeout=0.1))
        return HttpResponse()

    async with serve(path("", view)) as site:
        assert (await site.get("/")).status == 200
        await returned(await project.resources.pool())


# psycopg


async def test_psycopg_commits(recipe, serve, notes):
    project = recipe(PSYCOPG)
    async with serve(path("", project.views.post)) as site:
        assert (await site.post("/", text="one")).status == 204
        assert await notes() == ["one"]
        pool = await project.resources.pool()
        await returned(pool)
    with pytest.raises(psycopg.OperationalError, match="closed"):
        await pool.getconn()
