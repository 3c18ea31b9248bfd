"""
A process that has one of the web applications, and runs requests through it when told to on its
standard input, or so many as its line says, to be counted, or serves it with uvicorn.
"""

# ruff: noqa: PLC0415 (most do without)

import argparse
import asyncio
import json
import socket
import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

from benchmarks import project
from benchmarks.measure import timed

__all__ = ["main"]


class Client:
    """A client that is there until it has its answer, as a server would present it."""

    def __init__(self, application: Any, path: str) -> None:
        self.application = application
        self.path = path

    async def run(self, n: int) -> bytes:
        for _ in range(n):
            body = await self.get()
        return body

    async def get(self) -> bytes:
        started, sent = False, b""
        loop = asyncio.get_running_loop()

        async def receive() -> dict[str, Any]:
            nonlocal started
            if started:
                await loop.create_future()
            started = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                if message["status"] != 200:
                    raise ValueError(f"{self.path}: {message}")
            else:
                sent += message["body"]

        await self.application(self.scope(), receive, send)
        return sent

    def scope(self) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"127.0.0.1"), (b"accept", b"*/*")],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }


class SyncClient:
    """The same for a WSGI application."""

    def __init__(self, application: Any, path: str) -> None:
        self.application = application
        self.path = path

    async def run(self, n: int) -> bytes:
        return await asyncio.to_thread(self._run, n)  # where no event loop runs

    def _run(self, n: int) -> bytes:
        for _ in range(n):
            body = self.get()
        return body

    def get(self) -> bytes:
        def start_response(status: str, headers: list[tuple[str, str]]) -> None:  # noqa: ARG001
            if status != "200 OK":
                raise ValueError(f"{self.path}: {status}")

        response = self.application(self.environ(), start_response)
        try:
            return b"".join(response)
        finally:
            response.close()

    def environ(self) -> dict[str, Any]:
        return {
            "REQUEST_METHOD": "GET",
            "SCRIPT_NAME": "",
            "PATH_INFO": self.path,
            "QUERY_STRING": "",
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "8000",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "HTTP_HOST": "127.0.0.1",
            "HTTP_ACCEPT": "*/*",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": BytesIO(),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }


Clients = Callable[[str], Client | SyncClient]


async def _check(client: Clients, kind: str) -> None:
    answers = {"/sync": b"ok"} if kind == "wsgi" else {"/": b"ok", "/one": b"ok", "/log": b"+a-a"}
    for path, expected in answers.items():
        body = await client(path).run(1)
        if body != expected:
            raise ValueError(f"{path} answers {body!r}, not {expected!r}")


async def _answer(client: Clients) -> None:
    """Requests in process: for each line with a path and a number, the seconds of one."""
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        path, n = json.loads(line)
        print(await timed(client(path).run, n), flush=True)


async def _serve(application: Any) -> None:
    import uvicorn

    # With the protocol said, or asyncio does not set TCP_NODELAY on its connections: each answer
    # would take the 40 ms of a delayed acknowledgement. uvicorn's own sockets have it.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # from here on, whoever reads the port can connect
        config = uvicorn.Config(
            application, loop="asyncio", http="httptools", access_log=False, log_level="warning"
        )
        print(listener.getsockname()[1], flush=True)
        await uvicorn.Server(config).serve(sockets=[listener])


async def _main(arguments: argparse.Namespace) -> None:
    application = project.make(arguments.application, arguments.kind)
    client: Clients = partial(SyncClient if arguments.kind == "wsgi" else Client, application)
    await _check(client, arguments.kind)
    if arguments.serve:
        await _serve(application)
    elif arguments.count:
        path, _, times = arguments.count.partition(":")
        await client(path).run(int(times))
    else:
        await _answer(client)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("application", choices=project.APPLICATIONS)
    parser.add_argument("--kind", default="", choices=project.KINDS)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--count", metavar="PATH:TIMES")
    arguments = parser.parse_args()
    asyncio.run(_main(arguments))


if __name__ == "__main__":
    main()
