"""docs/orm.md, on PostgreSQL and on SQLite."""

import asyncio
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import unittest
from collections import Counter
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import psycopg
import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core.exceptions import PermissionDenied
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished
from django.db import (
    IntegrityError,
    InternalError,
    OperationalError,
    connection,
    connections,
    router,
    transaction,
)
from django.db.backends.signals import connection_created
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.test import TestCase
from django.test.utils import isolate_apps
from django.urls import path
from django.utils.decorators import async_only_middleware

from scoped import lifespan_scoped, request_scope, request_scoped
from scoped.serving.threads import end_idle
from scoped.testing import AsyncClient
from tests import pages
from tests.connection import Connection
from tests.docs.project import its_leaks_ignored, urls
from tests.slowness import within

ATOMIC = ("orm.md", "A transaction for each request")
STREAM = ("orm.md", "A connection given back before a long stream")
READ_ONLY = ("orm.md", "Read-only")
REPLICA = ("orm.md", "A replica, until the request writes")
PERSISTENT = ("orm.md", "Persistent connections and pools")
ASYNC_BACKEND = ("orm.md", "django-async-backend")

ROOT = pages.DOCS.parent
BOTH = ["postgresql", "sqlite"]


class Database:
    """A database as Django's setting names it, and as a connection of our own sees it."""

    def __init__(self, vendor, where):
        self.vendor = vendor
        if vendor == "sqlite":
            self.settings = {"ENGINE": "django.db.backends.sqlite3", "NAME": where}
            self.own = sqlite3.connect(where, isolation_level=None, check_same_thread=False)
        else:
            url = urlsplit(where)
            self.settings = {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": url.path.strip("/"),
                "USER": url.username or "",
                "PASSWORD": url.password or "",
                "HOST": url.hostname,
                "PORT": url.port,
                "OPTIONS": {"application_name": "orm"},
            }
            self.own = psycopg.connect(where, autocommit=True)

    def select(self, query):
        return [row[0] for row in self.own.execute(query).fetchall()]

    def booked(self):
        return self.select("SELECT show_id FROM shows_booking ORDER BY id")

    def connected(self):
        return self.select("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'orm'")[
            0
        ]

    async def reach(self, number):
        """The server takes a moment to see that a connection was closed."""
        async with asyncio.timeout(within(20)):
            while self.connected() != number:
                await asyncio.sleep(0.01)


@pytest.fixture
def opened():
    """The connections that Django makes; those which are to outlive a request are closed here."""
    made = []

    def created(connection, **kwargs):
        made.append((connection, connection.connection))

    connection_created.connect(created)
    yield made
    connection_created.disconnect(created)
    for _, one in made:
        one.close()


@pytest.fixture(params=BOTH)
def database(request, tmp_path, opened):
    """
    Django's default database for this test. Connections belong to threads: those which
    other tests have left idle are ended, before it as after it.
    """
    vendor = request.param
    where = request.getfixturevalue("postgres_url") if vendor == "postgresql" else tmp_path / "db"
    database = Database(vendor, where)
    before = connections.settings
    use(default=database.settings)
    yield database
    end_idle()
    connections.settings = before
    database.own.close()


def use(**databases):
    end_idle()
    for alias in list(connections.settings):
        if hasattr(connections._connections, alias):
            connections[alias].close()
            delattr(connections._connections, alias)
    connections.settings = connections.configure_settings(databases)


@pytest.fixture
async def outside(database):
    """Sets databases for the one thread that runs sync code outside a request, and ends them."""
    outside = sync_to_async(use)
    await outside(default=database.settings)
    yield outside
    await outside(default=database.settings)


@pytest.fixture
def shows(database, project):
    """The page's project, and its tables with one show in them, number 1."""
    with isolate_apps("scoped"):
        modules = project(ATOMIC)
        models = [modules.models.Show, modules.models.Booking]
        with connection.schema_editor() as editor:
            for model in models:
                editor.create_model(model)
        modules.models.Show.objects.create(title="Hamlet")
        connection.close()
        yield modules
        use(default=database.settings)
        with connection.schema_editor() as editor:
            for model in reversed(models):
                editor.delete_model(model)
        connection.close()
        delattr(connections._connections, "default")


# A transaction for each request


@pytest.mark.parametrize("view", ["book", "book_in_sync_code"])
async def test_it_commits_before_the_first_byte(shows, serve, database, view):
    seen = []

    async def look(number, message):
        seen.append(database.booked())

    async with serve(path("", getattr(shows.views, view))) as site:
        answer = await site.post("/", show="1", before_send=look)
    assert (answer.status, answer.body) == (200, b"Booked.")
    assert seen[0] == [1]


@pytest.mark.parametrize("view", ["book", "book_in_sync_code"])
async def test_a_commit_that_fails_is_a_500_and_never_a_false_200(shows, serve, database, view):
    returned = []

    async def book(request):
        returned.append(await shows.views.book(request))
        return returned[-1]

    def book_in_sync_code(request):
        returned.append(shows.views.book_in_sync_code(request))
        return returned[-1]

    async with serve(path("", locals()[view])) as site:
        answer = await site.post("/", show="2")
    assert returned[0].content == b"Booked."
    assert answer.status == 500
    assert b"Booked." not in answer.body
    assert database.booked() == []


@pytest.mark.parametrize(
    ("error", "status"), [(Http404, 404), (PermissionDenied, 403), (ValueError, 500)]
)
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_view_that_raises_rolls_back(shows, serve, database, kind, error, status):
    async def async_view(request):
        await shows.views.book(request)
        raise error

    def sync_view(request):
        shows.views.book_in_sync_code(request)
        raise error

    async with serve(path("", async_view if kind == "async" else sync_view)) as site:
        assert (await site.post("/", show="1")).status == status
    assert database.booked() == []


async def test_a_database_error_that_is_swallowed_rolls_back_silently(shows, serve, database):
    async def view(request):
        await shows.views.book(request)
        with suppress(IntegrityError):
            await shows.models.Booking.objects.acreate(show_id=None)
        return HttpResponse()

    def its_own():
        with suppress(IntegrityError), transaction.atomic():
            shows.models.Booking.objects.create(show_id=None)

    async def with_atomic(request):
        await shows.views.book(request)
        await sync_to_async(its_own)()
        return HttpResponse()

    async with serve(path("", view), path("atomic", with_atomic)) as site:
        assert (await site.post("/", show="1")).status == 200
        assert database.booked() == []
        assert (await site.post("/atomic", show="1")).status == 200
        assert database.booked() == [1]


async def test_an_answer_of_any_status_commits(shows, serve, database):
    async def view(request):
        await shows.views.book(request)
        return HttpResponse(status=400)

    async with serve(path("", view)) as site:
        assert (await site.post("/", show="1")).status == 400
    assert database.booked() == [1]


@pytest.mark.parametrize("fails", [False, True])
async def test_children_are_in_the_transaction_of_the_request(shows, serve, database, fails):
    inside = []

    async def child(request):
        await shows.views.book(request)
        inside.append(await sync_to_async(lambda: connection.in_atomic_block)())

    async def view(request):
        await asyncio.gather(*[child(request) for _ in range(3)])
        assert database.booked() == []
        if fails:
            raise Http404
        return HttpResponse()

    async with serve(path("", view)) as site:
        assert (await site.post("/", show="1")).status == (404 if fails else 200)
    assert inside == [True] * 3
    assert database.booked() == ([] if fails else [1, 1, 1])


@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_view_that_is_cut_off_rolls_back(shows, serve, database, who):
    reached = asyncio.Event()

    async def view(request):
        await shows.views.book(request)
        reached.set()
        await asyncio.Event().wait()

    async with serve(path("hangs", view), path("", shows.views.book)) as site:
        request = site.open("/hangs", form={"show": "1"})
        task = request.start()
        await reached.wait()
        if who == "client":
            request.disconnect()
            await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert request.sent == []
        assert database.booked() == []
        assert (await site.post("/", show="1")).status == 200  # nobody is left with its transaction
        assert database.booked() == [1]


async def test_a_stream_begins_after_the_commit(shows, serve, database):
    async def view(request):
        await shows.views.book(request)

        async def body():
            yield str(database.booked())
            yield str(await shows.models.Booking.objects.acount())

        return StreamingHttpResponse(body())

    async with serve(path("", view)) as site:
        assert (await site.post("/", show="1")).body == b"[1]1"


@async_only_middleware
def booking_middleware(get_response):
    async def middleware(request):
        response = await get_response(request)
        models = sys.modules["models"]
        await models.Booking.objects.acreate(show_id=request.GET["and"])
        return response

    return middleware


async def test_what_middleware_writes_is_in_it(shows, serve, database):
    middleware = [f"{__name__}.booking_middleware"]
    async with serve(path("", shows.views.book), MIDDLEWARE=middleware) as site:
        assert (await site.post("/?and=1", show="1")).status == 200
        assert database.booked() == [1, 1]
        assert (await site.post("/?and=2", show="1")).status == 500
        assert database.booked() == [1, 1]


async def test_a_request_that_does_not_ask_connects_to_nothing(shows, serve, opened):
    async def view(request):
        return HttpResponse()

    opened.clear()
    async with serve(path("", view)) as site:
        assert (await site.get("/")).status == 200
    assert opened == []


async def test_on_commit_is_called_before_the_first_byte(shows, serve, database, caplog):
    log = []

    def told():
        log.append(database.booked())
        raise ValueError("a mail")

    async def robust(request):
        await shows.views.book(request)
        await sync_to_async(transaction.on_commit)(told, robust=True)
        return HttpResponse()

    async def bare(request):
        await shows.views.book(request)
        await sync_to_async(transaction.on_commit)(told)
        return HttpResponse()

    async with serve(path("robust", robust), path("bare", bare)) as site:
        assert (await site.post("/robust", show="1")).status == 200
        assert (await site.post("/bare", show="1")).status == 500
    assert log == [[1], [1, 1]]
    assert database.booked() == [1, 1]


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_an_async_lifespan_factory_leaves_a_connection_idle(shows, serve, database, outside):
    @lifespan_scoped
    async def titles():
        return [one.title async for one in shows.models.Show.objects.all()]

    async def view(request):
        return HttpResponse(await titles())

    async with serve(path("", view)) as site:
        assert (await site.get("/")).body == b"Hamlet"
        await database.reach(1)
        await outside(default=database.settings)
        await database.reach(0)


# Outside a request


SCOPES_AT_ONCE = ["background", "frameworks", "serving"]


async def two_at_once(scope, ask, bookings):
    """Both begin, and book; the second ends, and then the first fails. What each raised."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def first():
        async with scope():
            await ask()
            await bookings.acreate(show_id=1)
            begun.set()
            await ended.wait()
            raise ValueError

    async def second():
        await begun.wait()
        try:
            async with scope():
                await ask()
                await bookings.acreate(show_id=1)
        finally:
            ended.set()

    return await asyncio.gather(first(), second(), return_exceptions=True)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_of_two_scopes_over_one_connection_the_second_is_told_that_it_has_no_transaction(
    shows, database, outside
):
    first, second = await two_at_once(
        request_scope, shows.resources.aatomic, shows.models.Booking.objects
    )
    assert isinstance(first, ValueError)
    assert isinstance(second, RuntimeError)
    assert "durable" in str(second)
    assert database.booked() == []


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_of_two_scopes_with_a_thread_each_the_second_s_row_is_there(shows, project, database):
    for page in [ATOMIC[0], *(f"recipes/{name}.md" for name in SCOPES_AT_ONCE)]:
        written = "`async with ThreadSensitiveContext(), request_scope():`"
        assert written in (pages.DOCS / page).read_text()
    until_response = project(STREAM).resources.orm_until_response

    @asynccontextmanager
    async def scope():
        async with ThreadSensitiveContext(), request_scope():
            yield

    async def ask():
        await sync_to_async(until_response)()
        await shows.resources.aatomic()
        assert database.connected() > 0

    first, second = await two_at_once(scope, ask, shows.models.Booking.objects)
    assert isinstance(first, ValueError)
    assert second is None
    assert database.booked() == [1]
    await database.reach(0)


def test_django_s_testcase_rolls_back_what_a_request_has_committed(shows, database):
    class Tests(TestCase):
        async_client_class = AsyncClient

        async def test_it(self):
            async with self.async_client as client:
                answer = await client.post("/", {"show": "1"})
            assert answer.content == b"Booked."
            assert await shows.models.Booking.objects.acount() == 1
            assert await sync_to_async(lambda: connection.in_atomic_block)()
            async with request_scope():
                await shows.resources.aatomic()
                await shows.models.Booking.objects.acreate(show_id=1)
            assert await shows.models.Booking.objects.acount() == 2

    passes(Tests, path("", shows.views.book))
    assert database.booked() == []


def passes(case, *patterns):
    with urls(*patterns):
        result = unittest.TestResult()
        unittest.TestSuite([case("test_it")]).run(result)
    assert result.testsRun == 1
    assert result.errors == result.failures == []


# A connection given back before a long stream


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_no_connection_is_held_while_it_streams(
    shows, project, serve, database, opened, in_transaction
):
    modules = project(STREAM)
    streaming = []

    async def look(number, message):
        if message["type"] == "http.response.body":
            streaming.append([one.connection for one, _ in opened])

    async def view(request):
        await sync_to_async(modules.resources.orm_until_response)()
        if in_transaction:
            await shows.resources.aatomic()
        await shows.models.Booking.objects.acreate(show_id=1)
        return await modules.streams.export(request)

    async with serve(path("", view)) as site:
        opened.clear()
        answer = await site.get("/", before_send=look)
        assert answer.body.endswith(b"\n1 now\n")
    assert streaming[0] == [None], "closed before the body's first part"
    assert [one.connection for one, _ in opened] == [None] * 2, "connected anew, and closed"
    assert database.booked() == [1]


async def test_a_connection_in_a_transaction_is_not_closed(shows, project, serve, database):
    """Asked for in the wrong order: the transaction is then committed, not lost."""
    modules = project(STREAM)

    async def view(request):
        await shows.views.book(request)
        await sync_to_async(modules.resources.orm_until_response)()
        return HttpResponse()

    async with serve(path("", view)) as site:
        assert (await site.post("/", show="1")).status == 200
    assert database.booked() == [1]


def test_django_s_testcase_keeps_its_connection(shows, project, database):
    modules = project(STREAM)

    class Tests(TestCase):
        async_client_class = AsyncClient

        async def test_it(self):
            await shows.models.Booking.objects.acreate(show_id=1)
            async with self.async_client as client:
                answer = await client.get("/")
                body = [part async for part in answer.streaming_content]
            assert body[-1] == b"1 now\n"
            assert await shows.models.Booking.objects.acount() == 1

    passes(Tests, path("", modules.streams.export))
    assert database.booked() == []


# Read-only


async def test_a_write_is_refused_and_the_next_request_may(shows, project, serve, database):
    read_only = project(READ_ONLY).resources.read_only
    use(default=database.settings | {"CONN_MAX_AGE": None})
    refused = []

    async def reads(request):
        await sync_to_async(read_only)()
        assert await shows.models.Show.objects.acount() == 1
        try:
            await shows.models.Booking.objects.acreate(show_id=1)
        except (InternalError, OperationalError) as error:
            refused.append(type(error))
            raise

    async with serve(path("reads", reads), path("", shows.views.book)) as site:
        assert (await site.get("/reads")).status == 500
        assert database.booked() == []
        assert (await site.post("/", show="1")).status == 200
    assert refused == [InternalError if database.vendor == "postgresql" else OperationalError]
    assert database.booked() == [1]


# A replica


async def test_a_request_reads_from_the_replica_until_it_writes(
    shows, project, serve, database, settings_of_replica
):
    modules = project(REPLICA)
    use(default=database.settings, replica=settings_of_replica)
    show, log = shows.models.Show, []

    async def titles():
        return [one.title async for one in show.objects.order_by("pk")]

    async def view(request):
        log.append(await titles())
        if "write" in request.GET:
            await show.objects.acreate(title="Macbeth")
            log.append(await asyncio.create_task(titles()))
        return HttpResponse()

    assert modules.routers.PinnedRouter
    async with serve(path("", view), DATABASE_ROUTERS=["routers.PinnedRouter"]) as site:
        for where in ["/?write", "/"]:
            assert (await site.get(where)).status == 200
        assert router.db_for_read(show) == router.db_for_write(show) == "default"
        assert router.allow_relation(show(), show())
    assert log == [["a copy"], ["Hamlet", "Macbeth"], ["a copy"]]


async def test_the_orm_works_where_no_request_is_or_is_no_longer(
    shows, project, serve, database, settings_of_replica, outside
):
    assert project(REPLICA)
    await outside(default=database.settings, replica=settings_of_replica)
    log, release = [], asyncio.Event()

    async def look(where):
        log.append((where, [one.title async for one in shows.models.Show.objects.all()]))
        await shows.models.Show.objects.filter(pk=2).aupdate(title="")

    @lifespan_scoped
    async def config():
        await look("lifespan")

    @request_scoped
    async def audit():
        yield
        await look("teardown")

    async def outlives():
        await release.wait()
        await look("task")

    tasks = []

    async def view(request):
        await config()
        await audit()
        tasks.append(asyncio.create_task(outlives()))
        return HttpResponse()

    def finished(**kwargs):
        async_to_sync(look)("receiver")

    request_finished.connect(finished)
    try:
        async with serve(path("", view), DATABASE_ROUTERS=["routers.PinnedRouter"]) as site:
            assert (await site.get("/")).status == 200
            release.set()
            await tasks[0]
    finally:
        request_finished.disconnect(finished)
    assert sorted(where for where, _ in log) == ["lifespan", "receiver", "task", "teardown"]
    assert dict(log)["lifespan"] == dict(log)["task"] == ["Hamlet"], "the default"


@pytest.fixture
def settings_of_replica(shows, database, tmp_path):
    """Another database with the same tables, in which the show has another title."""
    if database.vendor == "sqlite":
        copy = tmp_path / "replica"
        with sqlite3.connect(copy) as other:
            database.own.backup(other)
            other.execute("UPDATE shows_show SET title = 'a copy'")
        other.close()
        yield database.settings | {"NAME": copy}
    else:
        database.own.execute("CREATE SCHEMA replica")
        database.own.execute(
            "CREATE TABLE replica.shows_show AS SELECT id, 'a copy' AS title FROM public.shows_show"
        )
        yield database.settings | {"OPTIONS": {"options": "-c search_path=replica"}}
        database.own.execute("DROP SCHEMA replica CASCADE")


# Persistent connections and pools


@pytest.mark.parametrize("age", [0, 60])
async def test_persistent_connections(shows, project, serve, database, opened, age):
    persistent = project(PERSISTENT).settings.PERSISTENT
    use(default=database.settings | persistent | {"CONN_MAX_AGE": age})
    opened.clear()
    async with serve(path("", shows.views.book)) as site:
        for _ in range(10):
            assert (await site.post("/", show="1")).status == 200
        assert len(opened) == (1 if age else 10)
        last, _ = opened[-1]
        assert (last.connection is not None) == bool(age)


async def test_djangos_handler_makes_one_for_each_request(shows, database, opened):
    async def view(request):
        return HttpResponse(await shows.models.Show.objects.acount())

    use(default=database.settings | {"CONN_MAX_AGE": 60})
    opened.clear()
    with urls(path("", view)), its_leaks_ignored():
        for _ in range(10):
            request = Connection(ASGIHandler())
            await request.run()
            assert request.status == 200
    assert len(opened) == 10


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_a_pool_has_all_its_connections_after_a_request(shows, project, serve, database):
    pooled = project(PERSISTENT).settings.POOLED["OPTIONS"]
    options = {"OPTIONS": database.settings["OPTIONS"] | pooled}
    use(default=database.settings | options)
    seen = Counter()

    async def view(request):
        await shows.views.book(request)
        seen[await sync_to_async(lambda: connection.connection.info.backend_pid)()] += 1
        return HttpResponse()

    async def fails(request):
        await view(request)
        raise Http404

    pool = None
    try:
        async with serve(path("", view), path("fails", fails)) as site:
            for _ in range(5):
                assert (await site.post("/", show="1")).status == 200
                assert (await site.post("/fails", show="1")).status == 404
            answers = await asyncio.gather(*[site.post("/", show="1") for _ in range(20)])
            assert {answer.status for answer in answers} == {200}
            pool = await sync_to_async(lambda: connection.pool)()
            async with asyncio.timeout(20):  # a worker of the pool's takes them back
                while (stats := pool.get_stats())["pool_available"] < stats["pool_size"]:
                    await asyncio.sleep(0.01)
            assert stats["pool_size"] <= 4
    finally:
        if pool is not None:
            await asyncio.to_thread(pool.close)
    assert sum(seen.values()) == 30
    assert len(seen) <= 4
    assert len(database.booked()) == 25


# django-async-backend, in a process of its own, as it changes every model

# It is in the dependency group `async-backend`: .ci/run runs these with it too.


needs_async_backend = pytest.mark.only_if(
    importlib.util.find_spec("django_async_backend") is not None,
    reason="the dependency group `async-backend` is not installed",
)


def ends(folder, url, handler):
    folder.mkdir(exist_ok=True)
    for name, text in pages.files(pages.DOCS / ASYNC_BACKEND[0], ASYNC_BACKEND[1]).items():
        (folder / name).write_text(text)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.projects.async_backend", handler],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder), "DATABASE_URL": url},
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@needs_async_backend
def test_an_async_backend_is_left_with_no_connection_however_the_request_ends(
    postgres_url, tmp_path
):
    ours = ends(tmp_path, postgres_url, "scoped")
    assert len(ours["left"]) == 9
    assert set(ours["left"].values()) == {0}
    assert ours["failed"] == [500, []]
    assert ours["booked"] == [200, ["Hamlet"]]


@needs_async_backend
def test_an_async_backend_under_djangos_handler_is_left_with_some(postgres_url, tmp_path):
    left = ends(tmp_path, postgres_url, "django")["left"]
    assert {ending for ending, count in left.items() if count} >= {"stream_raises"}
    assert left["answers"] == 0
