"""One server: its folder, its program, its process. Runs in the watcher."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo.servers.account import Account

__all__ = ["Watcher", "free_port"]

READY = re.compile(rb"ready to accept connections", re.IGNORECASE)


class Watcher:
    """
    Root's folder stays root's; the account of the server may pass through it, and
    others may not even do that. Of what is in it only the data are the account's,
    and root never opens a file there::

        scoped-redis-1jx4o0ci    root, 0710, the account's group
            log                  root, 0600
            passwd               root, what the server takes for /etc/passwd
            programs             root, copied where the account may not read the venv
            data                 the account, 0700
    """

    name: str
    end: signal.Signals

    def __init__(self) -> None:
        # Another account may have no way into TMPDIR.
        within = "/tmp" if os.geteuid() == 0 else None  # noqa: S108 (a folder of our own in it)
        self.folder = Path(tempfile.mkdtemp(prefix=f"scoped-{self.name.lower()}-", dir=within))
        self.log = os.open(self.folder / "log", os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        self.account = Account.for_servers(self.folder)
        self.data = self.folder / "data"
        self.data.mkdir(mode=0o700)
        self.account.give(self.data)
        if self.account.group is not None:
            os.chown(self.folder, -1, self.account.group)
            self.folder.chmod(0o710)
        self.password = secrets.token_hex(24)
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def watch(self, package: Path, programs: list[Path]) -> None:
        """Run the server for as long as there is somebody at the other end of the pipe."""
        try:
            self.program = self.usable(package, programs)
            self.set_up()
            self.start()
            name = self.named(self.version(self.program))
            _report(url=self.url(), name=name, folder=str(self.folder), pid=self.pid)
            for command in sys.stdin:
                if command == "kill\n":
                    self.stop(signal.SIGKILL)
                else:
                    self.start()
                _report(pid=self.pid)
        except Exception as error:
            log = self.logged(0)[-2000:].decode(errors="replace")
            log = log.replace(self.password, "[password]")
            _report(error=f"{self.name} could not be run: {error}\n{log}")
        finally:
            self.stop(self.end)
            self.remove_folder()

    # What the two kinds of server differ in

    def set_up(self) -> None:
        """Make what the server needs before its first start."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def configuration(self) -> str:
        """What it reads from its standard input."""
        return ""

    def url(self) -> str:
        raise NotImplementedError

    def named(self, version: str) -> str:
        """What it is called, in a line that people read."""
        raise NotImplementedError

    # Its program

    def usable(self, package: Path, programs: list[Path]) -> Path:
        """The first that the account may run; where it is none, a copy of the wheel's."""
        for program in programs:
            if self.version(program):
                return program
        for program in programs:
            if program.is_relative_to(package):
                copy = self.copy(package) / program.relative_to(package)
                if self.version(copy):
                    return copy
        raise RuntimeError(f"none of its programs runs: {', '.join(map(str, programs))}")

    def version(self, program: Path) -> str:
        """What the program says; empty where the account cannot run it."""
        try:
            process = self.spawn([str(program), "--version"], output=subprocess.PIPE)
        except OSError:
            return ""
        said = process.communicate()[0].decode()
        return said if process.returncode == 0 else ""

    def copy(self, package: Path) -> Path:
        """Copy a wheel's package, which lies in a folder closed to the account, into ours."""
        skip = shutil.ignore_patterns("include", "*.a", "*.py", "__pycache__")
        target = self.folder / "programs"
        # The programs find the libraries beside the package by a relative path.
        for tree in (package, package.with_name(f"{package.name}.libs")):
            if tree.exists():
                shutil.copytree(tree, target / tree.name, symlinks=True, ignore=skip)
        for path in (target, *target.rglob("*")):
            if not path.is_symlink():  # or root would open what the link points at
                path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
                if path.stat().st_mode & 0o100:
                    path.chmod(path.stat().st_mode | 0o011)
        return target / package.name

    # Its process

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def start(self) -> None:
        """Start the server and wait until it says that it is ready, on a port of its own."""
        first, deadline = not self.port, time.monotonic() + 30
        for _ in range(20):
            if first:
                self.port = free_port()
            before = os.fstat(self.log).st_size
            self.process = self.spawn(self.command(), self.configuration())
            while self.process.poll() is None and time.monotonic() < deadline:
                if READY.search(self.logged(before)):
                    return
                time.sleep(0.02)
            # Somebody else was faster to take the port, or what SIGKILL has left behind of the
            # server is not yet gone: for either, try again.
            self.stop(self.end)
            time.sleep(0.1)
        raise RuntimeError("it does not answer.")

    def spawn(
        self, command: list[str], text: str = "", *, output: int | None = None
    ) -> "subprocess.Popen[bytes]":
        """Run as the account, with nothing of our environment; the text is its standard input."""
        process = subprocess.Popen(
            command,
            cwd=self.data,
            env={"LC_ALL": "C", "PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=self.log if output is None else output,
            stderr=self.log,
            umask=0o077,
            preexec_fn=self.account.enter,  # noqa: PLW1509 (no threads here)
        )
        assert process.stdin is not None  # noqa: S101 (narrows a type)
        with contextlib.suppress(BrokenPipeError):  # it has ended already, as its log will tell
            process.stdin.write(text.encode())
            process.stdin.close()
        process.stdin = None  # communicate() would flush it
        return process

    def stop(self, number: signal.Signals) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def logged(self, since: int) -> bytes:
        return os.pread(self.log, 1_000_000, since)

    def remove_folder(self) -> None:
        for _ in range(100):  # PostgreSQL's children may outlive it, killed, for a moment
            # Follows no link, wherever rmtree() can help it: on Linux and macOS.
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                break
            time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _report(**facts: object) -> None:
    with contextlib.suppress(BrokenPipeError):  # then standard input has ended, too
        os.write(1, json.dumps(facts).encode() + b"\n")
