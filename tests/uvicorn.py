"""A real uvicorn in a process of its own."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.slowness import within

ROOT = Path(__file__).parent.parent


class Server:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self.lines.append("<end>")
            self._changed.notify_all()

    def wait_for(self, pattern: str, seconds: float = 20) -> "re.Match[str]":
        """The first line of its log that matches."""
        deadline = time.monotonic() + within(seconds)
        with self._changed:
            while True:
                for line in self.lines:
                    if match := re.search(pattern, line):
                        return match
                left = deadline - time.monotonic()
                if left <= 0 or self.lines[-1:] == ["<end>"]:
                    raise AssertionError(f"no line with {pattern!r} in:\n" + "\n".join(self.lines))
                self._changed.wait(left)

    @property
    def url(self) -> str:
        return self.wait_for(r"running on (http://127\.0\.0\.1:\d+)")[1]

    def stop(self, signal: int, seconds: float = 20) -> int:
        self.process.send_signal(signal)
        code = self.process.wait(within(seconds))
        self._reader.join(within(seconds))
        return code


@contextmanager
def uvicorn(
    module: str, *options: str, directory: Path | None = None, **environment: str
) -> Iterator[Server]:
    process = subprocess.Popen(
        [
            *[sys.executable, "-X", "dev", "-m", "uvicorn"],
            *[f"{module}:application", "--port", "0", *options],
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory or ROOT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "", "PYTHONPATH": str(ROOT), **environment},
    )
    server = Server(process)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        server._reader.join()
        assert process.stderr is not None
        process.stderr.close()
