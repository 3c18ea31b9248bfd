"""Trap 16 and promise 17: what can be a factory, and what is refused in which words."""

import asyncio
import functools
import inspect
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from scoped import (
    FactoryError,
    TeardownError,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from tests.tables import what_is_kept

DECORATORS = pytest.mark.parametrize("declare", [request_scoped, lifespan_scoped])


class Connection:
    pass


class Callable:
    async def __call__(self) -> str:
        return "value"


class TestTheFourKinds:
    async def test_each_gives_its_value(self) -> None:
        @request_scoped
        def function() -> str:
            return "function"

        @request_scoped
        def generator() -> Iterator[str]:
            yield "generator"

        @request_scoped
        async def coroutine_function() -> str:
            return "coroutine function"

        @request_scoped
        async def async_generator() -> AsyncIterator[str]:
            yield "async generator"

        async with request_scope():
            assert function() == "function"
            assert generator() == "generator"
            assert await coroutine_function() == "coroutine function"
            assert await async_generator() == "async generator"
        for resource in (function, generator, coroutine_function, async_generator):
            factory = resource.resource.factory  # type: ignore[attr-defined]
            assert factory.kind == resource.__name__.replace("_", " ")  # type: ignore[attr-defined]
            assert factory.is_async is factory.kind.startswith(("async", "coroutine"))

    async def test_a_default_a_star_and_a_bound_method_need_no_argument(self) -> None:
        class Service:
            async def connect(self, host: str = "localhost", *args: str, **kwargs: str) -> str:
                return host

        connect = request_scoped(Service().connect)
        name = request_scoped(lambda: "lambda")
        async with request_scope():
            assert await connect() == "localhost"
            assert name() == "lambda"

    def test_a_builtin_may_tell_nothing_of_its_parameters(self) -> None:
        now = request_scoped(time.time)
        with request_scope():
            assert now() == now() > 0

    def test_the_decorated_function_looks_like_the_factory(self) -> None:
        @request_scoped
        async def db() -> str:
            """A connection."""
            return "db"

        @lifespan_scoped(eager=False)
        def settings() -> str:
            return "settings"

        for function, name in ((db, "db"), (settings, "settings")):
            assert function.__name__ == name  # type: ignore[attr-defined]
            assert function.__qualname__.endswith(f"<locals>.{name}")  # type: ignore[attr-defined]
            assert function.__module__ == __name__
            assert f"<locals>.{name} ({__file__}:" in str(function.resource)  # type: ignore[attr-defined]
        assert db.__doc__ == "A connection."
        assert inspect.iscoroutinefunction(db)
        assert not inspect.iscoroutinefunction(settings)

    def test_with_empty_parentheses_it_is_the_same(self) -> None:
        @request_scoped()
        def tenant() -> str:
            return "tenant"

        with request_scope():
            assert tenant() == "tenant"


class TestRefused:
    @DECORATORS
    def test_a_class(self, declare: Any) -> None:
        with pytest.raises(FactoryError, match=r"return Connection\(\.\.\.\)") as caught:
            declare(Connection)
        assert f"{__name__}.Connection is a class" in str(caught.value)

    @DECORATORS
    @pytest.mark.parametrize("thing", [Callable(), functools.partial(int, "3"), "text"])
    def test_an_object_that_is_no_function(self, declare: Any, thing: object) -> None:
        with pytest.raises(FactoryError, match=r"is not a function.*async def") as caught:
            declare(thing)
        assert repr(thing) in str(caught.value)

    @DECORATORS
    def test_a_required_parameter(self, declare: Any) -> None:
        async def db(request: object, *, timeout: float = 1) -> None: ...

        def keyword(*, host: str) -> None: ...

        with pytest.raises(FactoryError, match=r"'request'.*in its body"):
            declare(db)
        with pytest.raises(FactoryError, match=r"'host'.*a default"):
            declare(keyword)

    @DECORATORS
    def test_a_context_manager(self, declare: Any) -> None:
        @asynccontextmanager
        async def connect() -> AsyncIterator[None]:
            yield

        @contextmanager
        def sync_connect() -> Iterator[None]:
            yield

        for factory in (connect, sync_connect):
            with pytest.raises(FactoryError, match="without @contextmanager") as caught:
                declare(factory)
            assert factory.__qualname__ in str(caught.value)


class TestFoundOutWhenItRuns:
    @pytest.mark.parametrize("where", ["owner", "child"])
    async def test_a_generator_that_yields_never(self, where: str) -> None:
        @request_scoped
        async def never() -> AsyncIterator[None]:
            if False:
                yield

        @request_scoped
        def sync_never() -> Iterator[None]:
            if False:
                yield

        async with request_scope() as scope:
            with pytest.raises(FactoryError, match=r"never .*without a `yield`"):
                await (never() if where == "owner" else asyncio.create_task(never()))
            with pytest.raises(FactoryError, match=r"sync_never .*without a `yield`"):
                sync_never()
            assert what_is_kept(scope) == []

    async def test_a_generator_that_yields_twice(self) -> None:
        log: list[str] = []

        @request_scoped
        async def twice() -> AsyncIterator[int]:
            yield 1
            try:
                yield 2
            finally:
                log.append("closed")

        @request_scoped
        def sync_twice() -> Iterator[int]:
            yield 1
            try:
                yield 2
            finally:
                log.append("sync closed")
                raise KeyError("while it was closed")

        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                assert await twice() == 1
                assert sync_twice() == 1
        assert log == ["sync closed", "closed"]
        first, second = caught.value.exceptions
        assert isinstance(first, FactoryError)
        assert isinstance(first.__cause__, KeyError)
        assert "sync_twice" in str(first)
        assert isinstance(second, FactoryError)
        assert "more than once" in str(second)

    def test_a_sync_function_that_returns_a_coroutine(self) -> None:
        async def connect() -> str:
            return "connection"

        @request_scoped
        def db() -> Any:
            return connect()

        with request_scope(), pytest.raises(FactoryError, match=r"db .*`async def`"):
            db()

    def test_a_coroutine_that_is_awaited_twice_is_as_in_python(self) -> None:
        @request_scoped
        async def db() -> str:
            return "db"

        async def main() -> None:
            async with request_scope():
                asking = db()
                assert await asking == "db"
                with pytest.raises(RuntimeError, match="cannot reuse"):
                    await asking

        asyncio.run(main())
