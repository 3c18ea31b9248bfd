"""Every error says what happened, then what to do, and names its resource and where it is."""

import asyncio
import contextvars
import inspect
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

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
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.core import errors as exceptions


@request_scoped
async def db() -> AsyncIterator[str]:
    yield "db"


def test_every_error_is_public_and_in_the_tree_and_fits_a_builtin() -> None:
    errors = {
        name: thing
        for name, thing in vars(exceptions).items()
        if inspect.isclass(thing) and issubclass(thing, ScopedError)
    }
    assert set(errors) <= set(exceptions.__all__)
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
        "with scoped.asgi.get_asgi_application(). Anywhere else (a command, a task, a test): open "
        "one with `async with request_scope():`."
    )
    with pytest.raises(NoScopeError, match=r"^current_scope\(\) was called where no") as caught_too:
        scoped.current_scope()
    assert caught_too.value.resource is None


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
    assert "open a scope of its own with `async with request_scope():`" in str(error)


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
