"""``LONG_STREAM``: a stream that goes on for long and holds resources is logged, once."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import override_settings

from scoped import request_scoped
from scoped.asgi import ScopedASGIHandler
from scoped.serving import streams
from scoped.testing import AsyncClient, Client
from scoped.wsgi import ScopedWSGIHandler
from tests.connection import Connection
from tests.views import Views
from tests.wsgi_server import call

view = Views()
urlpatterns = view.urlpatterns


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with override_settings(ROOT_URLCONF=__name__, SCOPED={"LONG_STREAM": 0.02}):
        yield


@request_scoped
async def db() -> AsyncIterator[str]:
    yield "db"


@request_scoped
async def cache() -> AsyncIterator[str]:
    yield "cache"


@request_scoped
def tenant() -> Iterator[str]:
    yield "tenant"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "scoped" and record.levelno == logging.WARNING
    ]


async def logged(caplog: pytest.LogCaptureFixture) -> None:
    async with asyncio.timeout(30):
        while not warnings(caplog):
            await asyncio.sleep(0.001)


async def waits_for_a_timer() -> None:
    """Long enough for one, had it been set before."""
    await asyncio.sleep(0.04)


class Test:
    """Promise 26: under every handler of ours."""

    async def test_a_long_stream_is_logged_once_with_what_it_holds_and_what_to_do(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        @view
        async def streams(request: HttpRequest) -> StreamingHttpResponse:
            await db()
            await cache()

            async def body() -> AsyncIterator[str]:
                yield "x"
                await logged(caplog)
                await waits_for_a_timer()

            return StreamingHttpResponse(body())

        await Connection(ScopedASGIHandler(), "/streams").run()
        [message] = warnings(caplog)
        assert message.startswith("the request GET /streams has been streaming for ")
        assert "db, " in message
        assert "cache all the while" in message
        assert "release()" in message
        assert 'SCOPED["LONG_STREAM"] = None' in message

    async def test_one_that_holds_nothing_is_not_until_it_does(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        @view
        async def streams(request: HttpRequest) -> StreamingHttpResponse:
            await db()

            async def body() -> AsyncIterator[str]:
                await db.release()
                yield "x"
                await waits_for_a_timer()
                assert warnings(caplog) == []
                await cache()
                await logged(caplog)

            return StreamingHttpResponse(body())

        await Connection(ScopedASGIHandler(), "/streams").run()
        [message] = warnings(caplog)
        assert "cache" in message
        assert "db" not in message

    async def test_none_means_never(self, caplog: pytest.LogCaptureFixture) -> None:
        @view
        async def streams(request: HttpRequest) -> StreamingHttpResponse:
            await db()

            async def body() -> AsyncIterator[str]:
                yield "x"
                await waits_for_a_timer()

            return StreamingHttpResponse(body())

        with override_settings(SCOPED={"LONG_STREAM": None}):
            await Connection(ScopedASGIHandler(), "/streams").run()
        assert warnings(caplog) == []

    async def test_what_is_no_stream_may_take_long(self, caplog: pytest.LogCaptureFixture) -> None:
        @view
        async def slow(request: HttpRequest) -> HttpResponse:
            await db()
            await waits_for_a_timer()
            return HttpResponse()

        await Connection(ScopedASGIHandler(), "/slow").run()
        assert warnings(caplog) == []

    async def test_a_stream_that_is_over_leaves_no_timer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        timers = []
        watch = streams.LongStream.watch

        def noted(self: streams.LongStream) -> None:
            watch(self)
            timers.append(self.timer)

        monkeypatch.setattr(streams.LongStream, "watch", noted)

        @view
        async def streams_(request: HttpRequest) -> StreamingHttpResponse:
            async def body() -> AsyncIterator[str]:
                yield "x"

            return StreamingHttpResponse(body())

        with override_settings(SCOPED={"LONG_STREAM": 60}):
            await Connection(ScopedASGIHandler(), "/streams_").run()
        [timer] = timers
        assert timer is not None
        assert timer.cancelled()

    async def test_under_the_async_client(self, caplog: pytest.LogCaptureFixture) -> None:
        @view
        async def streams(request: HttpRequest) -> StreamingHttpResponse:
            await db()

            async def body() -> AsyncIterator[str]:
                yield "x"
                await logged(caplog)

            return StreamingHttpResponse(body())

        response: Any = await AsyncClient().get("/streams")
        assert [part async for part in response.streaming_content] == [b"x"]
        assert "db" in warnings(caplog)[0]

    @pytest.mark.parametrize("way", ["WSGI", "Client"])
    def test_without_an_event_loop_after_the_part_that_took_so_long(
        self, way: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [0.0]
        monkeypatch.setattr(streams, "perf_counter", lambda: now[0])

        @view
        def streams_sync(request: HttpRequest) -> StreamingHttpResponse:
            tenant()

            def body() -> Iterator[str]:
                yield "1"
                yield "2"
                assert warnings(caplog) == []
                now[0] = 90
                yield "3"
                yield "4"
                assert len(warnings(caplog)) == 1
                now[0] = 180
                yield "5"

            return StreamingHttpResponse(body())

        with override_settings(SCOPED={"LONG_STREAM": 60}):
            if way == "WSGI":
                content = call(ScopedWSGIHandler(), "/sync/streams_sync")[1]
            else:
                content = b"".join(Client().get("/sync/streams_sync"))  # type: ignore[arg-type]
        assert content == b"12345"
        [message] = warnings(caplog)
        assert "has been streaming for 90 seconds, and holds " in message
        assert "tenant" in message
