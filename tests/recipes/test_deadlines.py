import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest
from django.core.signals import got_request_exception
from django.http import HttpResponse
from django.urls import path

from scoped import request_scoped

VIEW = ("deadlines.md", "A deadline for the view")
REQUEST = ("deadlines.md", "A deadline for the whole request")
GROUP = ("deadlines.md", "A stream fed by a task group")

log: list[str] = []


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    """The project's: "ends" has two lines, "fails" fails after one, "waits" never has a second."""
    log.clear()
    module = ModuleType("sources")
    module.reached = asyncio.Event()

    async def lines(source):
        yield f"{source} 1\n"
        try:
            if source == "fails":
                await module.reached.wait()
                raise OSError(source)
            if source == "waits":
                module.reached.set()
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append(f"{source} cancelled")
            raise
        yield f"{source} 2\n"

    module.lines = lines
    monkeypatch.setitem(sys.modules, "sources", module)
    return module


@request_scoped(until="response")
async def transaction():
    try:
        yield
    except BaseException as error:
        log.append(f"rolled back: {type(error).__name__}")
        raise
    else:
        log.append("committed")


async def quick(request):
    await transaction()
    return HttpResponse("quick")


async def slow(request):
    await transaction()
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("where", "seconds", "expected"),
    [
        ("/quick", 30, (200, b"quick", ["committed"])),
        ("/slow", 0.02, (504, b"Too slow.", ["rolled back: CancelledError"])),
    ],
)
async def test_a_view_that_takes_too_long_is_answered_for_and_rolls_back(
    recipe, serve, where, seconds, expected
):
    recipe(VIEW)
    settings = {"MIDDLEWARE": ["middleware.deadline_middleware"], "DEADLINE": seconds}
    async with serve(path("quick", quick), path("slow", slow), **settings) as site:
        response = await site.get(where)
    assert (response.status, response.body, log) == expected


async def test_a_request_in_time_is_untouched_by_its_deadline(recipe, serve):
    views = recipe(REQUEST).views
    async with serve(path("", views.export), DEADLINE=30) as site:
        assert (await site.get("/?from=ends")).body == b"ends 1\nends 2\n"


async def test_a_stream_that_takes_too_long_is_cut(recipe, serve, sources, monkeypatch):
    modules, loop = recipe(REQUEST), asyncio.get_running_loop()

    def timeout(seconds):
        """For a test on a slow machine: over as soon as the stream waits."""
        bound = asyncio.timeout(None)
        waiting.add_done_callback(lambda _: bound.reschedule(loop.time()))
        return bound

    waiting = asyncio.create_task(sources.reached.wait())
    monkeypatch.setattr(modules.resources, "asyncio", SimpleNamespace(timeout=timeout))
    async with serve(path("", modules.views.export), DEADLINE=30) as site:
        connection = site.open("/?from=waits")
        with pytest.raises(TimeoutError):
            await connection.run()
    assert connection.body == b"waits 1\n"
    assert not connection.complete
    assert log == ["waits cancelled"]


async def test_a_view_that_takes_too_long_is_djangos_500(recipe, serve):
    modules, errors = recipe(REQUEST), []

    async def view(request):
        await modules.resources.deadline()
        await slow(request)

    def failed(**kwargs):
        errors.append(sys.exc_info()[0])

    got_request_exception.connect(failed)
    try:
        async with serve(path("", view), DEADLINE=0.02) as site:
            assert (await site.get("/")).status == 500
    finally:
        got_request_exception.disconnect(failed)
    assert errors == [TimeoutError]
    assert log == ["rolled back: CancelledError"]


async def test_a_group_feeds_the_stream(recipe, serve):
    views = recipe(GROUP).views
    async with serve(path("", views.merged)) as site:
        body = (await site.get("/?from=ends&from=ends")).body
    assert sorted(body.decode().splitlines()) == ["ends 1", "ends 1", "ends 2", "ends 2"]


async def test_a_child_that_fails_ends_the_stream_and_the_others(recipe, serve):
    views = recipe(GROUP).views
    async with serve(path("", views.merged)) as site:
        connection = site.open("/?from=waits&from=fails")
        with pytest.raises(ExceptionGroup) as raised:
            await connection.run()
    assert [type(error) for error in raised.value.exceptions] == [OSError]
    assert not connection.complete
    assert log == ["waits cancelled"]


async def test_a_client_that_goes_away_ends_the_children(recipe, serve, sources):
    views = recipe(GROUP).views
    async with serve(path("", views.merged)) as site:
        connection = site.open("/?from=waits")
        request = connection.start()
        await sources.reached.wait()
        connection.disconnect()
        await request
    assert log == ["waits cancelled"]
