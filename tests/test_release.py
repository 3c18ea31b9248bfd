"""
Early release: ``await db.release()`` and ``tenant.release()`` tear a resource down now,
and before it all that was set up with it; asked for again, it is set up anew.
"""

import asyncio
import contextvars
import threading

import asyncpg
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpResponse, StreamingHttpResponse
from django.test import override_settings

from scoped import (
    AsyncResourceError,
    CircularResourceError,
    NoScopeError,
    ScopeClosedError,
    TeardownError,
    current_scope,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.asgi import ScopedASGIHandler
from scoped.core.scope import Scope
from tests.connection import Connection
from tests.views import Views

log: list[str] = []
view = Views()
numbers: dict[str, int] = {}


def number(name):
    """How often it has been set up."""
    numbers[name] = numbers.get(name, 0) + 1
    return f"{name} {numbers[name]}"


def resource(name, *needs, until=None, pause=None):
    """An async resource that uses others, and logs when it is torn down, after a pause."""

    async def made():
        for needed in needs:
            value = needed()
            if asyncio.iscoroutine(value):
                await value
        value = number(name)
        try:
            yield value
        finally:
            if pause is not None:
                await pause()
            log.append(value)

    made.__qualname__ = name
    return request_scoped(until=until)(made)


def sync_resource(name, *needs, until=None):
    def made():
        for needed in needs:
            needed()
        value = number(name)
        yield value
        log.append(value)

    made.__qualname__ = name
    return request_scoped(until=until)(made)


async def in_child(function):
    """First used in a child task, it has a keeper."""
    return await asyncio.create_task(function())


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


urlpatterns = view.urlpatterns


async def get(where, **kwargs):
    connection = Connection(ScopedASGIHandler(), where, **kwargs)
    await connection.run()
    return connection


@pytest.fixture(autouse=True)
async def _fresh():
    log.clear()
    numbers.clear()
    with override_settings(ROOT_URLCONF=__name__):
        yield
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


WHERE = pytest.mark.parametrize("where", ["owner", "child"])


def first_use(function, where):
    return function() if where == "owner" else in_child(function)


# What it does


@WHERE
async def test_it_is_torn_down_now_and_set_up_anew_when_asked_for_again(where):
    db = resource("db")
    async with request_scope():
        assert await first_use(db, where) == "db 1"
        await db.release()
        assert log == ["db 1"]
        assert await first_use(db, where) == await db() == "db 2"
        assert log == ["db 1"]
    assert log == ["db 1", "db 2"]


def test_a_sync_one_too():
    tenant = sync_resource("tenant")
    with request_scope():
        assert tenant() == "tenant 1"
        tenant.release()
        assert log == ["tenant 1"]
        assert tenant() == "tenant 2"
    assert log == ["tenant 1", "tenant 2"]


async def test_where_it_is_not_set_up_nothing_happens():
    db, tenant = resource("db"), sync_resource("tenant")
    boundary = resource("boundary", until="response")

    async def release_all():
        await db.release()
        await boundary.release()
        tenant.release()

    await release_all()  # no scope at all
    async with request_scope():
        await release_all()
        await db()
        await db.release()
        await release_all()
    await release_all()  # a closed one
    assert log == ["db 1"]


@WHERE
async def test_what_was_set_up_with_it_goes_first_in_reverse_order_and_nothing_else(where):
    base = resource("base")
    left, right = resource("left", base), resource("right", base)
    top = resource("top", left)
    other, later = resource("other"), resource("later")
    async with request_scope():
        await first_use(other, where)
        await first_use(top, where)
        await first_use(later, where)
        await first_use(right, where)
        await base.release()
        assert log == ["right 1", "top 1", "left 1", "base 1"]
        assert [await other(), await later()] == ["other 1", "later 1"]
        assert await top() == "top 2"
    assert log[4:] == ["top 2", "left 2", "base 2", "later 1", "other 1"]


async def test_what_it_uses_itself_stays():
    base = resource("base")
    top = resource("top", base)
    async with request_scope():
        await top()
        await top.release()
        assert log == ["top 1"]
        assert await base() == "base 1"


@WHERE
async def test_one_that_found_it_set_up_already_is_known_to_use_it(where):
    base = resource("base")
    top = resource("top", base, base)
    async with request_scope():
        await base()
        await first_use(top, where)
        await base.release()
        assert log == ["top 1", "base 1"]


async def test_so_is_one_that_used_it_in_a_child_task_or_a_thread_of_its_factory():
    base, tenant = resource("base"), sync_resource("tenant")

    async def in_thread():
        await sync_to_async(tenant)()

    @request_scoped
    async def gathers():
        await asyncio.gather(base(), in_thread())
        yield
        log.append("gathers")

    async with request_scope():
        await base()
        await gathers()
        await base.release()
        assert log == ["gathers", "base 1"]
        await gathers()
        tenant_released = asyncio.create_task(sync_to_async(tenant.release)())
        with pytest.raises(AsyncResourceError, match=r"gathers.*it is async"):
            await tenant_released
        await gathers.release()
        await sync_to_async(tenant.release)()
        assert log[2:] == ["gathers", "tenant 1"]


async def test_one_that_uses_it_no_more_the_second_time_stays():
    base = resource("base")
    needs = [base]

    @request_scoped
    async def sometimes():
        for needed in needs:
            await needed()
        return number("sometimes")

    async with request_scope():
        await sometimes()
        await base.release()
        needs.clear()
        await base()
        assert await sometimes() == "sometimes 2"
        await base.release()
        assert await sometimes() == "sometimes 2"


async def test_plain_values_made_of_it_go_too():
    base = resource("base")

    @request_scoped
    async def plain():
        return f"plain of {await base()}"

    @request_scoped
    def sync_plain():
        return f"sync plain of {base.get_nowait()}"

    @request_scoped
    async def top():
        return f"{await plain()}, {sync_plain()}"

    async with request_scope():
        assert await top() == "plain of base 1, sync plain of base 1"
        await base.release()
        assert await top() == "plain of base 2, sync plain of base 2"


async def test_sync_and_async_ones_that_use_each_other_go_in_order():
    tenant = sync_resource("tenant")
    db = resource("db", tenant)
    query = sync_resource("query", db.get_nowait, tenant)
    async with request_scope():
        await db()
        query()
        await db.release()
        assert log == ["query 1", "db 1"]
        await db()
        query()
        with pytest.raises(AsyncResourceError, match="it is async") as caught:
            tenant.release()
        assert "await" in str(caught.value)
        assert log == ["query 1", "db 1"]  # nothing has changed
        assert [query(), await db(), tenant()] == ["query 2", "db 2", "tenant 1"]
        await db.release()
        tenant.release()
        assert log[2:] == ["query 2", "db 2", "tenant 1"]


@WHERE
async def test_what_lives_until_the_response_and_uses_it_goes_first(where):
    db = resource("db")
    transaction = resource("transaction", db, until="response")
    other = resource("other", until="response")
    async with request_scope():
        await first_use(transaction, where)
        await other()
        await db.release()
        assert log == ["transaction 1", "db 1"]
        assert await transaction() == "transaction 2"
        await transaction.release()
        assert log[2:] == ["transaction 2"]
        assert await db() == "db 2"
    assert log[3:] == ["other 1", "db 2"]


async def test_in_reverse_order_of_set_up_among_what_lives_until_the_response():
    db = resource("db")
    one = resource("one", db, until="response")
    two = sync_resource("two", one.get_nowait, until="response")
    async with request_scope():
        await one()
        two()
        await db.release()
    assert log == ["two 1", "one 1", "db 1"]


async def test_a_teardown_may_use_what_goes_with_it():
    db = resource("db")

    @request_scoped
    async def flushed():
        await db()
        yield
        log.append(f"flushed to {await db()}")

    async with request_scope():
        await flushed()
        await db.release()
        assert log == ["flushed to db 1", "db 1"]


@WHERE
async def test_a_teardown_may_release_what_it_uses(where):
    db = resource("db")
    extra = resource("extra", db)

    @request_scoped
    async def last_user():
        await extra()
        yield
        await asyncio.sleep(0)
        await extra.release()
        await db.release()
        log.append("last user")

    async with request_scope():
        await first_use(last_user, where)
        await db.release()
        assert log == ["extra 1", "db 1", "last user"]
        await first_use(last_user, where)
        await last_user.release()
        assert log[3:] == ["extra 2", "db 2", "last user"]
        await first_use(last_user, where)
    assert log[6:] == ["last user", "extra 3", "db 3"]  # when all of it goes, in its order


async def test_a_factory_may_release_what_it_has_used():
    db = resource("db")

    @request_scoped
    async def config():
        value = await db()
        await db.release()
        return f"config of {value}"

    @request_scoped
    async def outer():
        return await config()

    async with request_scope():
        assert await outer() == "config of db 1"
        assert log == ["db 1"]


@WHERE
@pytest.mark.parametrize("who", ["teardown", "child"])
async def test_a_factory_that_a_teardown_asks_for_may_release_what_it_has_used(where, who):
    """The teardown waits for it, so it does not wait for the teardown. Promise 4."""
    extra = resource("extra")
    db = resource("db", pause=extra.release)

    @request_scoped
    async def report():
        value = await in_child(db)  # which any task may release
        await asyncio.sleep(0)
        await db.release()
        return f"report of {value}"

    async def asks():
        log.append(await (report() if who == "teardown" else in_child(report)))

    audit = resource("audit", pause=asks)
    async with request_scope():
        await in_child(extra)
        await first_use(audit, where)
        async with asyncio.timeout(5):
            await audit.release()
        assert log == ["extra 1", "db 1", "report of db 1", "audit 1"]


@WHERE
async def test_nor_does_it_wait_for_what_goes_at_the_response(where):
    db = resource("db")

    @request_scoped
    async def report():
        await db()
        await db.release()
        return number("report")

    async def asks():
        await asyncio.sleep(0)
        await report()

    audit = resource("audit", pause=asks, until="response")
    async with request_scope() as scope:
        await first_use(audit, where)
        async with asyncio.timeout(5):
            await scope.end_response()
        assert log == ["db 1", "audit 1"]


@pytest.mark.parametrize("thread", ["here", "another"])
async def test_in_sync_code_such_a_release_is_not_refused(thread):
    tenant = sync_resource("tenant")

    @request_scoped
    def report():
        value = tenant()
        tenant.release()
        return f"report of {value}"

    @request_scoped
    def audit():
        yield
        log.append(report())

    def use_and_release():
        audit()
        audit.release()

    async with request_scope():
        if thread == "here":
            use_and_release()
        else:
            await sync_to_async(use_and_release)()
        assert log == ["tenant 1", "report of tenant 1"]


async def test_a_release_that_waits_for_a_teardown_goes_on_when_that_needs_what_it_is_part_of():
    waits = asyncio.Event()
    db = resource("db")

    @request_scoped
    async def report():
        await db()
        waits.set()
        await db.release()
        return "report"

    between = resource("between", report)

    async def ask():
        await waits.wait()
        await turns()
        assert log == []
        await between()

    audit = resource("audit", pause=ask)
    async with request_scope():
        await in_child(audit)
        releasing = asyncio.create_task(audit.release())
        await turns()
        reporting = asyncio.create_task(report())
        async with asyncio.timeout(5):
            await releasing
            assert await reporting == "report"
        assert log == ["db 1", "audit 1"]


@WHERE
async def test_a_teardown_that_needs_what_waits_for_its_end_is_a_circle(where):
    """Promise 4: it never hangs."""

    async def ask():
        await asyncio.sleep(0)
        await report()

    db = resource("db", pause=ask)

    @request_scoped
    async def report():
        await first_use(db, where)
        await db.release()

    async with request_scope():
        async with asyncio.timeout(5):
            with pytest.raises(TeardownError) as caught:
                await report()
        (error,) = caught.value.exceptions
        assert isinstance(error, CircularResourceError)
        names = [one.factory.name.rpartition(".")[2] for one in error.circle]
        assert names == ["db", "report", "db"]


async def test_a_teardown_is_no_user_of_what_it_asks_for():
    """So it may ask for what does not live as long, while that is there."""
    transaction = resource("transaction", until="response")

    async def ask():
        assert await transaction() == "transaction 1"

    db = resource("db", pause=ask)
    async with request_scope():
        await db()
        await db.release()
    assert log == ["db 1", "transaction 1"]


# Failures


@WHERE
async def test_one_that_fails_does_not_stop_the_others(where):
    db = resource("db")

    @request_scoped
    async def broken():
        await db()
        yield
        raise ValueError("in teardown")

    async with request_scope():
        await first_use(broken, where)
        with pytest.raises(TeardownError) as caught:
            await db.release()
        assert [str(error) for error in caught.value.exceptions] == ["in teardown"]
        assert "broken" in caught.value.exceptions[0].__notes__[0]
        assert log == ["db 1"]
        assert await db() == "db 2"
    assert log == ["db 1", "db 2"]


def test_nor_does_a_sync_one():
    tenant = sync_resource("tenant")

    @request_scoped
    def broken():
        tenant()
        yield
        raise ValueError("in teardown")

    with request_scope():
        broken()
        with pytest.raises(TeardownError) as caught:
            tenant.release()
        assert "broken" in caught.value.exceptions[0].__notes__[0]
        assert log == ["tenant 1"]


@WHERE
async def test_one_that_hangs_is_cancelled_in_time(where, monkeypatch):
    monkeypatch.setattr(Scope, "teardown_timeout", 0.02)
    db = resource("db")
    hangs = resource("hangs", db, pause=asyncio.Event().wait)
    async with request_scope():
        await first_use(hangs, where)
        with pytest.raises(TeardownError) as caught:
            await db.release()
        assert "took longer than 0.02 seconds" in str(caught.value.exceptions[0])
        assert log == ["db 1"]


@WHERE
async def test_when_it_is_cancelled_all_goes_first_and_then_the_cancellation_is_raised(where):
    going = asyncio.Event()

    async def pause():
        going.set()
        await turns()

    db = resource("db")
    slow = resource("slow", db, pause=pause)
    async with request_scope() as scope:
        await first_use(slow, where)
        owner = asyncio.current_task()

        async def cancel():
            await going.wait()
            owner.cancel()

        cancelling = asyncio.create_task(cancel())
        with pytest.raises(asyncio.CancelledError):
            await db.release()
        owner.uncancel()
        await cancelling
        assert log == (["db 1"] if where == "owner" else ["slow 1", "db 1"])
        assert scope.records == {}
        assert await db() == "db 2"


# Where


async def test_what_the_owner_set_up_is_released_by_the_owner_alone():
    db, tenant = resource("db"), sync_resource("tenant")
    user = resource("user", db)
    sync_user = sync_resource("sync_user", tenant)
    async with request_scope():
        await user()
        sync_user()
        for release in (
            db.release,
            sync_to_async(tenant.release),
            sync_to_async(sync_user.release),
        ):
            with pytest.raises(AsyncResourceError, match="where it was set up") as caught:
                await in_child(release)
            assert "in the view itself" in str(caught.value)
        assert log == []
        assert [await user(), await db(), tenant()] == ["user 1", "db 1", "tenant 1"]
        await db.release()
        tenant.release()
        assert log == ["user 1", "db 1", "sync_user 1", "tenant 1"]


async def test_it_is_refused_as_a_whole_if_a_user_was_set_up_elsewhere():
    """Set up in a child task, it may go from anywhere; its user, set up in the view, may not."""
    db = resource("db")
    user = resource("user", db)
    async with request_scope():
        await in_child(db)
        await user()
        with pytest.raises(AsyncResourceError, match="user"):
            await in_child(db.release)
        assert log == []
        await db.release()
        assert log == ["user 1", "db 1"]


async def test_what_a_child_task_set_up_may_be_released_by_any_task():
    tasks = []

    @request_scoped
    async def db():
        tasks.append(asyncio.current_task())
        async with asyncio.timeout(5):  # bound to its task
            yield
        tasks.append(asyncio.current_task())

    async with request_scope():
        await in_child(db)
        await in_child(db.release)
        await in_child(db)
        await db.release()
        await db()
        await db.release()
    assert tasks[0] is tasks[1]
    assert tasks[2] is tasks[3]
    assert tasks[4] is tasks[5] is asyncio.current_task()


async def test_what_a_thread_set_up_is_released_there():
    threads = []

    @request_scoped
    def tenant():
        threads.append(threading.get_ident())
        yield
        threads.append(threading.get_ident())

    user = resource("user", tenant)
    async with request_scope():
        await sync_to_async(tenant)()
        with pytest.raises(AsyncResourceError, match="where it was set up"):
            tenant.release()
        await sync_to_async(tenant.release)()
        assert threads[0] == threads[1] != threading.get_ident()
        # Async code waits for the thread.
        await sync_to_async(tenant)()
        await user()
        with pytest.raises(AsyncResourceError):
            await sync_to_async(tenant.release)()
        await user.release()
        await sync_to_async(tenant.release)()
        assert threads[2] == threads[3] == threads[0]


def test_sync_code_releases_nothing_while_another_thread_does():
    """It cannot know how long that takes. Promise 7: nothing is torn down out of order."""
    begun, go_on = threading.Event(), threading.Event()
    tenant = sync_resource("tenant")

    @request_scoped
    def other():
        yield
        begun.set()
        assert go_on.wait(30)
        log.append("other")

    def use_and_release():
        other()
        other.release()

    with request_scope():
        tenant()
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=[use_and_release])
        thread.start()
        assert begun.wait(30)
        with pytest.raises(AsyncResourceError, match="is being torn down right now"):
            tenant.release()
        assert log == []  # nothing has changed
        go_on.set()
        thread.join(30)
        tenant.release()
        assert log == ["other", "tenant 1"]


async def test_what_a_thread_set_up_with_an_async_one_goes_with_it_in_that_thread():
    threads = []
    db = resource("db")

    @request_scoped
    def query():
        db.get_nowait()
        threads.append(threading.get_ident())
        yield
        threads.append(threading.get_ident())
        log.append("query")

    async with request_scope():
        await db()
        await sync_to_async(query)()
        await db.release()
    assert log == ["query", "db 1"]
    assert threads[0] == threads[1] != threading.get_ident()


async def test_another_event_loop_cannot_release_it():
    db = resource("db")
    async with request_scope():
        await in_child(db)
        with pytest.raises(AsyncResourceError, match="this is another one"):
            await asyncio.to_thread(lambda: asyncio.run(db.release()))
        assert await db() == "db 1"


def test_a_lifespan_one_cannot_be_released():
    @lifespan_scoped
    async def pool():
        yield

    assert not hasattr(pool, "release")


# Many at once


async def test_released_by_two_tasks_at_once_it_is_torn_down_once_and_both_wait_for_it():
    paused = asyncio.Event()
    db = resource("db", pause=paused.wait)
    async with request_scope():
        await in_child(db)
        releases = [asyncio.create_task(db.release()) for _ in range(2)]
        await turns()
        assert not any(release.done() for release in releases)
        paused.set()
        await asyncio.gather(*releases)
        assert log == ["db 1"]


async def test_two_releases_keep_the_order_of_what_depends_on_each_other():
    """The user's teardown is under way, so what it uses must not go yet."""
    paused = asyncio.Event()
    db = resource("db")
    user = resource("user", db, pause=paused.wait)
    async with request_scope():
        await in_child(user)
        one = asyncio.create_task(user.release())
        await turns()
        two = asyncio.create_task(db.release())
        await turns()
        assert log == []
        paused.set()
        await asyncio.gather(one, two)
    assert log == ["user 1", "db 1"]


async def test_set_up_anew_while_it_goes_a_user_goes_too():
    """Else it would stand on what is gone."""
    paused = asyncio.Event()
    db = resource("db")
    user = resource("user", db, pause=paused.wait)
    async with request_scope():
        await in_child(user)
        release = asyncio.create_task(db.release())
        await turns()
        assert await in_child(user) == "user 2"  # with the db that is about to go
        paused.set()
        await release
        assert log == ["user 1", "user 2", "db 1"]
        assert await user() == "user 3"


async def test_it_ends_though_somebody_asks_for_it_again_and_again():
    db = resource("db", pause=turns)

    async def ask():
        while True:
            await db()
            await asyncio.sleep(0)

    async with request_scope():
        asking = asyncio.create_task(ask())
        await turns()
        await asyncio.wait_for(db.release(), 5)
        assert log == ["db 1"]
        asking.cancel()
        await asyncio.wait([asking])
    assert log == ["db 1", "db 2"]


async def test_a_user_that_the_owner_sets_up_meanwhile_stays_and_so_does_what_it_uses():
    paused = asyncio.Event()
    db = resource("db")
    user = resource("user", db, pause=paused.wait)
    async with request_scope():
        await in_child(user)
        release = asyncio.create_task(db.release())
        await turns()
        assert await user() == "user 2"
        paused.set()
        with pytest.raises(TeardownError) as caught:
            await release
        assert isinstance(caught.value.exceptions[0], AsyncResourceError)
        assert log == ["user 1"]
        assert [await user(), await db()] == ["user 2", "db 1"]
    assert log == ["user 1", "user 2", "db 1"]


async def test_while_somebody_sets_up_a_user_it_is_refused():
    arrived, go_on = asyncio.Event(), asyncio.Event()
    db = resource("db")

    async def wait():
        arrived.set()
        await go_on.wait()

    user = resource("user", db, wait)
    waiting = resource("waiting", user)
    async with request_scope():
        await in_child(db)
        setting_up = asyncio.create_task(waiting())
        await arrived.wait()
        with pytest.raises(AsyncResourceError, match=r"user.*is being set up with it"):
            await db.release()
        assert log == []
        go_on.set()
        await setting_up
        await db.release()
        assert log == ["waiting 1", "user 1", "db 1"]


async def test_the_end_of_the_scope_waits_for_a_release_and_takes_the_rest():
    paused = asyncio.Event()
    db, base = resource("db"), resource("base")
    user = resource("user", db, base, pause=paused.wait)
    async with request_scope():
        await in_child(user)
        release = asyncio.create_task(db.release())
        await turns()
        asyncio.get_running_loop().call_later(0.01, paused.set)
    assert log == ["user 1", "base 1", "db 1"]
    await release


async def test_the_end_of_the_scope_waits_for_a_release_though_nothing_is_left():
    paused = asyncio.Event()
    db = resource("db", pause=paused.wait)
    async with request_scope():
        await in_child(db)
        release = asyncio.create_task(db.release())
        await turns()
        asyncio.get_running_loop().call_later(0.01, paused.set)
    assert log == ["db 1"]
    await release


async def test_released_while_the_scope_closes_nothing_changes_its_order():
    db = resource("db")

    async def releases():
        await db.release()
        await db.release()

    user = resource("user", db, pause=releases)
    async with request_scope():
        await user()
    assert log == ["user 1", "db 1"]


async def test_what_lives_until_the_response_goes_before_what_another_task_releases():
    """Its COMMIT is under way."""
    arrived, committed = asyncio.Event(), asyncio.Event()

    async def commit():
        arrived.set()
        await committed.wait()

    db = resource("db")
    transaction = resource("transaction", db, until="response", pause=commit)
    releases = []

    @view
    async def spawns(request):
        await in_child(db)
        await transaction()

        async def release():
            await arrived.wait()
            await db.release()

        releases.append(asyncio.create_task(release()))
        return HttpResponse("ok")

    running = Connection(ScopedASGIHandler(), "/spawns").start()
    await arrived.wait()
    await turns()
    assert log == []
    committed.set()
    await running
    await releases[0]
    assert log == ["transaction 1", "db 1"]


@WHERE
async def test_a_boundary_teardown_may_release_what_it_uses(where):
    db = resource("db")

    async def give_back():
        await db.release()

    transaction = resource("transaction", db, until="response", pause=give_back)

    async def sent(number, message):
        log.append("sent")

    @view
    async def uses(request):
        await first_use(transaction, where)
        return HttpResponse("ok")

    await asyncio.wait_for(get("/uses", before_send=sent), 2)
    assert log == ["db 1", "transaction 1", "sent", "sent"]


async def test_a_response_waits_for_a_release_under_way():
    paused = asyncio.Event()
    db = resource("db")
    transaction = resource("transaction", db, until="response", pause=paused.wait)

    async def sent(number, message):
        log.append("sent")

    releases = []

    @view
    async def leaves(request):
        await in_child(transaction)
        releases.append(asyncio.create_task(db.release()))
        await turns()
        asyncio.get_running_loop().call_later(0.01, paused.set)
        return HttpResponse("ok")

    await get("/leaves", before_send=sent)
    await releases[0]
    assert log == ["transaction 1", "db 1", "sent", "sent"]


async def test_a_boundary_teardown_may_release_what_lives_until_the_response_too():
    inner = resource("inner", until="response")
    outer = resource("outer", inner, until="response", pause=inner.release)
    async with request_scope() as scope:
        await outer()
        await scope.end_response()
        assert log == ["inner 1", "outer 1"]


async def test_a_boundary_that_is_cancelled_waits_for_what_its_teardowns_have_left_behind():
    begun, go_on = asyncio.Event(), asyncio.Event()
    releases = []

    async def slow():
        begun.set()
        await go_on.wait()

    async def leaves():
        releases.append(asyncio.create_task(inner.release()))
        await begun.wait()

    inner = resource("inner", until="response", pause=slow)
    outer = resource("outer", until="response", pause=leaves)

    async def request():
        async with request_scope() as scope:
            await in_child(inner)
            await outer()
            with pytest.raises(asyncio.CancelledError):
                await scope.end_response()
            log.append("ended")

    running = asyncio.create_task(request())
    await begun.wait()
    await turns()
    running.cancel()
    await turns()
    assert log == ["outer 1"]
    go_on.set()
    await running
    await releases[0]
    assert log == ["outer 1", "inner 1", "ended"]


@pytest.mark.parametrize("until", ["response", None])
async def test_cancelled_while_it_waits_for_a_release_the_end_waits_on_and_then_says_so(until):
    """Of the response, or of the scope. Promise 8."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow():
        begun.set()
        await go_on.wait()

    db = resource("db", until=until, pause=slow)

    async def request():
        async with request_scope() as scope:
            await in_child(db)
            releases.append(asyncio.create_task(db.release()))
            await begun.wait()
            with pytest.raises(asyncio.CancelledError):
                await (scope.end_response() if until else scope.close())
            log.append("ended")

    releases = []
    running = asyncio.create_task(request())
    await begun.wait()
    await turns()
    running.cancel()
    await turns()
    assert log == []
    go_on.set()
    await running
    await releases[0]
    assert log == ["db 1", "ended"]


async def test_who_waits_for_a_release_may_be_cancelled_in_the_moment_it_ends():
    async def cancel():
        await turns()
        waiting.cancel()

    db, other = resource("db", pause=cancel), resource("other")
    async with request_scope():
        await db()
        await in_child(other)
        waiting = asyncio.create_task(other.release())
        await db.release()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert log == ["db 1"]
    assert log == ["db 1", "other 1"]


async def test_releases_take_their_turns_in_the_order_in_which_they_came():
    paused = asyncio.Event()
    first, last = resource("first", pause=paused.wait), resource("last")
    middle = resource("middle", pause=turns)
    async with request_scope():
        for one in (first, middle, last):
            await in_child(one)
        releases = [asyncio.create_task(one.release()) for one in (first, middle, last)]
        await turns()
        assert log == []
        paused.set()
        await asyncio.gather(*releases)
        assert log == ["first 1", "middle 1", "last 1"]


@pytest.mark.parametrize("when", ["while it waits", "as its turn comes"])
async def test_a_release_that_is_cancelled_leaves_its_turn_to_the_next(when):
    paused = asyncio.Event()
    one, two, three = resource("one", pause=paused.wait), resource("two"), resource("three")

    async def release_and_cancel():
        await one.release()
        if when == "as its turn comes":
            waiting.cancel()

    async with request_scope():
        for used in (one, two, three):
            await in_child(used)
        releasing = asyncio.create_task(release_and_cancel())
        await turns()
        waiting = asyncio.create_task(two.release())
        last = asyncio.create_task(three.release())
        await turns()
        if when == "while it waits":
            waiting.cancel()
        paused.set()
        async with asyncio.timeout(5):
            await releasing
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await last
        assert log == ["one 1", "three 1"]
        await two.release()  # whose turn it is as before
        assert log == ["one 1", "three 1", "two 1"]


async def test_a_teardown_may_ask_for_what_is_not_set_up_yet():
    late = resource("late")

    async def asks():
        assert await late() == "late 1"

    db = resource("db", pause=asks)
    async with request_scope():
        await db()
        await db.release()
        assert log == ["db 1"]
    assert log == ["db 1", "late 1"]


async def test_a_release_that_the_garbage_collector_ends_leaves_its_context_alone():
    db = resource("db", pause=asyncio.Event().wait)
    async with request_scope() as scope:
        await db()
        released = db.release()
        contextvars.copy_context().run(released.send, None)
        released.close()
        assert current_scope() is scope


# In requests


async def test_in_a_streaming_body():
    db = resource("db")

    @view
    async def streams(request):
        await db()

        async def body():
            yield await db()
            await db.release()
            assert log == ["db 1"]
            yield " "
            yield await db()

        return StreamingHttpResponse(body())

    assert (await get("/streams")).body == b"db 1 db 2"
    assert log == ["db 1", "db 2"]


async def test_in_a_sync_view():
    db, tenant = resource("db"), sync_resource("tenant")
    user = resource("user", db, tenant)

    @view
    def in_sync(request):
        tenant()
        async_to_sync(user)()
        async_to_sync(db.release)()
        assert log == ["user 1", "db 1"]
        tenant.release()
        assert log == ["user 1", "db 1", "tenant 1"]
        # Set up in this thread, by async code.
        async_to_sync(user)()
        with pytest.raises(AsyncResourceError):
            tenant.release()
        return HttpResponse("ok")

    assert (await get("/sync/in_sync")).body == b"ok"
    assert log[3:] == ["user 2", "tenant 2", "db 2"]


async def test_an_async_view_does_not_release_what_sync_code_has_just_torn_down():
    tenant = sync_resource("tenant")

    @view
    async def hops(request):
        await sync_to_async(tenant)()
        await sync_to_async(tenant.release)()
        await sync_to_async(tenant.release)()
        return HttpResponse(tenant())

    assert (await get("/hops")).body == b"tenant 2"
    assert log == ["tenant 1", "tenant 2"]


async def test_a_task_that_outlives_the_request_releases_nothing():
    db = resource("db")
    later = asyncio.Event()
    strays = []

    @view
    async def leaves(request):
        async def stray():
            await later.wait()
            await db.release()

        await db()
        strays.append(asyncio.create_task(stray()))
        return HttpResponse()

    await get("/leaves")
    later.set()
    await strays[0]
    assert log == ["db 1"]


# A real pool of one connection


async def test_a_pool_of_one_is_free_while_a_long_stream_goes_on_after_a_release(postgres_url):
    @lifespan_scoped
    async def pool():
        async with asyncpg.create_pool(postgres_url, min_size=0, max_size=1) as pool:
            yield pool

    @request_scoped
    async def db():
        async with (await pool()).acquire(timeout=0.5) as connection:
            yield connection

    @view
    async def streams(request):
        async def body():
            yield str(await (await db()).fetchval("SELECT 1"))
            if "release" in request.GET:
                await db.release()
            streaming.set()
            await over.wait()
            yield "."

        return StreamingHttpResponse(body())

    @view
    async def other(request):
        return HttpResponse(str(await (await db()).fetchval("SELECT 2")))

    async with lifespan_scope():
        for query, status in [(b"release", 200), (b"", 500)]:
            streaming, over = asyncio.Event(), asyncio.Event()
            stream = Connection(ScopedASGIHandler(), "/streams", query_string=query)
            task = stream.start()
            await streaming.wait()
            assert (await get("/other")).status == status
            over.set()
            await task
            assert stream.body == b"1."
        assert (await pool()).get_idle_size() == 1


# get_nowait()


async def test_sync_code_gets_what_is_set_up_already():
    db = resource("db")
    boundary = resource("boundary", until="response")

    @lifespan_scoped
    async def pool():
        return "pool"

    async with lifespan_scope(), request_scope():
        await in_child(db)
        await boundary()
        await pool()

        def sync():
            return [db.get_nowait(), boundary.get_nowait(), pool.get_nowait()]

        assert sync() == ["db 1", "boundary 1", "pool"]
        assert await sync_to_async(sync)() == sync()
        assert await asyncio.to_thread(sync) == sync()


async def test_what_is_not_set_up_yet_says_so_and_is_not_begun():
    db = resource("db")
    async with request_scope():
        with pytest.raises(AsyncResourceError, match="has not been set up yet") as caught:
            db.get_nowait()
        assert "Await it before" in str(caught.value)
        assert numbers == {}
        await db()
        await db.release()
        with pytest.raises(AsyncResourceError):
            db.get_nowait()


async def test_without_a_scope_or_after_its_end_it_is_as_for_any_use():
    db = resource("db")
    with pytest.raises(NoScopeError):
        db.get_nowait()
    later = asyncio.Event()

    async def stray():
        await later.wait()
        return db.get_nowait()

    async with request_scope():
        await db()
        task = asyncio.create_task(stray())
        await turns()
    later.set()
    with pytest.raises(ScopeClosedError):
        await task


def test_without_an_event_loop_it_says_what_it_needs():
    db = resource("db")
    with request_scope():
        with pytest.raises(AsyncResourceError, match="no event loop to keep it in") as caught:
            db.get_nowait()
    assert "serve the project over ASGI" in str(caught.value)


async def test_a_teardown_may_ask_for_it_too():
    db = resource("db")

    @request_scoped
    def query():
        db.get_nowait()
        yield
        log.append(f"query of {db.get_nowait()}")

    async with request_scope():
        await db()
        query()
    assert log == ["query of db 1", "db 1"]
