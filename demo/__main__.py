"""
Run the demo: ``python -m demo``. Starts PostgreSQL and Redis too, unless
``DATABASE_URL`` and ``REDIS_URL`` say where they are.

What takes a moment is imported where it is used, so that the first line is there
at once, and a Ctrl-C finds somebody who heeds it.
"""

import argparse
import errno
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from demo.servers import Server

PORT = 8000


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    for number in SIGNALS:
        signal.signal(number, leave)
    try:
        run(*asked_for())
    except KeyboardInterrupt:
        sys.exit(130)


def leave(*args: object) -> None:
    """
    Leave through the `with` blocks below, which takes a moment. A second Ctrl-C shall not get
    in their way.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def asked_for() -> tuple[str, int | None]:
    """The host and the port. One line says what is wrong with them, if something is."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="What becomes of the connections of requests, with scoped and without.",
        usage="%(prog)s [--host HOST] [--port PORT]",
    )
    parser.add_argument("--host", default="127.0.0.1", help="else 127.0.0.1")
    parser.add_argument("--port", help=f"else that of the environment's PORT, else {PORT}")
    options = parser.parse_args()
    name = "--port" if options.port is not None else "PORT"
    text = options.port if options.port is not None else os.environ.get("PORT")
    if text is None:
        return options.host, None
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < 2**16):
        sys.exit(f"{name} is {text!r}. Make it a number from 0, for any port, to 65535.")
    return options.host, int(text)


def run(host: str, port: int | None) -> None:
    listener = listen(host, port)
    given = [name for name in ("DATABASE_URL", "REDIS_URL") if os.environ.get(name)]
    own = {"DATABASE_URL": "PostgreSQL", "REDIS_URL": "Redis"}.items()
    if started := [server for name, server in own if name not in given]:
        print(f"Starting {' and '.join(started)} ...", flush=True)

    from demo.servers import postgres, redis  # noqa: PLC0415

    with listener, postgres() as database, redis() as broker:
        os.environ |= {"DATABASE_URL": database.url, "REDIS_URL": broker.url}
        for server in (database, broker):
            print(describe(server), flush=True)

        from demo.serve import serve  # noqa: PLC0415

        serve(listener, address_of(listener))


def listen(host: str, port: int | None) -> socket.socket:
    """The asked-for port or none; where none was asked for, the usual one or any."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        sys.exit(f"Cannot listen at {host!r}: it is no address of this machine.")
    try:
        return socket.create_server((host, PORT if port is None else port), family=family)
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            print(f"Port {PORT} is taken: using another.", flush=True)
            return socket.create_server((host, 0), family=family)
        where = PORT if port is None else port
        sys.exit(f"Cannot listen on port {where} of {host}: {os.strerror(error.errno or 0)}.")


def address_of(listener: socket.socket) -> str:
    """What to open in a browser: what ADDRESS says, for it knows of proxies, else where it is."""
    if address := os.environ.get("ADDRESS"):
        return address
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 (is compared: each address of this machine)
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"  # noqa: S104 (only compared)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def describe(server: "Server") -> str:
    """Where it runs, and no password."""
    url = urlsplit(server.url)
    where = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
    return f"{server.name}: {where}" + (f", data in {server.folder}" if server.folder else "")


if __name__ == "__main__":
    main()
