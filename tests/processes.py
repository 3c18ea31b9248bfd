"""The demo as a process, and what tests ask of processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import httpx

from tests.slowness import within

ROOT = Path(__file__).parent.parent
COMMAND = (sys.executable, "-X", "dev", "-W", "error", "-m", "demo")
WITHOUT_DEV_MODE = (sys.executable, "-W", "error", "-m", "demo")  # for load: twice as fast


def eventually(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait until the condition holds; what it then is."""
    deadline = time.monotonic() + within(seconds)
    while not (outcome := condition()):
        assert time.monotonic() < deadline, f"not within {within(seconds)} seconds"
        time.sleep(0.02)
    return outcome


def free_port() -> int:
    """One that nobody listens on, a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def ps(*options: str) -> str:
    command = ["ps", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def is_alive(pid: int) -> bool:
    state = ps("-o", "stat=", "-p", str(pid))
    return bool(state) and not state.startswith("Z")  # a zombie is dead


def descendants(pid: int) -> list[int]:
    """All processes that it started, and that those started, and so on."""
    parents = [line.split() for line in ps("-A", "-o", "pid=,ppid=").splitlines()]
    children = [int(child) for child, parent in parents if int(parent) == pid]
    return children + [below for child in children for below in descendants(child)]


# What a process ends with after Ctrl-C. By the signal itself, where that came while Python ran a
# class's generated source: it then takes the KeyboardInterrupt for unhandled, whoever handles it.
BY_CTRL_C = (0, 130, -signal.SIGINT)


class Demo:
    """
    ``python -m demo`` while the ``with`` lasts. Like a shell's, its process has a
    process group of its own.
    """

    def __init__(
        self, *arguments: str, command: Sequence[str] = COMMAND, **environment: str
    ) -> None:
        ours = ("DATABASE_URL", "REDIS_URL", "PORT", "ALLOWED_HOSTS", "DJANGO_SECRET_KEY")
        inherited = {name: value for name, value in os.environ.items() if name not in ours}
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=inherited | environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(within(10))
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._output.close()

    @property
    def output(self) -> str:
        return os.pread(self._output.fileno(), 1_000_000, 0).decode()

    @property
    def url(self) -> str:
        """Where it serves, as soon as it does."""

        def printed() -> str | None:
            assert self.process.poll() is None, self.output
            match = re.search(r"The demo: (\S+)", self.output)
            return match and match[1]

        return str(eventually(printed))

    @property
    def folders(self) -> list[Path]:
        return [Path(folder) for folder in re.findall(r"data in (\S+)", self.output)]

    def press_ctrl_c(self) -> None:
        """As a terminal does: to all the processes of the group."""
        os.killpg(self.process.pid, signal.SIGINT)


class Visitor(httpx.Client):
    """A browser without JavaScript."""

    def __init__(self, demo: Demo | str) -> None:
        super().__init__(base_url=demo if isinstance(demo, str) else demo.url, timeout=within(10))

    def page(self) -> str:
        response = self.get("/")
        assert response.status_code == 200
        return response.text

    @cached_property
    def token(self) -> str:
        match = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', self.page())
        assert match
        return match[1]

    def write(self, text: str) -> httpx.Response:
        return self.post("/messages", data={"text": text, "csrfmiddlewaretoken": self.token})

    def click(self, path: str) -> httpx.Response:
        return self.post(path, headers={"X-CSRFToken": self.token})
