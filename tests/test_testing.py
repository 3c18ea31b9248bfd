"""The kit for users' tests: ``override()``, the clients, ``assert_no_leaks()``."""

import asyncio
import functools
import gc
import unittest
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import aclosing
from inspect import isasyncgenfunction, isgeneratorfunction
from typing import Any
from unittest import mock

import pytest
from asgiref.sync import async_to_sync
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished, request_started
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import SimpleTestCase, override_settings

from scoped import (
    AsyncResourceError,
    FactoryError,
    ScopeClosedError,
    current_scope,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
    spawn,
)
from scoped.asgi import ScopedASGIHandler
from scoped.testing import AsyncClient, Client, assert_no_leaks, override
from tests.connection import Connection
from tests.views import Views

log: list[str] = []
view = Views()
urlpatterns = view.urlpatterns


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    log.clear()
    with override_settings(ROOT_URLCONF=__name__):
        yield


@lifespan_scoped
async def pool() -> AsyncIterator[str]:
    log.append("+pool")
    yield "pool"
    log.append("-pool")


@request_scoped
async def db() -> AsyncIterator[str]:
    log.append("+db")
    try:
        yield f"db of {await pool()}"
    except BaseException as error:
        log.append(f"db saw {type(error).__name__}")
        raise
    finally:
        log.append("-db")


@lifespan_scoped
def settings_of_tenants() -> Iterator[str]:
    log.append("+settings")
    yield "settings"
    log.append("-settings")


@request_scoped
def tenant() -> Iterator[str]:
    settings_of_tenants()
    log.append("+tenant")
    try:
        yield "tenant"
    except BaseException as error:
        log.append(f"tenant saw {type(error).__name__}")
        raise
    finally:
        log.append("-tenant")


class TestOverride:
    async def test_a_value_stands_in(self) -> None:
        async with request_scope():
            with override(db, "a fake"):
                assert await db() == "a fake"
            assert await db() == "db of pool"

    async def test_a_mock_is_a_value_though_it_can_be_called(self) -> None:
        fake = mock.Mock()
        with override(db, fake):
            async with request_scope():
                assert await db() is fake
        fake.assert_not_called()

    async def test_a_factory_of_any_kind_stands_in_and_is_torn_down_with_its_scope(self) -> None:
        async def coroutine_function() -> str:
            return "coroutine function"

        def function() -> str:
            return "function"

        async def async_generator() -> AsyncIterator[str]:
            yield "async generator"
            log.append("-async generator")

        def generator() -> Iterator[str]:
            yield "generator"
            log.append("-generator")

        for stand_in in (coroutine_function, function, async_generator, generator):
            with override(db, stand_in):
                async with request_scope():
                    assert await db() == stand_in.__name__.replace("_", " ")
        assert log == ["-async generator", "-generator"]

    async def test_it_replaces_what_is_set_up_already_and_gives_it_back(self) -> None:
        async with lifespan_scope(), request_scope():
            before = await db()
            with override(db, "a fake"), override(pool, "a fake pool"):
                assert await db() == "a fake"
                assert await pool() == "a fake pool"
            assert await db() is before
            assert log == ["+db", "+pool"]
        assert log == ["+db", "+pool", "-db", "-pool"]

    async def test_what_is_set_up_meanwhile_is_torn_down_though_the_override_is_over(self) -> None:
        async def stand_in() -> AsyncIterator[str]:
            yield "a fake"
            log.append("-fake")

        async with request_scope():
            with override(db, stand_in):
                assert await db() == "a fake"
            assert log == []
        assert log == ["-fake"]

    async def test_nested_the_last_one_counts(self) -> None:
        async with request_scope():
            with override(db, "outer"):
                with override(db, "inner"):
                    assert await db() == "inner"
                assert await db() == "outer"
            assert await db() == "db of pool"

    async def test_it_is_undone_when_the_body_raises(self) -> None:
        async with request_scope():
            with pytest.raises(ValueError, match="a test that fails"), override(db, "a fake"):
                raise ValueError("a test that fails")
            assert await db() == "db of pool"

    async def test_who_depends_on_it_gets_the_stand_in(self) -> None:
        with override(pool, "a fake pool"):
            async with request_scope():
                assert await db() == "db of a fake pool"
        assert "+pool" not in log

    async def test_the_stand_in_may_use_other_resources(self) -> None:
        async def stand_in() -> str:
            return f"a fake of {await pool()}"

        with override(db, stand_in):
            async with request_scope():
                assert await db() == "a fake of pool"

    async def test_it_holds_in_requests_that_a_server_serves(self) -> None:
        @view
        async def shows(request: HttpRequest) -> HttpResponse:
            return HttpResponse(await db())

        with override(db, "a fake"):
            connection = Connection(ScopedASGIHandler(), "/shows")
            await connection.run()
        assert connection.body == b"a fake"

    async def test_an_eager_one_is_replaced_at_start_up(self) -> None:
        @lifespan_scoped(eager=True)
        async def search() -> str:
            raise OSError("no server in tests")

        from scoped.core.lifespan import eager

        try:
            with override(search, "a fake"):
                async with lifespan_scope():
                    assert await search() == "a fake"
        finally:
            eager.remove(search)

    def test_a_sync_one(self) -> None:
        with request_scope():
            assert tenant() == "tenant"
            with override(tenant, "a fake"):
                assert tenant() == "a fake"
            with override(tenant, lambda: "a factory's"):
                assert tenant() == "a factory's"
            assert tenant() == "tenant"

    async def test_get_nowait_and_release_are_the_stand_ins(self) -> None:
        async def stand_in() -> AsyncIterator[str]:
            yield "a fake"
            log.append("-fake")

        async with request_scope():
            await db()
            with override(db, stand_in):
                await db()
                assert db.get_nowait() == "a fake"
                await db.release()
                assert log[-1] == "-fake"
            assert db.get_nowait() == "db of pool"

    async def test_as_a_decorator_it_holds_during_each_call(self) -> None:
        @override(db, "a fake")
        async def use() -> str:
            return await db()

        @override(tenant, "a fake")
        def use_sync() -> str:
            return tenant()

        async with request_scope():
            assert await db() == "db of pool"
            assert await asyncio.gather(use(), use()) == ["a fake", "a fake"]
            assert use_sync() == use_sync() == "a fake"
            assert await db() == "db of pool"
            assert tenant() == "tenant"

    async def test_as_a_decorator_it_holds_until_what_the_function_gives_is_done(self) -> None:
        async def ask() -> str:
            await asyncio.sleep(0)
            return await db()

        @override(db, "a fake")
        def coroutine() -> Any:
            return ask()

        @override(db, "a fake")
        def task() -> Any:
            return asyncio.create_task(ask())

        @override(db, "a fake")
        def generator_of_a_plain_function() -> Any:
            return (tenant() + db.get_nowait() for _ in range(2))

        async with request_scope():
            assert await db() == "db of pool"
            assert await coroutine() == "a fake"
            running = task()
            assert isinstance(running, asyncio.Task)
            assert await running == "a fake"
            assert await db() == "db of pool"
            unused = coroutine()
            assert await db() == "db of pool"
            assert await unused == "a fake"
            never = generator_of_a_plain_function()
            with pytest.raises(AsyncResourceError):  # the fake, which nobody has set up
                next(never)
            assert await db() == "db of pool"

    async def test_as_a_decorator_of_generator_functions_it_holds_to_their_end(self) -> None:
        seen: list[str] = []

        @override(tenant, "a fake")
        def generator() -> Generator[str, str, str]:
            while True:
                try:
                    sent = yield tenant()
                except KeyError:
                    return tenant()
                seen.append(sent)

        @override(db, "a fake")
        async def async_generator() -> AsyncGenerator[str, str]:
            try:
                while True:
                    try:
                        sent = yield await db()
                    except KeyError:
                        return
                    seen.append(sent)
            finally:
                seen.append(await db())

        assert isgeneratorfunction(generator)
        assert isasyncgenfunction(async_generator)
        async with request_scope():
            steps = generator()
            assert tenant() == "tenant"
            assert next(steps) == steps.send("sent") == "a fake"
            with pytest.raises(StopIteration) as stopped:
                steps.throw(KeyError())
            assert stopped.value.value == "a fake"
            assert tenant() == "tenant"

            async_steps = async_generator()
            assert await async_steps.__anext__() == await async_steps.asend("sent") == "a fake"
            with pytest.raises(StopAsyncIteration):
                await async_steps.athrow(KeyError())
            assert await db() == "db of pool"
            async with aclosing(async_generator()) as begun:
                assert await begun.__anext__() == "a fake"
            assert await db() == "db of pool"
        assert seen == ["sent", "sent", "a fake", "a fake"]

    def test_what_is_no_function_is_not_decorated(self) -> None:
        for thing in (type(self), "text"):
            with pytest.raises(TypeError, match=r"It decorates functions"):
                override(db, "a fake")(thing)  # type: ignore[type-var]

    async def test_several_tasks_and_threads_at_once_end_in_any_order(self) -> None:
        async def in_task(delay: int) -> None:
            with override(db, delay):
                for _ in range(delay):
                    await asyncio.sleep(0)

        def in_thread() -> None:
            for _ in range(200):
                with override(db, "of a thread"):
                    pass

        await asyncio.gather(
            *(in_task(delay) for delay in (3, 1, 4, 1, 5, 9, 2, 6)),
            *(asyncio.to_thread(in_thread) for _ in range(4)),
        )
        async with request_scope():
            assert await db() == "db of pool"
            with override(db, "a fake"):
                assert await db() == "a fake"

    async def test_a_resource_may_stand_in_and_a_partial_is_a_factory(self) -> None:
        @request_scoped
        async def other() -> str:
            return f"instead, {tenant()}"

        async with request_scope():
            with override(db, other):
                assert await db() == "instead, tenant"
            with override(db, functools.partial("{} {}".format, "of", "a partial")):
                assert await db() == "of a partial"
            with override(tenant, functools.partial(list)):
                assert isinstance(tenant(), functools.partial)

    def test_what_is_async_does_not_stand_in_for_what_is_sync(self) -> None:
        async def stand_in() -> str:
            return "never"

        with pytest.raises(FactoryError, match=r"stand_in .* is async and cannot stand in for"):
            override(tenant, stand_in)

    async def test_what_is_set_up_with_it_keeps_it(self) -> None:
        """As the docstring says: so override before the lifespan opens."""

        @lifespan_scoped
        async def repository() -> str:
            return f"a repository on {await pool()}"

        async with lifespan_scope():
            with override(pool, "a fake pool"):
                assert await repository() == "a repository on a fake pool"
            assert await pool() == "pool"
            assert await repository() == "a repository on a fake pool"

    @pytest.mark.parametrize("kind", ["coroutine", "generator", "async_generator"])
    async def test_what_has_yet_to_run_is_no_value(self, kind: str) -> None:
        async def fake() -> str:
            return "fake"

        async def fakes() -> AsyncIterator[str]:
            yield "fake"

        stand_in: Any = {
            "coroutine": fake,
            "generator": lambda: (each for each in "fake"),
            "async_generator": fakes,
        }[kind]()
        with pytest.raises(FactoryError, match=rf"{kind} object .*without the parenthes") as got:
            override(db, stand_in)
        assert str(db.resource) in str(got.value)
        if kind == "generator":  # it is left as it was
            assert next(stand_in) == "f"

    async def test_it_is_left_once(self) -> None:
        fake = override(db, "fake")
        with fake:
            pass
        with pytest.raises(RuntimeError, match=r"override\(\) of .*db .* is not in force"):
            fake.__exit__(None, None, None)
        with override(db, "another"), pytest.raises(RuntimeError, match="not in force"):
            fake.__exit__(None, None, None)
        async with request_scope():
            assert await db() == "db of pool"

    def test_on_a_static_method_it_is_one_still(self) -> None:
        class Tests:
            @override(tenant, "a fake")
            @staticmethod
            def test() -> str:
                return tenant()

            @request_scoped
            @staticmethod
            def mine() -> str:
                return "mine"

            @staticmethod
            def another() -> Iterator[str]:
                yield "a fake of mine"

            fake = override(mine, another)

        with request_scope():
            assert (Tests.test(), Tests().test()) == ("a fake", "a fake")
            with Tests.fake:
                assert Tests.mine() == "a fake of mine"

    def test_what_is_no_resource_is_refused(self) -> None:
        with pytest.raises(TypeError, match="what @request_scoped or @lifespan_scoped has made"):
            override(len, "a fake")  # type: ignore[arg-type]


@view
async def plain(request: HttpRequest) -> HttpResponse:
    return HttpResponse(await db())


@view
async def missing(request: HttpRequest) -> HttpResponse:
    await db()
    raise Http404


@view
async def broken(request: HttpRequest) -> HttpResponse:
    await db()
    raise ValueError("broken")


@view
async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[bytes]:
        for number in range(3):
            await db()
            yield b"%d" % number

    return StreamingHttpResponse(body())


class TestAsyncClient:
    async def test_the_request_has_ended_when_the_response_is_there(self) -> None:
        async with AsyncClient() as client:
            response = await client.get("/plain")
            assert (response.status_code, response.content) == (200, b"db of pool")
            assert response.asgi_request.path == "/plain"
            assert log == ["+db", "+pool", "-db"]
        assert log == ["+db", "+pool", "-db", "-pool"]

    async def test_entered_twice_it_holds_the_lifespan_until_it_is_left_twice(self) -> None:
        async with AsyncClient() as client:
            async with client:
                await client.get("/plain")
            assert "-pool" not in log
            await client.get("/plain")
        assert log == ["+db", "+pool", "-db", "+db", "-db", "-pool"]

    async def test_it_runs_the_lifespan(self) -> None:
        async with AsyncClient() as client:
            await client.get("/plain")
            await client.get("/plain")
        assert log == ["+db", "+pool", "-db", "+db", "-db", "-pool"]

    async def test_a_404_and_an_error_are_seen_by_the_factories(self) -> None:
        async with AsyncClient(raise_request_exception=False) as client:
            assert (await client.get("/missing")).status_code == 404
            assert (await client.get("/broken")).status_code == 500
        assert [line for line in log if "saw" in line] == ["db saw Http404", "db saw ValueError"]

    async def test_an_error_is_raised_as_by_djangos(self) -> None:
        async with AsyncClient() as client:
            with pytest.raises(ValueError, match="broken"):
                await client.get("/broken")

    async def test_a_stream_keeps_its_scope_until_it_is_read(self) -> None:
        async with AsyncClient() as client:
            response = await client.get("/stream")
            assert "-db" not in log
            parts = [part async for part in response.streaming_content]
            assert b"".join(parts) == b"012"
            assert log[-1] == "-db"

    async def test_a_stream_that_is_closed_ends_as_if_the_client_had_gone(self) -> None:
        async with AsyncClient() as client:
            response = await client.get("/stream")
            async for _ in response.streaming_content:
                break
            response.close()
            while log[-1] != "-db":
                await asyncio.sleep(0.001)
        assert "db saw CancelledError" in log

    async def test_a_request_that_ends_with_a_timeout_of_its_own_has_failed(self) -> None:
        async def fails(**kwargs: Any) -> None:
            raise TimeoutError("of a receiver")

        request_finished.connect(fails)
        try:
            with pytest.raises(TimeoutError, match="of a receiver"):
                await AsyncClient().get("/plain")
        finally:
            request_finished.disconnect(fails)
        assert log.count("+db") == log.count("-db") == 1

    @pytest.mark.parametrize("is_endless", [False, True])
    async def test_a_stream_that_nobody_is_sent_is_read_to_its_end_or_left(
        self, is_endless: bool
    ) -> None:
        @view
        async def events(request: HttpRequest) -> StreamingHttpResponse:
            async def body() -> AsyncIterator[str]:
                try:
                    yield await db()
                    if is_endless:
                        await asyncio.Event().wait()
                finally:
                    log.append("the stream ends")

            return StreamingHttpResponse(body())

        with override_settings(SCOPED={"TEARDOWN_TIMEOUT": 0.05 if is_endless else 60}):
            response = await AsyncClient().head("/events")
        assert response.status_code == 200
        assert b"".join(response.streaming_content) == b""
        saw = ["db saw CancelledError"] * is_endless
        assert log == ["+db", "+pool", "the stream ends", *saw, "-db"]

    async def test_many_at_once_have_a_scope_each(self) -> None:
        async with AsyncClient() as client:
            await asyncio.gather(*(client.get("/plain") for _ in range(5)))
        assert log.count("+db") == log.count("-db") == 5

    async def test_a_teardown_that_fails_before_the_response_is_a_500(self) -> None:
        @request_scoped(until="response")
        async def transaction() -> AsyncIterator[None]:
            yield
            raise OSError("no commit")

        @view
        async def commits(request: HttpRequest) -> HttpResponse:
            await transaction()
            return HttpResponse("false")

        async with AsyncClient(raise_request_exception=False) as client:
            assert (await client.get("/commits")).status_code == 500

    async def test_a_malformed_request_is_a_400(self) -> None:
        response = await AsyncClient().request(method="GET", path="/plain", query_string=b"\xff")
        assert response.status_code == 400

    async def test_what_a_request_fails_with_before_it_has_a_response_is_raised(self) -> None:
        def fails(**kwargs: Any) -> None:
            raise ValueError("a receiver's")

        request_started.connect(fails)
        try:
            with pytest.raises(ValueError, match="a receiver's"):
                await AsyncClient().get("/plain")
        finally:
            request_started.disconnect(fails)

    async def test_a_request_that_is_never_answered_is_no_response(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where somebody has patched Django's handler."""

        async def sends_nothing(*args: object) -> None: ...

        monkeypatch.setattr(ASGIHandler, "send_response", sends_nothing)
        with pytest.raises(RuntimeError, match="sent no response"):
            await AsyncClient().get("/plain")
        assert log[-1] == "-db"

    async def test_what_is_sent_when_the_test_has_closed_the_stream_is_dropped(self) -> None:
        go_on = asyncio.Event()

        @view
        async def waits(request: HttpRequest) -> StreamingHttpResponse:
            async def body() -> AsyncIterator[bytes]:
                await db()
                yield b"first"
                await go_on.wait()
                yield b"dropped"

            return StreamingHttpResponse(body())

        async with AsyncClient() as client:
            response = await client.get("/waits")
            parts = response.streaming_content
            assert await anext(parts) == b"first"
            reading = asyncio.create_task(anext(parts))
            await asyncio.sleep(0)
            go_on.set()
            response.close()
            with pytest.raises(StopAsyncIteration):
                await reading
            assert log[-1] == "-db"

    async def test_cancelled_while_the_request_ends_the_test_is_cancelled_when_it_has(self) -> None:
        go_on = asyncio.Event()

        @request_scoped
        async def slow() -> AsyncIterator[None]:
            try:
                yield
            finally:
                log.append("ending")
                await go_on.wait()
                log.append("-slow")

        @view
        async def streams_slowly(request: HttpRequest) -> StreamingHttpResponse:
            async def body() -> AsyncIterator[bytes]:
                await slow()
                yield b"part"

            return StreamingHttpResponse(body())

        async def read() -> None:
            response = await AsyncClient().get("/streams_slowly")
            async for _ in response.streaming_content:
                pass

        reading = asyncio.create_task(read())
        while log != ["ending"]:
            await asyncio.sleep(0.001)
        for _ in range(2):
            reading.cancel()
            await asyncio.sleep(0)
        assert not reading.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert log == ["ending", "-slow"]

    async def test_without_a_lifespan_it_lasts_until_the_event_loop_ends(self) -> None:
        await AsyncClient().get("/plain")
        assert log == ["+db", "+pool", "-db"]


class TestClient:
    def test_the_request_has_ended_when_the_response_is_there(self) -> None:
        @view
        def plain_sync(request: HttpRequest) -> HttpResponse:
            assert current_scope().request is request
            return HttpResponse(tenant())

        with Client() as client:
            assert client.get("/sync/plain_sync").content == b"tenant"
            assert log == ["+settings", "+tenant", "-tenant"]
            client.get("/sync/plain_sync")
        assert log == ["+settings", *["+tenant", "-tenant"] * 2, "-settings"]

    def test_entered_twice_it_holds_the_lifespan_until_it_is_left_twice(self) -> None:
        with Client() as client:
            with client:
                settings_of_tenants()
            assert "-settings" not in log
        assert log == ["+settings", "-settings"]

    def test_without_a_lifespan_it_lasts_as_long_as_the_request(self) -> None:
        @view
        def plain_sync(request: HttpRequest) -> HttpResponse:
            return HttpResponse(tenant())

        Client().get("/sync/plain_sync")
        assert log == ["+settings", "+tenant", "-tenant", "-settings"]

    def test_a_404_is_seen_by_the_factories(self) -> None:
        @view
        def missing_sync(request: HttpRequest) -> HttpResponse:
            tenant()
            raise Http404

        assert Client().get("/sync/missing_sync").status_code == 404
        assert "tenant saw Http404" in log

    def test_a_stream_keeps_its_scope_until_it_is_read_or_closed(self) -> None:
        @view
        def stream_sync(request: HttpRequest) -> StreamingHttpResponse:
            return StreamingHttpResponse(tenant() for _ in range(2))

        response = Client().get("/sync/stream_sync")
        assert b"".join(response) == b"tenanttenant"
        assert log[-2:] == ["-tenant", "-settings"]
        log.clear()
        response = Client().get("/sync/stream_sync")
        next(iter(response))
        assert "-tenant" not in log
        response.close()
        assert log[-2:] == ["-tenant", "-settings"]

    def test_what_stops_the_program_closes_the_scope(self) -> None:
        class StopError(BaseException):
            pass

        @view
        def stops(request: HttpRequest) -> HttpResponse:
            tenant()
            raise StopError

        with Client() as client, pytest.raises(StopError):
            client.get("/sync/stops")
        assert log[-3:] == ["tenant saw StopError", "-tenant", "-settings"]

    def test_until_the_response(self) -> None:
        @request_scoped(until="response")
        def transaction() -> Iterator[None]:
            yield
            raise OSError("no commit")

        @view
        def commits_sync(request: HttpRequest) -> HttpResponse:
            transaction()
            return HttpResponse("false")

        client = Client(raise_request_exception=False)
        assert client.get("/sync/commits_sync").status_code == 500

    def test_an_async_resource_is_refused(self) -> None:
        with pytest.raises(AsyncResourceError, match="opened by sync code"):
            Client().get("/plain")


class TestNoLeaks:
    async def test_a_stream_that_is_left_open_is_named_with_what_it_holds(self) -> None:
        async with AsyncClient() as client:
            with pytest.raises(AssertionError, match=r"GET /stream, open for .*holds: .*\.db"):
                with assert_no_leaks():
                    response = await client.get("/stream")
                    parts = aiter(response.streaming_content)
                    await anext(parts)
            response.close()

    async def test_a_background_task_that_still_runs(self) -> None:
        go_on = asyncio.Event()

        async def work() -> None:
            await go_on.wait()

        with pytest.raises(AssertionError, match="the background task the mail"):
            with assert_no_leaks():
                task = spawn(work(), name="the mail")
        go_on.set()
        await task

    async def test_what_has_ended_and_what_was_open_before_is_fine(self) -> None:
        async with request_scope(), AsyncClient() as client:
            with assert_no_leaks():
                await client.get("/plain")

    def test_as_a_decorator_it_is_for_functions_and_static_methods(self) -> None:
        class Tests:
            @assert_no_leaks()
            @staticmethod
            def test() -> str:
                return "result"

        assert Tests().test() == "result"
        with pytest.raises(TypeError, match=r"assert_no_leaks\(\) was put on <class"):
            assert_no_leaks()(Tests)

    async def test_as_a_decorator_it_looks_when_the_call_has_ended(self) -> None:
        left: list[Any] = []

        @assert_no_leaks()
        async def test_of_mine(*, leaks: bool) -> str:
            log.append("ran")
            scope = request_scope()
            left.append(scope)
            await scope.__aenter__()
            if not leaks:
                await scope.__aexit__(None, None, None)
            return "result"

        assert await test_of_mine(leaks=False) == "result"
        with pytest.raises(AssertionError, match=r"1 scope\(s\) still open"):
            await test_of_mine(leaks=True)
        assert log == ["ran", "ran"]
        await left[1].__aexit__(None, None, None)

    async def test_the_bodys_own_error_comes_first(self) -> None:
        with pytest.raises(ValueError, match="the test's"), assert_no_leaks():
            scope = request_scope()
            await scope.__aenter__()
            raise ValueError("the test's")
        await scope.__aexit__(None, None, None)


class InDjangosTestCase(SimpleTestCase):
    client_class = Client
    async_client_class = AsyncClient

    def run_both(self) -> None:
        @view
        def plain_sync(request: HttpRequest) -> HttpResponse:
            return HttpResponse(tenant())

        assert self.client.get("/sync/plain_sync").content == b"tenant"

        async def use() -> None:
            async with self.async_client as client:
                assert (await client.get("/plain")).content == b"db of pool"

        async_to_sync(use)()


def test_both_serve_djangos_test_cases() -> None:
    case = InDjangosTestCase("run_both")
    result = unittest.TestResult()
    with assert_no_leaks():
        case(result)
        gc.collect()
    assert result.wasSuccessful(), (result.errors, result.failures)
    assert log.count("+pool") == log.count("-pool") == 1


def test_a_sync_lifespan() -> None:
    with lifespan_scope() as lifespan:
        with request_scope():
            tenant()
        assert log == ["+settings", "+tenant", "-tenant"]
        assert lifespan.is_open
    assert log == ["+settings", "+tenant", "-tenant", "-settings"]
    with pytest.raises(ScopeClosedError):
        lifespan.begin(settings_of_tenants.resource, None)


async def test_a_sync_lifespan_where_an_event_loop_runs_is_refused() -> None:
    with pytest.raises(RuntimeError, match="async with lifespan_scope"):
        with lifespan_scope():
            pass
