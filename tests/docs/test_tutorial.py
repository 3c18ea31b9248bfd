"""docs/tutorial.md, from an empty folder: every file and every command as they stand there."""

import asyncio
import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest

from tests import pages
from tests.processes import ROOT, eventually
from tests.slowness import within

PAGE = (pages.DOCS / "tutorial.md").read_text()
MODULES = {"django-scoped": "scoped", "pytest-asyncio": "pytest_asyncio"}


class Reader:
    """Follows the page in an empty folder. ``said`` is what the last commands have printed."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        (programs / "python").write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -X dev -W error "$@"\n'
        )
        (programs / "python").chmod(0o755)
        path = os.pathsep.join(
            [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        # Not what is set here for our own tests, nor a plugin that the page installs nowhere.
        ours = ("DJANGO_SETTINGS_MODULE", "SECRET_KEY")
        self.environment = {name: value for name, value in os.environ.items() if name not in ours}
        self.environment |= {"PATH": path, "PYTHONPATH": str(ROOT), **environment}
        self.environment["PYTEST_ADDOPTS"] = "-p no:django"
        self.server: subprocess.Popen[bytes] | None = None
        self.log = (folder / "server.log").open("ab")
        self.url = ""
        self.said = ""

    def block(self, language: str, text: str) -> None:
        if language == "text":
            assert text.strip() in self.said, self.said
        elif language == "sh":
            commands = [shlex.split(line) for line in text.splitlines()]
            if commands[0][0] == "export":
                [line, *rest] = text.splitlines()
                shown = self.run(f'{line}\nprintf "%s\\n" "$ALLOWED_HOSTS" "$SECRET_KEY"')
                names = ("ALLOWED_HOSTS", "SECRET_KEY")
                self.environment |= dict(zip(names, shown.splitlines(), strict=True))
                commands, text = commands[1:], "\n".join(rest)
            if commands[0][0] == "uvicorn":
                [command] = commands
                self.serve(command)
            elif commands[0][0] == "curl":
                self.said = "".join(self.curl(command[1:]) for command in commands)
            else:
                self.said = "\n".join(map(self.run, text.splitlines()))
        else:
            self.write(text)

    def write(self, text: str) -> None:
        first, _, _ = text.partition("\n")
        match = re.fullmatch(r"# ([\w/]+\.(?:py|ini|service))(, at its end)?", first)
        assert match, first
        file = self.folder / match[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a" if match[2] else "w") as opened:
            opened.write(text)

    def run(self, line: str) -> str:
        if "pip install" in line:  # they are the ones that are installed here
            names = line.partition("install ")[2].split()
            missing = [n for n in names if not importlib.util.find_spec(MODULES.get(n, n))]
            assert missing == []
            return ""
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=within(60),
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def serve(self, command: list[str]) -> None:
        self.stop()
        place = command.index("--port") + 1
        assert command[place] == "8000"
        command[place] = "0"  # a free one
        self.log.truncate(0)
        self.server = subprocess.Popen(
            [str(self.folder / "bin" / "python"), "-m", *command],
            cwd=self.folder,
            env=self.environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        eventually(self.answers, 30)

    def answers(self) -> bool:
        assert self.server is not None
        assert self.server.poll() is None, self.output
        # With several workers it says so before any of them listens.
        match = re.search(r"running on (http://127\.0\.0\.1:(\d+))", self.output)
        if match is None:
            return False
        self.url = match[1]
        try:
            socket.create_connection(("127.0.0.1", int(match[2])), within(5)).close()
        except OSError:
            return False
        return True

    @property
    def output(self) -> str:
        return (self.folder / "server.log").read_text()

    def curl(self, options: list[str]) -> str:
        """What curl would print: not every machine has it."""
        assert options[-1] == "http://127.0.0.1:8000/"
        data = next((options[i + 1] for i, name in enumerate(options) if name == "--data"), None)
        with httpx.Client(base_url=self.url, timeout=within(20)) as client:
            if data is None:
                answer = client.get("/")
            else:
                form = {"Content-Type": "application/x-www-form-urlencoded"}
                answer = client.post("/", content=data, headers=form)
        return f"{answer.status_code}\n" if "--write-out" in options else answer.text

    def test_with_pytest_django(self) -> None:
        """As the page tells those who have it."""
        tests, settings = self.folder / "test_guestbook.py", self.folder / "pytest.ini"
        set_up = r"^os\.environ.*\ndjango\.setup.*\nsetup_test_environment\(\).*\n"
        text, found = re.subn(set_up, "", tests.read_text(), flags=re.MULTILINE)
        assert found == 1
        tests.write_text(text)
        line = "DJANGO_SETTINGS_MODULE = guestbook.settings"
        assert f"add\n`{line}` to `pytest.ini`" in PAGE
        settings.write_text(f"{settings.read_text()}{line}\n")
        del self.environment["PYTEST_ADDOPTS"]
        assert "2 passed" in self.run("python -m pytest --quiet")

    def stop(self) -> None:
        """As systemd does, or Ctrl-C: and it ends well, in its time."""
        if self.server is None:
            return
        self.server.send_signal(signal.SIGTERM)
        try:
            self.server.wait(within(30))
        finally:
            if self.server.poll() is None:
                os.killpg(self.server.pid, signal.SIGKILL)
                self.server.wait()
        assert "Finished server process" in self.output, self.output
        self.server = None


@pytest.fixture
def database(postgres_url):
    """An empty one, gone at the end."""
    name = f"guestbook_{os.getpid()}"

    async def execute(sql: str) -> None:
        connection = await asyncpg.connect(postgres_url)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    asyncio.run(execute(f"CREATE DATABASE {name}"))
    yield urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
    asyncio.run(execute(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.timeout(120)
def test_the_tutorial_can_be_followed_to_its_end(tmp_path, database, redis_url):
    reader = Reader(tmp_path, DATABASE_URL=database, REDIS_URL=redis_url)
    seen = set()
    try:
        for language, text in pages.BLOCK.findall(PAGE):
            reader.block(language, text)
            seen.add(language)
        reader.stop()
        reader.test_with_pytest_django()
    finally:
        if reader.server is not None:
            os.killpg(reader.server.pid, signal.SIGKILL)
            reader.server.wait()
        reader.log.close()
    assert seen == {"sh", "python", "text", "ini"}


def test_a_reader_sees_what_the_page_does_not_say(tmp_path):
    reader = Reader(tmp_path)
    with reader.log:
        reader.block("sh", "python -c 'print(1)'")
        reader.block("text", "1\n")
        with pytest.raises(AssertionError):
            reader.block("text", "2\n")
        with pytest.raises(AssertionError):
            reader.block("sh", "python -c 'raise SystemExit(1)'")
        with pytest.raises(AssertionError):
            reader.block("python", "x = 1\n")
