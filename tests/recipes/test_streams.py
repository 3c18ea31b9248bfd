import asyncio

import pytest
from django.http import StreamingHttpResponse
from django.urls import path

FED = ("streams.md", "Fed by several tasks")


async def test_it_ends_when_all_who_feed_it_have(recipe, serve):
    views = recipe(FED).views
    async with serve(path("", views.both)) as site:
        lines = (await site.get("/")).body.decode().split()
    assert sorted(lines) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert [line for line in lines if "a" in line] == ["a0", "a1", "a2"]


@pytest.mark.parametrize("end", ["one fails", "client gone", "server cancels", "body ends"])
async def test_none_of_them_outlives_the_request(recipe, serve, end, caplog):
    project = recipe(FED)
    ended, fail, reached = [], asyncio.Event(), asyncio.Event()

    async def work(queue, name):
        try:
            await queue.put(name)
            if name == "a":
                await fail.wait()
                raise ValueError
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def view(request):
        feed = await project.resources.feed()
        for name in ["a", "b"]:
            feed.start(work(feed.queue, name))

        async def body():
            items = feed.items()
            yield await anext(items)
            yield await anext(items)
            reached.set()
            if end == "body ends":
                return
            if end == "one fails":
                fail.set()
            async for item in items:
                yield item

        return StreamingHttpResponse(body())

    async with serve(path("", view)) as site:
        request = site.open("/")
        task = request.start()
        await reached.wait()
        if end == "client gone":
            request.disconnect()
        elif end == "server cancels":
            task.cancel()
        await asyncio.wait([task])
        task.cancelled() or task.exception()
        assert sorted(ended) == ["a", "b"]
        assert request.complete is (end == "body ends")
        assert request.body == b"ab"
