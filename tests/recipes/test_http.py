import asyncio
import json
from http.cookiejar import CookieJar

import httpx
import pytest
from django.http import HttpResponse
from django.urls import path

CLIENT = ("http.md", "Client")
PASSED_ON = ("http.md", "A body passed on")


class Upstream:
    """An HTTP server on loopback. ``requests`` are the heads that it was sent."""

    def __init__(self):
        self.requests = []
        self.connections = 0
        self.open = 0
        self.server = None
        self.kind = b""
        self.reached = asyncio.Event()

    async def serve(self, reader, writer):
        self.connections += 1
        self.open += 1
        try:
            while head := await self.head(reader):
                self.requests.append(head)
                await self.answer(head.split()[1], writer)
        except ConnectionError:
            pass
        finally:
            self.open -= 1
            writer.close()

    async def head(self, reader):
        try:
            return (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return None

    async def answer(self, where, writer):
        if where == "/download":
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
            writer.write(b"%b%bSet-Cookie: session=secret\r\n\r\n" % (head, self.kind))
            for _ in range(3):
                writer.write(b"3\r\nabc\r\n")
            writer.write(b"0\r\n\r\n")
        elif where == "/endless":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                writer.write(b"3\r\nabc\r\n")
                await writer.drain()
                await asyncio.sleep(0.005)
        elif where == "/hangs":
            self.reached.set()
            return
        else:
            status = b"500 Oh" if where == "/broken" else b"200 OK"
            body = where[1:].encode()
            writer.write(b"HTTP/1.1 %b\r\nSet-Cookie: session=secret\r\n" % status)
            writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()

    async def closed(self):
        async with asyncio.timeout(5):
            while self.open:
                await asyncio.sleep(0.005)


@pytest.fixture
async def upstream():
    upstream = Upstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.url = "http://{}:{}".format(*server.sockets[0].getsockname())
    yield upstream
    server.close()
    await server.wait_closed()
    assert upstream.open == 0


async def test_one_client_for_all_requests(recipe, serve, upstream):
    project = recipe(CLIENT)
    async with serve(path("", project.views.both), UPSTREAM=upstream.url) as site:
        for _ in range(3):
            assert json.loads((await site.get("/")).body) == {"weather": "weather", "news": "news"}
    assert len(upstream.requests) == 6
    assert upstream.connections == 2, "two children at once, and both connections kept"
    await upstream.closed()


async def test_cookies_of_one_request_are_not_sent_with_the_next(recipe, serve, upstream):
    project = recipe(CLIENT)
    async with serve(path("", project.views.both), UPSTREAM=upstream.url) as site:
        for _ in range(2):
            await site.get("/")
        client = await project.resources.http()
        assert not any("session=secret" in head for head in upstream.requests)
        assert not client.cookies
        # What a client does that has another jar.
        async with httpx.AsyncClient(cookies=CookieJar()) as other:
            for _ in range(2):
                await other.get(upstream.url + "/")
        assert "session=secret" in upstream.requests[-1]
    await upstream.closed()


async def test_the_call_ends_with_the_client(recipe, serve, upstream):
    project = recipe(CLIENT)

    async def view(request):
        return HttpResponse(await project.views.fetch("/hangs"))

    async with serve(path("", view), UPSTREAM=upstream.url) as site:
        connection = site.open("/")
        task = connection.start()
        await upstream.reached.wait()
        assert upstream.open == 1
        connection.disconnect()
        await task
        await upstream.closed()


async def test_an_answer_that_is_an_error_is_raised(recipe, serve, upstream):
    project = recipe(CLIENT)

    async def view(request):
        with pytest.raises(httpx.HTTPStatusError):
            await project.views.fetch("/broken")
        return HttpResponse()

    async with serve(path("", view), UPSTREAM=upstream.url) as site:
        assert (await site.get("/")).status == 200
    await upstream.closed()


async def test_the_body_is_passed_on(recipe, serve, upstream):
    project = recipe(PASSED_ON)
    async with serve(path("", project.views.download), UPSTREAM=upstream.url) as site:
        for kind in [b"", b"text/csv"]:
            upstream.kind = kind and b"Content-Type: %b\r\n" % kind
            answer = await site.get("/")
            assert answer.body == b"abcabcabc"
            sent = dict(answer.sent[0]["headers"])
            assert sent[b"Content-Type"] == (kind or b"application/octet-stream")
    assert upstream.connections == 1
    assert not any("session=secret" in head for head in upstream.requests)
    await upstream.closed()


async def test_nobody_downloads_for_nobody(recipe, serve, upstream):
    project = recipe(PASSED_ON)

    kept = []  # so that it is not the garbage collector that closes it

    async def fails(request):
        await project.views.download(request)
        kept.append(await project.resources.until_the_end())
        raise ValueError

    got = asyncio.Event()

    async def note(number, message):
        if number == 2:
            got.set()

    upstream_answer, upstream.answer = upstream.answer, lambda _, w: upstream_answer("/endless", w)
    async with serve(
        path("", project.views.download), path("fails", fails), UPSTREAM=upstream.url
    ) as site:
        assert (await site.get("/fails")).status == 500
        await upstream.closed()
        connection = site.open("/", before_send=note)
        task = connection.start()
        await got.wait()
        assert upstream.open == 1
        connection.disconnect()
        await task
        await upstream.closed()
        assert not connection.complete
