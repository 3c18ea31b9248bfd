"""The thread for a request's sync code: taken when it is needed, lent again, never shared.

Promise 22, where it is not said otherwise.
"""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import deque
from contextvars import ContextVar

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.cache import caches, close_caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, connections, reset_queries, transaction
from django.db.backends.signals import connection_created
from django.http import HttpResponse
from django.test import override_settings

from scoped import lifespan_scope, lifespan_scoped, spawn
from scoped.asgi import ScopedASGIHandler
from scoped.serving import threads
from scoped.serving.threads import LentThread
from scoped.testing import AsyncClient
from tests.connection import Connection
from tests.recipes.conftest import lifespan
from tests.slowness import within
from tests.views import Views

variable = ContextVar("variable", default="nothing")
local = threading.local()
view = Views()
urlpatterns = view.urlpatterns


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("scoped")]


def end_all():
    deadline = time.monotonic() + within(10)
    while ours() and time.monotonic() < deadline:  # one that works takes itself back later
        threads.end_idle()
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


async def test_a_thread_knows_nothing_of_the_context_that_it_was_started_in():
    """Python 3.14 can be told to let threads inherit it."""
    variable.set("the request's")
    worker = threads._Worker()
    seen = asyncio.get_running_loop().create_future()
    worker.give(variable.get, seen)
    assert await seen == "nothing"
    worker.end()


@pytest.mark.parametrize("raised", [ValueError("no"), StopIteration(1), KeyboardInterrupt()])
async def test_what_sync_code_raises_reaches_who_waits_for_it(raised):
    def raises():
        raise raised

    with LentThread() as thread, pytest.raises(BaseException) as caught:
        await thread.submit(raises)
    if isinstance(raised, StopIteration):  # which no future can hold
        assert isinstance(caught.value, RuntimeError)
    else:
        assert caught.value is raised


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
    assert lent.submit(pytest.fail, "it was cancelled").cancel()
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


async def test_a_stragglers_sync_code_runs_but_never_on_another_requests_thread(handler):
    late = asyncio.Event()

    async def straggler():
        await late.wait()
        return [await sync_to_async(threading.get_ident)() for _ in range(2)]

    @view
    async def leaves_a_straggler(request):
        view["task"] = asyncio.create_task(straggler())
        return HttpResponse(str(await sync_to_async(threading.get_ident)()))

    left = (await get(handler, "/leaves_a_straggler")).body
    late.set()
    first, second = await view.pop("task")
    assert first == second  # one thread, as a transaction of several steps needs
    assert str(first).encode() != left == (await get(handler, "/sync/which_thread")).body


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
    with LentThread(tells("tidy")) as thread:
        await thread.submit(lambda: order.append(("work", threading.get_ident())))
    assert [name for name, _ in order] == ["tidy", "work"]
    assert len({ident for _, ident in order}) == 1


async def test_what_tidies_the_thread_late_does_so_before_whoever_is_next():
    order = []
    for name in ("first", "second"):
        with LentThread() as thread:
            await thread.submit(order.append, name)
            assert thread.can_be_tidied_later
            thread.tidy_later(lambda: order.append("tidied"))
    async with lifespan(ScopedASGIHandler()):
        pass  # its end waits for idle threads
    assert order == ["first", "tidied", "second", "tidied"]
    assert threads._idle == deque()


async def test_what_tidies_a_thread_and_fails_is_logged_and_the_thread_goes_on(caplog):
    def fails():
        raise OSError("the tidying")

    with LentThread(fails) as thread:
        assert await thread.submit(str, "work") == "work"
        assert "Before a request's sync code: OSError('the tidying')" in caplog.text
        thread.tidy_later(fails)
    with LentThread() as thread:
        assert await thread.submit(str, "more work") == "more work"
        assert "In the thread for sync code: OSError('the tidying')" in caplog.text


async def test_work_is_done_though_the_settings_of_the_databases_are_wrong(caplog):
    before = connections.settings
    try:
        del connections.settings
        connections._settings = {"other": {"ENGINE": "django.db.backends.sqlite3"}}
        with LentThread() as thread:
            assert await thread.submit(str, "work") == "work"
            # After work that fails it is looked whether a database is connected to.
            with pytest.raises(ValueError, match="invalid literal"):
                await thread.submit(int, "work")
            thread.lend_again = False
    finally:
        connections._settings = None
        connections.settings = before
    assert "You must define a 'default' database" in caplog.text


async def test_the_way_back_to_a_thread_that_has_ended_says_so():
    with LentThread() as thread:
        await thread.submit(lambda: None)
        worker = thread._worker
        thread.lend_again = False
    worker.thread.join(within(10))
    with pytest.raises(RuntimeError, match=r"scoped-\d+ has ended"):
        worker.submit(lambda: None)


async def test_cancelled_while_idle_threads_end_it_waits_for_them_and_then_says_so():
    go_on = threading.Event()
    with LentThread() as thread:
        await thread.submit(lambda: None)
        thread.tidy_later(lambda: go_on.wait(within(10)))
    ending = asyncio.create_task(threads.idle_ended())
    await asyncio.sleep(0)
    ending.cancel()
    await asyncio.sleep(0)
    assert not ending.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert threads._idle == deque()


# Caches: what closes them may have to wait for a server, so it is done in the thread


class Cache(LocMemCache):
    def close(self):
        order.append(("closed", threading.get_ident()))


order = []


async def test_a_cache_that_was_used_is_closed_in_the_thread(handler):
    @view
    async def uses_cache(request):
        caches["default"].set("key", "value")
        return HttpResponse()

    order.clear()
    with override_settings(CACHES={"default": {"BACKEND": f"{__name__}.Cache"}}):
        await get(handler, "/in_async_code_only")
        assert order == []
        await get(handler, "/uses_cache")
    [(_, thread)] = order
    assert thread in {one.ident for one in ours()}


async def test_one_that_cannot_be_imported_keeps_no_request_from_its_end(handler):
    with override_settings(CACHES={"default": {"BACKEND": "no.such.Cache"}}):
        connection = await get(handler, "/in_async_code_only")
    assert connection.complete


def test_a_background_task_has_a_thread_where_there_is_no_django():
    program = (
        "import asyncio, sys\n"
        "from asgiref.sync import sync_to_async\n"
        "from scoped import spawn\n"
        "async def work():\n"
        "    print(await sync_to_async(lambda: 'done')())\n"
        "async def main():\n"
        "    for _ in range(2):\n"
        "        await spawn(work())\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": ""}
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (ran.stdout, ran.stderr) == ("done\ndone\n", "")


# A thread whose request was cut off: what its code would have cleaned up is still there


def keeps_user(get_response):
    """As many a middleware does, without a `finally`."""

    def middleware(request):
        if "user" in request.GET:
            local.user = request.GET["user"]
        response = get_response(request)
        if hasattr(local, "user"):
            del local.user
        return response

    return middleware


@view
async def hangs(request):
    view["begun"].set()
    await asyncio.Event().wait()


@view
def whoami(request):
    return HttpResponse(getattr(local, "user", "nobody"))


@pytest.mark.parametrize("end", ["the client goes", "the server cancels"])
async def test_no_request_is_the_heir_of_one_that_was_cut_off(end):
    with override_settings(MIDDLEWARE=[f"{__name__}.keeps_user"]):
        handler = ScopedASGIHandler()
        for _ in range(5):
            view["begun"] = asyncio.Event()
            connection = Connection(handler, "/hangs", query_string=b"user=ada")
            task = connection.start()
            await view["begun"].wait()
            connection.disconnect() if end == "the client goes" else task.cancel()
            await asyncio.wait([task])
            assert (await get(handler, "/sync/whoami")).body == b"nobody"


async def test_no_request_is_the_heir_of_one_whose_response_could_not_be_sent(handler):
    async def fails(number, message):
        raise OSError("gone")

    connection = Connection(handler, "/sync/which_thread", before_send=fails)
    with pytest.raises(OSError, match="gone"):
        await connection.run()
    assert list(threads._idle) == []


async def test_a_sync_view_that_runs_on_when_its_client_has_gone_ends_with_its_thread(handler):
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    @view
    def runs_on(request):
        view["ran in"] = threading.current_thread()
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(10)

    connection = Connection(handler, "/sync/runs_on")
    task = connection.start()
    await begun.wait()
    connection.disconnect()
    go_on.set()
    await task
    await asyncio.to_thread(view.pop("ran in").join, 10)
    assert ours() == []


async def test_no_task_is_the_heir_of_a_background_task_that_failed():
    async def fails():
        await sync_to_async(setattr)(local, "user", "ada")
        raise ValueError("no")

    async def asks():
        found.append(await sync_to_async(getattr)(local, "user", "nobody"))

    found = []
    await asyncio.wait([spawn(fails())])
    await spawn(asks())
    assert found == ["nobody"]


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


@view
def begins(request):
    """A transaction, by hand; and whether it found one."""
    connection = connections["default"]
    found = connection.in_atomic_block
    transaction.atomic().__enter__()
    connection.cursor().execute("CREATE TABLE IF NOT EXISTS t (n)")
    return HttpResponse(str(found))


@pytest.mark.parametrize("database", [60], indirect=True)
async def test_a_transaction_that_nobody_ended_ends_with_its_request(handler, database):
    for _ in range(3):
        assert (await get(handler, "/sync/begins")).body == b"False"
        assert (await get(handler, "/sync/tables")).body == b"0"  # rolled back, and not locked out
    assert len(ours()) == 1


@view
def tables(request):
    with connections["default"].cursor() as cursor:
        cursor.execute("SELECT count(*) FROM sqlite_master")
        return HttpResponse(str(cursor.fetchone()[0]))


class AsyncAtomic(transaction.Atomic):
    """As projects write it."""

    def __init__(self):
        super().__init__(None, True, False)

    async def __aenter__(self):
        await sync_to_async(self.__enter__)()

    async def __aexit__(self, *exc_info):
        await sync_to_async(self.__exit__)(*exc_info)


@pytest.mark.parametrize("database", [0, 60], indirect=True)
async def test_a_client_that_leaves_during_begin_poisons_no_thread(handler, database, monkeypatch):
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    enter = AsyncAtomic.__enter__

    def enters_late(self):
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(10)
        enter(self)

    @view
    async def transfers(request):
        async with AsyncAtomic():
            pytest.fail("its client has gone")

    with monkeypatch.context() as patch:
        patch.setattr(AsyncAtomic, "__enter__", enters_late)
        connection = Connection(handler, "/transfers")
        task = connection.start()
        await begun.wait()
        connection.disconnect()
        go_on.set()
        await task
    assert [(await get(handler, "/sync/tables")).status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize("database", [60], indirect=True)
async def test_a_thread_that_is_not_kept_closes_its_connection(handler, database):
    with override_settings(SCOPED={"MAX_IDLE_THREADS": 0}):
        await get(handler, "/sync/queries")
        await asyncio.to_thread(end_all)
    assert [connection.connection for connection in database] == [None]


@pytest.mark.parametrize("database", [60], indirect=True)
async def test_when_the_server_shuts_down_idle_threads_close_their_connections(handler, database):
    async with lifespan(handler):
        await get(handler, "/sync/queries")
        assert database[0].connection is not None
    assert database[0].connection is None


@pytest.mark.parametrize("database", [60], indirect=True)
async def test_when_the_test_client_returns_no_connection_is_left_in_another_thread(database):
    """Or the test database could not be dropped."""
    assert (await AsyncClient().get("/sync/queries")).status_code == 200
    assert [connection.connection for connection in database] == [None]


async def test_a_connection_that_cannot_be_closed_is_told_and_the_thread_ends(database, caplog):
    def connects():
        def fails():
            raise OSError("the network")

        connections["default"].ensure_connection()
        connections["default"].close = fails

    with LentThread(lend_again=False) as thread:
        await thread.submit(connects)
        worker = thread._worker
    await asyncio.to_thread(worker.thread.join, within(10))
    assert not worker.thread.is_alive()
    assert "A database connection could not be closed: OSError('the network')" in caplog.text


def test_the_tidy_receivers_are_those_that_django_connects():
    def sync_receivers(signal):
        return {reference() for key, reference, *_ in signal.receivers if key[1] == id(None)}

    assert {reset_queries, close_old_connections} <= sync_receivers(request_started)
    assert {close_caches, close_old_connections} <= sync_receivers(request_finished)


async def test_a_lifespan_s_sync_generator_ends_in_the_lent_thread_that_set_it_up():
    """Promises 17 and 22: the thread goes on for that, though it is not lent again."""
    log = []

    @lifespan_scoped
    def cache():
        log.append(threading.get_ident())
        yield "cache"
        log.append(threading.get_ident())

    @view
    async def asks(request):
        return HttpResponse(await sync_to_async(cache)())

    async with lifespan_scope():
        connection = Connection(ScopedASGIHandler(), "/asks")
        await connection.run()
        assert connection.body == b"cache"
        threads.end_idle()  # nobody lends it any more
        assert len(log) == 1
    assert log[0] == log[1] != threading.get_ident()
    deadline = time.monotonic() + within(10)
    while any(thread.ident == log[0] for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread has not ended"
        await asyncio.sleep(0.01)
