import asyncio

import pytest
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path
from redis.exceptions import LockError

CLIENT = ("redis.md", "Client and pipeline")
LOCK = ("redis.md", "Lock")
PUBSUB = ("redis.md", "Pub/sub")


async def connections(keys):
    return len(await keys.client_list())


async def test_the_pipeline_is_executed_once_the_request_has_succeeded(recipe, serve, keys):
    project = recipe(CLIENT)

    async def view(request):
        response = await project.views.visit(request)
        assert await keys.get("visits") is None
        return response

    before = await connections(keys)
    async with serve(path("", project.views.index), path("visit", view)) as site:
        assert (await site.get("/")).body == b"0"
        assert (await site.get("/visit")).status == 204
        assert (await site.get("/")).body == b"1"
        assert 0 < await keys.ttl("visits") <= 3600
    await reach(lambda: connections(keys), before)


async def reach(get, value):
    """The server takes a moment to see that a connection was closed."""
    async with asyncio.timeout(5):
        while await get() != value:
            await asyncio.sleep(0.01)


async def test_a_failed_request_sends_nothing(recipe, serve, keys):
    project = recipe(CLIENT)
    reached = asyncio.Event()

    async def raises(request):
        await project.views.visit(request)
        raise ValueError

    async def hangs(request):
        await project.views.visit(request)
        reached.set()
        await asyncio.Event().wait()

    async with serve(path("raises", raises), path("hangs", hangs)) as site:
        assert (await site.get("/raises")).status == 500
        connection = site.open("/hangs")
        task = connection.start()
        await reached.wait()
        connection.disconnect()
        await task
        assert await keys.get("visits") is None


async def test_the_client_serves_many_children(recipe, serve, keys):
    project = recipe(CLIENT)

    async def view(request):
        redis = await project.resources.redis()
        counts = await asyncio.gather(*[redis.incr("visits") for _ in range(20)])
        return HttpResponse(str(sorted(counts) == list(range(1, 21))))

    async with serve(path("", view)) as site:
        assert (await site.get("/")).body == b"True"


async def test_the_lock_is_held_to_the_last_byte(recipe, serve, keys):
    project = recipe(LOCK)
    held = []

    async def look(number, message):
        held.append(await keys.exists("invoice-7"))

    async with serve(path("<int:number>", project.views.print_invoice)) as site:
        connection = await site.get("/7", before_send=look)
        assert connection.body == b"page 1\npage 2\n"
    assert held == [1] * len(connection.sent)
    assert await keys.exists("invoice-7") == 0


async def test_the_lock_is_released_however_the_request_ends(recipe, serve, keys):
    project = recipe(LOCK)
    reached = asyncio.Event()

    async def raises(request):
        await project.resources.lock("invoice-7")
        raise ValueError

    async def child_raises(request):
        async with asyncio.TaskGroup() as group:
            group.create_task(raises(request))

    async def hangs(request):
        await project.resources.lock("invoice-7")

        async def body():
            yield "one"
            reached.set()
            await asyncio.Event().wait()

        return StreamingHttpResponse(body())

    async with serve(
        path("raises", raises), path("child", child_raises), path("hangs", hangs)
    ) as site:
        for where in ["/raises", "/child"]:
            assert (await site.get(where)).status == 500
            assert await keys.exists("invoice-7") == 0
        connection = site.open("/hangs")
        task = connection.start()
        await reached.wait()
        assert await keys.exists("invoice-7") == 1
        connection.disconnect()
        await task
        assert await keys.exists("invoice-7") == 0


async def test_a_second_request_waits_for_the_lock(recipe, serve, keys):
    project = recipe(LOCK)
    reached, release = asyncio.Event(), asyncio.Event()
    log = []

    async def first(request):
        await project.resources.lock("invoice-7")
        reached.set()
        await release.wait()
        log.append("first")
        return HttpResponse()

    async def second(request):
        await project.resources.lock("invoice-7")
        log.append("second")
        return HttpResponse()

    async def impatient(request):
        lock = (await project.resources.redis()).lock("invoice-7", blocking_timeout=0.05)
        with pytest.raises(LockError):
            await lock.__aenter__()
        return HttpResponse()

    async with serve(
        path("first", first), path("second", second), path("impatient", impatient)
    ) as site:
        one = asyncio.create_task(site.get("/first"))
        await reached.wait()
        assert (await site.get("/impatient")).status == 200
        two = asyncio.create_task(site.get("/second"))
        await asyncio.sleep(0.05)
        assert log == []
        release.set()
        assert [(await one).status, (await two).status] == [200, 200]
    assert log == ["first", "second"]
    assert await keys.exists("invoice-7") == 0


async def test_a_lock_that_was_lost_is_logged(recipe, serve, keys, caplog):
    project = recipe(LOCK)

    async def view(request):
        await project.resources.lock("invoice-7")
        await keys.delete("invoice-7")
        return HttpResponse()

    async with serve(path("", view)) as site:
        assert (await site.get("/")).status == 200
    [record] = caplog.records
    assert "LockNotOwnedError" in caplog.text
    assert record.name == "scoped"


async def test_the_subscription_ends_with_the_client(recipe, serve, keys):
    project = recipe(PUBSUB)

    async def subscribers():
        [(_, count)] = await keys.pubsub_numsub("news")
        return count

    before = await connections(keys)
    async with serve(path("", project.views.events)) as site:
        for _ in range(2):
            connection = site.open("/")
            task = connection.start()
            await reach(subscribers, 1)
            await keys.publish("news", "hello")

            async def is_told(connection=connection):
                return connection.body.endswith(b"\n\ndata: hello\n\n")

            await reach(is_told, True)
            assert connection.body.startswith(b": subscribed\n\n")
            connection.disconnect()
            await task
            assert not connection.complete
            await reach(subscribers, 0)
    await reach(lambda: connections(keys), before)
