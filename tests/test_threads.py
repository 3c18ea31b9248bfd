"""Promise 22: the thread for a request's sync code, taken when needed, lent again, never shared."""

import asyncio
import threading
import time

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.cache import close_caches
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, connections, reset_queries
from django.db.backends.signals import connection_created
from django.http import HttpResponse
from django.test import override_settings

from scoped.asgi import ScopedASGIHandler
from scoped.serving import threads
from scoped.serving.threads import LentThread, end_idle
from tests.connection import Connection
from tests.slowness import within
from tests.views import Views

view = Views()
urlpatterns = view.urlpatterns


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("scoped")]


def end_all():
    deadline = time.monotonic() + within(10)
    while ours() and time.monotonic() < deadline:  # one that works takes itself back later
        end_idle()
        for thread in ours():
            thread.join(0.01)


@pytest.fixture(autouse=True)
def _no_idle_threads():
    end_all()
    with override_settings(ROOT_URLCONF=__name__):
        yield
    end_all()


@pytest.fixture
def handler(_no_idle_threads):
    return ScopedASGIHandler()


@pytest.fixture
def connected():
    pairs = []

    def connect(signal, receiver):
        signal.connect(receiver)
        pairs.append((signal, receiver))

    yield connect
    for signal, receiver in pairs:
        signal.disconnect(receiver)


async def get(handler, where):
    connection = Connection(handler, where)
    await connection.run()
    return connection


@view
async def in_async_code_only(request):
    return HttpResponse()


@view
def which_thread(request):
    return HttpResponse(str(threading.get_ident()))


async def test_a_request_without_sync_code_takes_no_thread(handler):
    assert (await get(handler, "/in_async_code_only")).status == 200
    assert ours() == []


async def test_all_sync_code_of_a_request_runs_in_one_thread(handler, connected):
    seen = []

    def receiver(**kwargs):
        seen.append(threading.get_ident())

    @view
    async def hops(request):
        for _ in range(3):
            seen.append(await sync_to_async(threading.get_ident)())
        response = HttpResponse()
        response._resource_closers.append(receiver)
        return response

    connected(request_started, receiver)
    connected(request_finished, receiver)
    await get(handler, "/hops")
    assert len(seen) == 6
    assert len(set(seen)) == 1
    assert seen[0] != threading.get_ident()


async def test_a_thread_is_lent_again(handler):
    first = (await get(handler, "/sync/which_thread")).body
    second = (await get(handler, "/sync/which_thread")).body
    assert first == second
    assert len(ours()) == 1


async def test_requests_side_by_side_never_share_a_thread(handler):
    meet = threading.Barrier(5)

    @view
    def meets(request):
        meet.wait(10)
        return which_thread(request)

    answers = await asyncio.gather(*(get(handler, "/sync/meets") for _ in range(5)))
    assert len({answer.body for answer in answers}) == 5


async def test_a_thread_that_is_still_busy_is_not_lent(handler):
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    @view
    async def leaves_it_busy(request):
        # Cancelled, it leaves its thread at work; the request ends all the same.
        work = asyncio.create_task(sync_to_async(busy)())
        await begun.wait()
        work.cancel()
        await asyncio.wait([work])
        return HttpResponse("left")

    def busy():
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(10)

    task = Connection(handler, "/leaves_it_busy").start()
    await begun.wait()
    other = await get(handler, "/sync/which_thread")
    assert other.status == 200
    busy_thread = {thread.ident for thread in ours()} - {int(other.body)}
    assert len(busy_thread) == 1
    go_on.set()
    await task


async def test_what_is_given_back_at_work_is_kept_until_it_is_done():
    go_on = threading.Event()
    lent = LentThread()
    lent.submit(go_on.wait, 10)
    lent.give_back()
    assert list(threads._idle) == []
    go_on.set()
    deadline = time.monotonic() + 10
    while not threads._idle and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
    assert len(threads._idle) == 1


async def test_work_that_was_cancelled_does_not_make_a_busy_thread_seem_idle():
    go_on = threading.Event()
    lent = LentThread()
    lent.submit(go_on.wait, 10)
    assert lent.submit(print).cancel()
    assert lent.is_busy
    lent.give_back()
    assert list(threads._idle) == []
    go_on.set()


async def test_idle_threads_above_the_bound_are_let_go(handler):
    with override_settings(SCOPED={"MAX_IDLE_THREADS": 2}):
        meet = threading.Barrier(5)

        @view
        def meets_again(request):
            meet.wait(10)
            return HttpResponse()

        await asyncio.gather(*(get(handler, "/sync/meets_again") for _ in range(5)))
        assert len(threads._idle) == 2
        deadline = time.monotonic() + 10
        while len(ours()) > 2 and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        assert len(ours()) == 2


async def test_a_straggler_is_told_and_never_runs_on_another_requests_thread(handler):
    late = asyncio.Event()
    outcome = asyncio.get_running_loop().create_future()

    async def straggler():
        await late.wait()
        try:
            outcome.set_result(await sync_to_async(threading.get_ident)())
        except RuntimeError as error:
            outcome.set_result(error)

    @view
    async def leaves_a_straggler(request):
        await sync_to_async(threading.get_ident)()
        view["task"] = asyncio.create_task(straggler())
        return HttpResponse()

    await get(handler, "/leaves_a_straggler")
    late.set()
    assert "ThreadSensitiveContext has exited" in str(await outcome)


def test_sync_code_that_waits_for_a_request_lends_its_own_thread():
    """As a TestCase does, whose transaction the request's code is to see."""
    with override_settings(ROOT_URLCONF=__name__):
        connection = Connection(ScopedASGIHandler(), "/sync/which_thread")
        async_to_sync(connection.run)()
    assert connection.body == str(threading.get_ident()).encode()


async def test_a_receiver_connected_or_disconnected_between_requests_is_honoured(handler):
    seen = []

    def receiver(**kwargs):
        seen.append(kwargs["signal"])

    await get(handler, "/in_async_code_only")
    assert seen == []
    for signal in (request_started, request_finished):
        signal.connect(receiver)
    await get(handler, "/in_async_code_only")
    for signal in (request_started, request_finished):
        signal.disconnect(receiver)
    await get(handler, "/in_async_code_only")
    assert seen == [request_started, request_finished]


async def test_django_s_own_receivers_tidy_the_thread_before_its_first_work(handler, connected):
    order = []

    def tells(name):
        def receiver(**kwargs):
            order.append((name, threading.get_ident()))

        return receiver

    # As the handler sees them: Django's, by identity. What they do shows in the database tests.
    handler_tidy = LentThread(tells("tidy"))
    handler_tidy.submit(lambda: order.append(("work", threading.get_ident()))).result(10)
    handler_tidy.give_back()
    assert [name for name, _ in order] == ["tidy", "work"]
    assert len({ident for _, ident in order}) == 1


# A real database: connections belong to threads


@pytest.fixture
def database(tmp_path, request):
    """SQLite, in a file; returns what was connected, by thread."""
    opened = []

    def created(connection, **kwargs):
        opened.append(connection)

    connection_created.connect(created)
    before = connections.settings
    connections.settings = connections.configure_settings(
        {
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": tmp_path / "db.sqlite3",
                "CONN_MAX_AGE": getattr(request, "param", 0),
            }
        }
    )
    yield opened
    connection_created.disconnect(created)
    for connection in opened:
        connection.connection and connection.connection.close()
    connections.settings = before


@view
def queries(request):
    with connections["default"].cursor() as cursor:
        cursor.execute("SELECT 1")
    return HttpResponse(str(len(connections["default"].queries_log)))


@pytest.mark.parametrize("database", [60], indirect=True)
async def test_conn_max_age_keeps_a_connection_with_its_thread(handler, database):
    for _ in range(10):
        assert (await get(handler, "/sync/queries")).status == 200
    assert len(database) == 1


@pytest.mark.parametrize("database", [0], indirect=True)
async def test_without_conn_max_age_none_is_left_open(handler, database):
    for _ in range(3):
        await get(handler, "/sync/queries")
    assert len(database) == 3
    assert [connection.connection for connection in database] == [None] * 3


@pytest.mark.parametrize("database", [60], indirect=True)
async def test_a_connection_past_its_age_or_broken_is_not_handed_out(handler, database):
    await get(handler, "/sync/queries")
    database[0].close_at = time.monotonic() - 1
    await get(handler, "/sync/queries")
    assert len(database) == 2
    database[1].errors_occurred = True
    database[1].is_usable = lambda: False
    await get(handler, "/sync/queries")
    assert len(database) == 3


@pytest.mark.parametrize("database", [60], indirect=True)
async def test_under_debug_the_query_log_is_that_of_the_request(handler, database):
    with override_settings(DEBUG=True):
        assert [(await get(handler, "/sync/queries")).body for _ in range(3)] == [b"1"] * 3


def test_the_tidy_receivers_are_those_that_django_connects():
    def sync_receivers(signal):
        return {reference() for key, reference, *_ in signal.receivers if key[1] == id(None)}

    assert {reset_queries, close_old_connections} <= sync_receivers(request_started)
    assert {close_caches, close_old_connections} <= sync_receivers(request_finished)
