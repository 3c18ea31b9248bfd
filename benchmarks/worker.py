"""
A process that has one of the web applications, and either runs
requests through it when told to on its standard input, or serves it with uvicorn.
"""

# ruff: noqa: PLC0415 (most do without)

import argparse
import asyncio
import json
import socket
import sys
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


async def _check(application: Any) -> None:
    for path, expected in [("/", b"ok"), ("/one", b"ok"), ("/log", b"+a-a")]:
        body = await Client(application, path).run(1)
        if body != expected:
            raise ValueError(f"{path} answers {body!r}, not {expected!r}")


async def _answer(application: Any) -> None:
    """Requests in process: for each line with a path and a number, the seconds of one."""
    await _check(application)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        path, n = json.loads(line)
        print(await timed(Client(application, path).run, n), flush=True)


async def _serve(application: Any) -> None:
    import uvicorn

    await _check(application)
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("application", choices=project.APPLICATIONS)
    parser.add_argument("--receiver", choices=["request_started", "request_finished"])
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    application = project.make(arguments.application, arguments.receiver)
    asyncio.run((_serve if arguments.serve else _answer)(application))


if __name__ == "__main__":
    main()
