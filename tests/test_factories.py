"""Trap 16 and promise 17: what can be a factory, and what is refused in which words."""

import asyncio
import functools
import inspect
import sys
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

    def test_one_that_is_wrapped_in_itself_is_taken_as_it_is(self) -> None:
        def number() -> int:
            return 1

        number.__wrapped__ = number  # type: ignore[attr-defined]
        declared = request_scoped(number)
        assert number.__qualname__ in str(declared.resource)
        with request_scope():
            assert declared() == 1

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
    @pytest.mark.parametrize("thing", [Callable(), "text"])
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

    @pytest.mark.parametrize("fails", [False, True], ids=["well", "badly"])
    async def test_also_after_its_teardown_has_waited(self, fails: bool) -> None:
        log: list[str] = []

        @request_scoped
        async def twice() -> AsyncIterator[int]:
            yield 1
            await asyncio.sleep(0)
            try:
                yield 2
            finally:
                log.append("closed")
                if fails:
                    raise KeyError("while it was closed")

        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                assert await twice() == 1
        assert log == ["closed"]
        [error] = caught.value.exceptions
        assert isinstance(error, FactoryError)
        assert "more than once" in str(error)
        assert isinstance(error.__cause__, KeyError) is fails

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


def hides_its_kind(function: Any) -> Any:
    """A decorator that has forgotten functools.wraps()."""

    def inner() -> Any:
        return function()

    return inner


class TestPartial:
    """Of a factory, on every Python in the same way."""

    async def test_of_each_kind_it_is_a_factory(self) -> None:
        log: list[str] = []

        async def async_generator(name: str) -> AsyncIterator[str]:
            yield name
            log.append(f"-{name}")

        async def coroutine_function(name: str) -> str:
            return name

        def generator(name: str) -> Iterator[str]:
            yield name
            log.append(f"-{name}")

        def function(name: str) -> str:
            return name

        functions = (async_generator, coroutine_function, generator, function)
        one, two, three, four = [
            request_scoped(functools.partial(of, of.__name__)) for of in functions
        ]
        async with request_scope():
            assert [await one(), await two(), three(), four()] == [f.__name__ for f in functions]
        assert log == ["-generator", "-async_generator"]
        assert one.resource.factory.kind == "async generator"

    def test_it_is_named_as_its_function_or_as_it_says(self) -> None:
        def connect(to: str) -> str:
            return to

        primary = functools.partial(connect, to="primary")
        assert str(request_scoped(primary).resource) == (
            f"{__name__}.{connect.__qualname__} ({__file__}:{connect.__code__.co_firstlineno})"
        )
        primary.__name__ = "primary"  # type: ignore[attr-defined]
        declared = request_scoped(primary)
        assert str(declared.resource).startswith(f"{__name__}.primary ({__file__}:")
        assert declared.__name__ == "primary"  # type: ignore[attr-defined]

    @DECORATORS
    def test_that_leaves_an_argument_open_is_refused(self, declare: Any) -> None:
        def connect(to: str, *, port: int) -> None: ...

        with pytest.raises(FactoryError, match=r"connect .*needs an argument, 'port'"):
            declare(functools.partial(connect, "primary"))

    @DECORATORS
    @pytest.mark.parametrize("thing", [functools.partial(Connection), functools.partial(int, "3")])
    def test_of_a_class_is_refused_as_the_class_is(self, declare: Any, thing: object) -> None:
        with pytest.raises(FactoryError, match="is not a function"):
            declare(thing)


class TestDecoratedFactories:
    def test_a_static_method_is_a_factory_while_its_class_is_made(self) -> None:
        class Resources:
            @request_scoped
            @staticmethod
            def tenant() -> Iterator[str]:
                yield "tenant"

        with request_scope():
            assert Resources.__dict__["tenant"]() == "tenant"
            assert Resources.tenant() == Resources().tenant() == "tenant"
        assert str(Resources.tenant.resource).startswith(f"{__name__}.")
        with pytest.raises(FactoryError, match="is a resource already"):
            lifespan_scoped(Resources.__dict__["tenant"])

    @DECORATORS
    def test_a_class_method_is_refused(self, declare: Any) -> None:
        with pytest.raises(FactoryError, match="is not a function"):
            declare(classmethod(lambda cls: 1))

    @DECORATORS
    def test_a_resource_declared_upon_a_resource_is_refused(self, declare: Any) -> None:
        @declare
        async def db() -> str:
            return "db"

        with pytest.raises(FactoryError, match="is a resource already, and @request_scoped") as got:
            request_scoped(db)
        assert str(db.resource) in str(got.value)
        with pytest.raises(FactoryError, match=r"@request_scoped\(until=\"response\"\) was put"):
            request_scoped(until="response")(db)
        with pytest.raises(FactoryError, match=r"@lifespan_scoped\(eager=True\) was put"):
            lifespan_scoped(eager=True)(db)

    async def test_what_is_wrapped_around_a_resource_may_be_a_factory(self) -> None:
        @request_scoped
        async def number() -> int:
            return 1

        @request_scoped
        @functools.wraps(number)
        async def double() -> int:
            return 2 * await number()

        async with request_scope():
            assert await double() == 2

    def test_the_place_is_that_of_the_users_function_not_of_its_decorator(self) -> None:
        def retried(function: Any) -> Any:
            @functools.wraps(function)
            async def inner() -> Any:
                return await function()

            return inner

        @request_scoped
        @retried
        async def db() -> str:
            return "db"

        @contextmanager
        def connect() -> Iterator[None]:
            yield

        line = db.resource.factory.function.__code__.co_firstlineno
        assert (
            inspect.getsource(db.resource.factory.function).lstrip().startswith("@request_scoped")
        )
        assert str(db.resource).endswith(f".db ({__file__}:{line})")
        with pytest.raises(FactoryError) as caught:
            request_scoped(connect)
        assert f"({__file__}:" in str(caught.value)
        assert "contextlib" not in str(caught.value)

    async def test_a_generator_that_a_decorator_hides_is_found_out_and_closed(self) -> None:
        log: list[str] = []

        async def async_generator() -> AsyncIterator[str]:
            log.append("begun")
            yield "value"

        def generator() -> Iterator[str]:
            log.append("begun")
            yield "value"

        async def begun() -> Any:
            made = async_generator_that_logs()
            await made.__anext__()
            return made

        async def async_generator_that_logs() -> AsyncIterator[str]:
            try:
                yield "value"
            finally:
                await asyncio.sleep(0)
                log.append("closed")

        hidden = request_scoped(hides_its_kind(async_generator))
        hidden_sync = request_scoped(hides_its_kind(generator))
        async with request_scope() as scope:
            for resource, kind, name in (
                (hidden, "an async generator", "async_generator"),
                (hidden_sync, "a generator", "generator"),
            ):
                with pytest.raises(
                    FactoryError, match=f"returned {kind}, of .*{name} .*, which nobody"
                ) as caught:
                    resource()
                assert str(resource.resource) in str(caught.value)
            with pytest.raises(FactoryError, match="returned an async generator"):
                await request_scoped(begun)()
            assert what_is_kept(scope) == []
        assert log == ["closed"]

    async def test_a_coroutine_that_a_factory_gives_is_found_out_and_closed(self) -> None:
        async def connect() -> None: ...

        async def later() -> Any:
            return connect()

        hidden, twice = request_scoped(hides_its_kind(connect)), request_scoped(later)
        async with request_scope():
            with pytest.raises(FactoryError, match=r"coroutine, of .*connect .*Write `async def`"):
                hidden()
            with pytest.raises(FactoryError, match=r"later .*returned a coroutine"):
                await twice()


class TestAnnotations:
    @DECORATORS
    def test_one_that_is_for_the_type_checker_alone_is_not_evaluated(self, declare: Any) -> None:
        # As Python 3.14 has them all (PEP 649), and the others those of a __future__ import.
        source = (
            "def tenant(name: Missing = 1) -> Missing.of[Missing]: return 1\n"
            "async def db(name: Missing = 1) -> Missing: yield 1\n"
        )
        if sys.version_info < (3, 14):
            source = "from __future__ import annotations\n" + source
        made: dict[str, Any] = {"__name__": __name__}
        exec(source, made)  # noqa: S102 (ours)
        assert declare(made["tenant"]).resource.factory.kind == "function"
        assert declare(functools.partial(made["db"])).resource.factory.kind == "async generator"


class TestRepr:
    def test_it_says_what_it_is(self) -> None:
        async def db() -> None: ...

        name = f"{__name__}.{db.__qualname__}"
        for made_by, made in {
            "request_scoped": request_scoped(db),
            'request_scoped(until="response")': request_scoped(until="response")(db),
            "lifespan_scoped": lifespan_scoped(db),
        }.items():
            assert repr(made).startswith(f"<function {made_by} {name} at 0x")
            assert made.__name__ == "db"  # type: ignore[attr-defined]
            assert inspect.iscoroutinefunction(made)

    async def test_a_coroutine_that_was_not_awaited_says_of_what(self) -> None:
        @request_scoped
        async def db() -> None: ...

        coroutine = db()
        assert f"request_scoped {db.resource.factory.name}" in repr(coroutine)
        coroutine.close()

    def test_a_recipe_has_a_short_one_too(self) -> None:
        @request_scoped
        def tenant() -> None: ...

        assert repr(tenant.resource) == f"<Resource {tenant.resource}>"
        assert repr(tenant.resource.factory) == f"<Factory {tenant.resource}>"
