"""Every error says what happened, then what to do, and names its resource and where it is."""

import asyncio
import contextvars
import copy
import inspect
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async

import scoped
from scoped import (
    AsyncResourceError,
    CircularResourceError,
    FactoryError,
    LifetimeError,
    NoScopeError,
    ScopeClosedError,
    ScopedError,
    TeardownError,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.core import errors as exceptions
from scoped.core.current import as_current
from scoped.core.scope import Scope


@request_scoped
async def db() -> AsyncIterator[str]:
    yield "db"


def test_every_error_is_public_and_in_the_tree_and_fits_a_builtin() -> None:
    errors = {
        name: thing
        for name, thing in vars(exceptions).items()
        if inspect.isclass(thing) and issubclass(thing, ScopedError)
    }
    assert set(errors) == {name for name in exceptions.__all__ if name.endswith("Error")}
    assert set(errors) <= set(scoped.__all__)
    assert exceptions.__doc__ is not None
    for name, error in errors.items():
        assert name in exceptions.__doc__
        if error is not ScopedError:
            builtin = error.__bases__[1]
            assert f"({builtin.__name__})" in next(
                line for line in exceptions.__doc__.splitlines() if name in line
            )


def test_all_that_is_exported_is_there() -> None:
    assert sorted(scoped.__all__) == list(scoped.__all__)
    for name in scoped.__all__:
        assert hasattr(scoped, name)


def test_a_resource_names_where_it_was_declared() -> None:
    name, _, place = str(db.resource).partition(" (")
    assert name == "tests.test_errors.db"
    path, _, line = place.rstrip(")").rpartition(":")
    assert path == __file__
    source = Path(__file__).read_text()
    assert source.splitlines()[int(line) - 1 : int(line) + 1] == [
        "@request_scoped",
        "async def db() -> AsyncIterator[str]:",
    ]


async def test_no_scope_error() -> None:
    with pytest.raises(LookupError) as caught:
        await db()
    error = caught.value
    assert isinstance(error, NoScopeError)
    assert error.resource is db.resource
    assert str(error) == (
        f"{db.resource} was used where no request scope is open. In a request: serve the project "
        "with scoped.asgi.get_asgi_application(). If it is, this was started by what does not know "
        "of the request, as asyncio.run_coroutine_threadsafe() in a thread of your own: start it "
        "in the request's own tasks. Anywhere else (a command, a task, a test): open one with "
        "`async with request_scope():`."
    )
    with pytest.raises(NoScopeError, match=r"^current_scope\(\) was called where no") as caught_too:
        scoped.current_scope()
    assert caught_too.value.resource is None


def test_no_scope_error_in_sync_code() -> None:
    @request_scoped
    def tenant() -> str:
        return "tenant"

    for used in (tenant, scoped.current_scope):
        with pytest.raises(NoScopeError, match="no request scope is open") as caught:
            used()
        assert str(caught.value).endswith(
            "open one with `with request_scope():`, or `async with` in async code."
        )
    with request_scope():
        assert tenant() == "tenant"


async def test_no_scope_error_in_a_thread_of_ones_own() -> None:
    @request_scoped
    def tenant() -> str:
        return "tenant"

    async with request_scope():
        assert tenant() == "tenant"
        nowhere = contextvars.Context()  # Python 3.14 may let threads inherit the starter's
        with ThreadPoolExecutor(1, "mine\n") as executor:
            with pytest.raises(NoScopeError, match="no request scope is open") as caught:
                nowhere.run(executor.submit, tenant).result()
            assert executor.submit(contextvars.copy_context().run, tenant).result() == "tenant"
        message = str(caught.value)
        assert r"an executor of yours has started, as 'mine\n_0' may be, does not" in message
        assert "use asyncio.to_thread() or sync_to_async(), or" in message
        assert await asyncio.to_thread(tenant) == "tenant"


async def test_no_scope_error_of_an_async_resource_in_a_thread_of_ones_own() -> None:
    """What helps sync resources there, would only lead to another error here."""
    async with request_scope():
        nowhere = contextvars.Context()
        with ThreadPoolExecutor(1) as executor:
            with pytest.raises(NoScopeError, match="no request scope is open") as caught:
                nowhere.run(executor.submit, async_to_sync(db)).result()
        message = str(caught.value)
        assert "asyncio.to_thread" not in message
        assert "run your sync code with sync_to_async(), in which async_to_sync()" in message
        assert await sync_to_async(async_to_sync(db))() == "db"


async def test_no_scope_error_of_a_lifespan_resource() -> None:
    @lifespan_scoped
    async def pool() -> str:
        return "pool"

    with pytest.raises(NoScopeError, match="where no lifespan scope is open") as caught:
        await pool()
    assert "open it with `async with lifespan_scope():`" in str(caught.value)
    async with lifespan_scope():
        assert await pool() == "pool"


async def test_scope_closed_error() -> None:
    async with request_scope() as scope:
        context = contextvars.copy_context()
    with pytest.raises(RuntimeError) as caught:
        await context.run(asyncio.create_task, db())
    error = caught.value
    assert isinstance(error, ScopeClosedError)
    assert error.resource is db.resource
    assert error.scope == "the request scope"
    assert error.scope is not scope
    assert str(db.resource) in str(error)
    assert "start it with `spawn()`, which gives it a scope of its own" in str(error)


async def test_scope_closed_error_in_a_teardown() -> None:
    caught: list[ScopeClosedError] = []

    @request_scoped
    async def late() -> AsyncIterator[None]:
        yield
        try:
            await db()
        except ScopeClosedError as error:
            caught.append(error)

    async with request_scope():
        await late()
    [error] = caught
    assert str(error).endswith("set up nothing more: ask for it before the `yield`.")
    async with request_scope():
        await db()
        await late()
    assert len(caught) == 1  # what is set up is there


def test_scope_closed_error_in_a_thread_that_is_no_teardown() -> None:
    """It comes while the scope closes, in sync code, where no task says who is who."""
    answers: list[ScopeClosedError] = []

    @request_scoped
    def other() -> None: ...

    def asks() -> None:
        with pytest.raises(ScopeClosedError) as caught:
            other()
        answers.append(caught.value)

    @request_scoped
    def slow() -> Iterator[None]:
        yield
        thread = threading.Thread(target=contextvars.copy_context().run, args=(asks,))
        thread.start()
        thread.join()
        asks()

    with request_scope():
        slow()
    stray, own = answers
    assert "finish the work before the request ends" in str(stray)
    assert "ask for it before the `yield`" in str(own)


async def test_scope_closed_error_of_a_lifespan() -> None:
    caught: list[ScopeClosedError] = []

    @lifespan_scoped
    async def cache() -> str:
        return "cache"

    @lifespan_scoped
    async def pool() -> AsyncIterator[None]:
        yield
        try:
            await cache()
        except ScopeClosedError as error:
            caught.append(error)

    async with lifespan_scope():
        await pool()
    [error] = caught
    assert "set up nothing more" in str(error)


async def test_circular_resource_error() -> None:
    @request_scoped
    async def circle() -> object:
        return await circle()

    async with request_scope():
        with pytest.raises(RuntimeError) as caught:
            await circle()
    error = caught.value
    assert isinstance(error, CircularResourceError)
    assert error.circle == (circle.resource, circle.resource)
    assert f"{circle.resource} -> {circle.resource}. Break the circle" in str(error)


async def test_lifetime_error() -> None:
    @lifespan_scoped
    async def pool() -> object:
        return await db()

    async with request_scope():
        with pytest.raises(RuntimeError) as caught:
            await pool()
    error = caught.value
    assert isinstance(error, LifetimeError)
    assert (error.resource, error.needed) == (pool.resource, db.resource)
    message = f"{pool.resource}, whose lifetime is the lifespan's, asked for {db.resource}"
    assert message in str(error)


async def test_lifetime_error_in_a_task_that_a_factory_has_left_running() -> None:
    @lifespan_scoped
    async def consumer() -> AsyncIterator["asyncio.Task[str]"]:
        async def consume() -> str:
            await is_set_up.wait()
            async with request_scope():
                value = await db()
            await db()
            return value

        is_set_up = asyncio.Event()
        task = asyncio.create_task(consume())
        asyncio.get_running_loop().call_soon(is_set_up.set)
        yield task

    async with lifespan_scope():
        task = await consumer()
        with pytest.raises(LifetimeError) as caught:
            await task
    error = caught.value
    assert (error.resource, error.needed) == (consumer.resource, db.resource)
    assert str(error).startswith(f"A task that the factory of {consumer.resource} has left running")
    assert "with `async with request_scope():`" in str(error)


@pytest.mark.parametrize("is_async", [True, False])
async def test_lifetime_error_in_a_teardown(is_async: bool) -> None:
    @lifespan_scoped
    async def pool() -> AsyncIterator[None]:
        yield
        await db()

    @request_scoped
    def tenant() -> str:
        return "tenant"

    @lifespan_scoped
    def sync_pool() -> Iterator[None]:
        yield
        try:
            tenant()
        finally:
            with request_scope():  # as the message says
                assert tenant() == "tenant"

    with pytest.raises(TeardownError) as caught:
        async with lifespan_scope():
            await pool() if is_async else sync_pool()
    [error] = caught.value.exceptions
    assert isinstance(error, LifetimeError)
    asker, needed = (pool, db) if is_async else (sync_pool, tenant)
    opening = "`async with request_scope():`" if is_async else "`with request_scope():`, or"
    assert str(error).startswith(
        f"The teardown of {asker.resource} asked for {needed.resource}, whose lifetime is the "
        f"request's: it is part of none. Open a scope in it, with {opening}"
    )


async def test_no_scope_error_in_a_lifespan_block_inside_a_request() -> None:
    async with request_scope():
        async with lifespan_scope():
            with pytest.raises(NoScopeError) as caught:
                await db()
            async with request_scope():
                assert await db() == "db"
        assert await db() == "db"
    assert str(caught.value) == (
        f"{db.resource} was used where no request scope is open. In a `lifespan_scope()` block the "
        "request around it does not count: ask for it before the block, or open one in it with "
        "`async with request_scope():`. For a request that is served meanwhile: serve the project "
        "with scoped.asgi.get_asgi_application()."
    )


async def raised(call: Any) -> ScopedError:
    try:
        await call()
    except ScopedError as error:
        return error
    raise AssertionError("nothing was raised")


async def of_every_kind() -> list[ScopedError]:
    """Of resources that only this process has."""

    @request_scoped
    async def local() -> AsyncIterator[None]:
        yield
        raise OSError("broken")

    @lifespan_scoped
    async def pool() -> None:
        await local()

    @request_scoped(keyed=True)
    async def circle(key: object) -> None:
        await circle(key)

    @request_scoped
    async def never() -> AsyncIterator[None]:
        if never is None:
            yield

    async def tears_down() -> None:
        async with request_scope():
            await local()

    errors = [ScopedError("plain"), await raised(local), await raised(tears_down)]
    async with request_scope() as scope:
        errors += [await raised(one) for one in (pool, partial(circle, object()), never)]
    errors.append(await raised(lambda: set_up_in(local, scope)))
    with request_scope():
        errors.append(await raised(local))
    return errors


async def set_up_in(resource: Any, scope: Any) -> None:
    with as_current(scope):
        await resource()


def sent(error: Any, protocol: int | None = None) -> Any:
    return pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 (it is our own)


async def test_every_error_goes_to_another_process_with_its_words() -> None:
    errors = await of_every_kind()
    kinds = {getattr(exceptions, name) for name in exceptions.__all__ if name.endswith("Error")}
    assert {type(error) for error in errors} == kinds
    for error in errors:
        error.add_note("a note")
        copies = [sent(error, number) for number in range(6)]
        for copied in (*copies, copy.copy(error), sent(copies[-1])):
            assert (type(copied), str(copied)) == (type(error), str(error))
            assert vars(copied).keys() == vars(error).keys()
            assert copied.__notes__ == error.__notes__
            for name in ("resource", "needed", "scope", "reason", "problem"):
                assert str(getattr(copied, name, None)) == str(getattr(error, name, None))
            if isinstance(error, CircularResourceError):
                assert copied.circle == tuple(map(str, error.circle))
            if isinstance(error, TeardownError):
                assert list(map(repr, copied.exceptions)) == ["OSError('broken')"]
                assert copied.exceptions[0].__notes__ == error.exceptions[0].__notes__
                assert copied.split(OSError)[0].scope == error.scope
    assert sent(NoScopeError()).resource is None


async def test_a_circle_of_many_keys_has_a_message_of_few() -> None:
    @request_scoped(keyed=True)
    async def step(number: int) -> object:
        return await step((number + 1) % 40)

    async with request_scope():
        with pytest.raises(CircularResourceError) as caught:
            await step(0)
    assert len(caught.value.circle) == 41
    assert str(caught.value).count("step") == 12
    assert " -> ... 29 more ... -> " in str(caught.value)


def test_async_resource_error() -> None:
    with request_scope(), pytest.raises(RuntimeError) as caught:
        asyncio.run(db())
    error = caught.value
    assert isinstance(error, AsyncResourceError)
    assert error.resource is db.resource
    assert error.scope == "the request scope"
    assert error.reason in str(error)
    assert str(error).startswith(f"{db.resource} cannot be used here: ")
    assert "plain `def`" in str(error)


def test_factory_error() -> None:
    with pytest.raises(TypeError) as caught:
        request_scoped(FactoryError)
    error = caught.value
    assert isinstance(error, FactoryError)
    assert error.resource == "scoped.core.errors.FactoryError"
    assert error.problem == "is a class, so it cannot be a factory"


async def test_teardown_error_can_be_split_like_any_group() -> None:
    @request_scoped
    async def one() -> AsyncIterator[None]:
        yield
        raise ValueError("one")

    @request_scoped
    async def two() -> AsyncIterator[None]:
        yield
        raise KeyError("two")

    seen: list[BaseException] = []
    try:
        async with request_scope():
            await one()
            await two()
    except* ValueError as group:
        seen.append(group)
    except* KeyError as group:
        seen.append(group)
    first, second = seen
    for error, resource in ((first, one), (second, two)):
        assert isinstance(error, TeardownError)
        assert isinstance(error, ExceptionGroup)
        assert error.scope == "the request scope"
        assert error.exceptions[0].__notes__ == [f"while {resource.resource} was torn down"]
        assert "1 resource(s) of the request scope failed" in str(error)


async def test_a_teardown_that_takes_too_long_at_shutdown_says_what_a_pool_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Scope, "teardown_timeout", 0.01)

    @lifespan_scoped
    async def pool() -> AsyncIterator[None]:
        yield
        await asyncio.Event().wait()

    @request_scoped
    async def slow() -> AsyncIterator[None]:
        yield
        await asyncio.Event().wait()

    with pytest.raises(TeardownError) as caught:
        async with lifespan_scope():
            await pool()
    [error] = caught.value.exceptions
    assert isinstance(error, TimeoutError)
    assert f"{pool.resource} took longer than 0.01 seconds to be torn down. A pool waits" in str(
        error
    )
    assert "by a task that outlives its request" in str(error)
    with pytest.raises(TeardownError) as caught:
        async with request_scope():
            await slow()
    assert "Make it faster" in str(caught.value.exceptions[0])
