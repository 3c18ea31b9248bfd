import asyncio

import pytest
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path
from redis.asyncio import Redis
from redis.exceptions import LockError

from demo.servers import start_redis

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
        assert (await site.get("/visit")).status == 405
        assert (await site.get("/visit", method="POST")).status == 204
        assert (await site.get("/")).body == b"1"
        assert 0 < await keys.ttl("visits") <= 3600
    await reach(lambda: connections(keys), before)


async def reach(get, value, seconds=20):
    """The server takes a moment to see that a connection was closed."""
    async with asyncio.timeout(seconds):
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
        assert (await site.get("/raises", method="POST")).status == 500
        connection = site.open("/hangs", method="POST")
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


async def test_all_streams_share_one_subscription_which_ends_with_the_server(recipe, serve, keys):
    project = recipe(PUBSUB)

    async def subscribers():
        [(_, count)] = await keys.pubsub_numsub("news")
        return count

    before = await connections(keys)
    async with serve(path("", project.views.events)) as site:
        for _ in range(2):
            streams = [site.open("/") for _ in range(3)]
            tasks = [stream.start() for stream in streams]
            for stream in streams:
                await reach(is_told(stream, b": subscribed\n\n"), True)
            assert await subscribers() == 1
            assert await connections(keys) == before + 1
            await keys.publish("news", "hello\n\ndata: forged")
            for stream in streams:
                told = b': subscribed\n\ndata: "hello\\n\\ndata: forged"\n\n'
                await reach(is_told(stream, told), True)
                stream.disconnect()
            await asyncio.gather(*tasks)
            assert not any(stream.complete for stream in streams)
    assert await subscribers() == 0
    await reach(lambda: connections(keys), before)


def is_told(stream, text):
    async def is_told():
        return stream.body == text

    return is_told


async def test_300_event_streams_and_200_commands_at_once_are_all_answered(recipe, serve, keys):
    streaming, commanding = recipe(PUBSUB), recipe(CLIENT)
    before = await connections(keys)

    async def visit(request):
        await (await commanding.resources.redis()).incr("visits")
        return HttpResponse("counted")

    urls = path("events", streaming.views.events), path("visit", visit)
    async with serve(*urls) as site:
        streams = [site.open("/events") for _ in range(300)]
        tasks = [stream.start() for stream in streams]
        for stream in streams:
            await reach(is_told(stream, b": subscribed\n\n"), True)
        answers = await asyncio.gather(*(site.get("/visit") for _ in range(200)))
        assert [answer.status for answer in answers] == [200] * 200
        assert await keys.get("visits") == "200"
        # The pool, which keeps what it has opened, and the one subscription.
        assert await connections(keys) <= before + 20 + 1
        await keys.publish("news", "to all")
        for stream in streams:
            await reach(is_told(stream, b': subscribed\n\ndata: "to all"\n\n'), True)
            stream.disconnect()
        await asyncio.gather(*tasks)
    await reach(lambda: connections(keys), before)


async def test_who_does_not_read_misses_the_oldest_and_holds_no_more(recipe, serve, keys):
    project = recipe(PUBSUB)
    news = project.resources.News()
    with news.heard() as queue:
        for number in range(project.resources.BEHIND + 5):
            news.tell(number)
        assert queue.qsize() == project.resources.BEHIND
        assert queue.get_nowait() == 5
    news.tell("to nobody")
    assert queue.qsize() == project.resources.BEHIND - 1


async def test_the_subscription_outlives_a_message_that_is_not_utf_8(recipe, serve, keys, caplog):
    project = recipe(PUBSUB)
    async with serve(path("", project.views.events)) as site:
        stream = site.open("/")
        task = stream.start()
        await reach(is_told(stream, b": subscribed\n\n"), True)
        assert await keys.publish("news", b"\xff") == 1

        async def is_lost():
            return "UnicodeDecodeError" in caplog.text

        async def is_heard():
            return await keys.publish("news", "on") == 1

        await reach(is_lost, True)
        await reach(is_heard, True)
        await reach(is_told(stream, b': subscribed\n\ndata: "on"\n\n'), True)
        stream.disconnect()
        await task


async def test_the_subscription_outlives_a_redis_that_is_away(recipe, serve, monkeypatch):
    with start_redis() as server:
        monkeypatch.setenv("REDIS_URL", server.url)
        project = recipe(PUBSUB)
        async with serve(path("", project.views.events)) as site:
            stream = site.open("/")
            task = stream.start()
            await reach(is_told(stream, b": subscribed\n\n"), True)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.restart)
            async with Redis.from_url(server.url, decode_responses=True) as client:

                async def is_heard():
                    return await client.publish("news", "back") == 1

                await reach(is_heard, True, 30)
            await reach(is_told(stream, b': subscribed\n\ndata: "back"\n\n'), True)
            stream.disconnect()
            await task
