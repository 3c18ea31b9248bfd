"""
Run the demo: ``python -m demo``. Starts PostgreSQL and Redis too, unless
``DATABASE_URL`` and ``REDIS_URL`` say where they are.
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
from urllib.parse import urlsplit

import uvicorn

from demo.servers import Server, postgres, redis

PORT = 8000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description="A message wall.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=os.environ.get("PORT"), help=f"else {PORT}")
    options = parser.parse_args()
    # So that a SIGTERM, too, leaves through the `with` blocks below.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        listener = listen(options.host, options.port)
        with listener, postgres() as database, redis() as broker:
            os.environ |= {"DATABASE_URL": database.url, "REDIS_URL": broker.url}
            for server in (database, broker):
                print(describe(server))
            serve(listener)


def listen(host: str, port: int | None) -> socket.socket:
    """The asked-for port or none; where none was asked for, the usual one or any."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, PORT if port is None else port), family=family)
    except OSError as error:
        if port is not None:
            sys.exit(f"Cannot listen on port {port} of {host}: {error.strerror}.")
    print(f"Port {PORT} is taken: using another.")
    return socket.create_server((host, 0), family=family)


def describe(server: Server) -> str:
    """Where it runs, and no password."""
    url = urlsplit(server.url)
    where = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
    return f"{server.name}: {where}" + (f", data in {server.folder}" if server.folder else "")


class WebServer(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"The wall: http://{host}:{port}/ (Ctrl-C ends it)", flush=True)


def serve(listener: socket.socket) -> None:
    # Without a limit an open event stream would keep uvicorn from ever ending.
    config = uvicorn.Config(
        "demo.asgi:application", lifespan="on", timeout_graceful_shutdown=0.5, log_config=None
    )
    try:
        WebServer(config).run([listener])
    finally:
        # What is left to do takes a moment. A second Ctrl-C shall not get in its way.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
