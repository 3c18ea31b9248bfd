"""Every code block of the README, run as it stands there; CONTRIBUTING's commands are CI's."""

import asyncio
import contextvars
import re
import runpy
import shlex
import signal
from pathlib import Path

import httpx
import pytest
from django.core.signals import request_finished

from tests import pages
from tests.uvicorn import uvicorn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text.strip() for language, text in BLOCKS if language == "sh"]
NAMED = [(match[1], text) for text in PYTHON if (match := re.match(r"# ([\w/]+\.py)\b", text))]
# Two blocks of one name are one file.
FILES = {name: "\n".join(text for other, text in NAMED if other == name) for name, _ in NAMED}
INSTALL, SERVE, DEMO = SHELL
OTHERS = [text for text in PYTHON if text not in [text for _, text in NAMED]]


@pytest.fixture
def project(tmp_path):
    """The example's files, and what a project has besides."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with (tmp_path / "mysite" / "settings.py").open("a") as settings:
        settings.write(
            'SECRET_KEY = "readme"\nALLOWED_HOSTS = ["*"]\nROOT_URLCONF = "urls"\n',
        )
    (tmp_path / "urls.py").write_text(
        "from django.urls import path\nfrom views import index\nurlpatterns = [path('', index)]\n"
    )
    return tmp_path


def test_the_example_serves_requests(project, postgres_url, redis_url):
    program, application, *options = shlex.split(SERVE)
    assert (program, application) == ("uvicorn", "mysite.asgi:application")
    with uvicorn(
        "mysite.asgi",
        *options,
        directory=project,
        DJANGO_SETTINGS_MODULE="mysite.settings",
        DATABASE_URL=postgres_url,
        REDIS_URL=redis_url,
    ) as server:
        with httpx.Client(base_url=server.url) as client:
            answers = [client.get("/") for _ in range(3)]
        server.stop(signal.SIGINT)
    assert [answer.status_code for answer in answers] == [200] * 3
    visits = [re.fullmatch(r"PostgreSQL \S.*, visit (\d+)", answer.text) for answer in answers]
    assert all(visits), [answer.text for answer in answers]
    first = int(visits[0][1])
    assert [int(visit[1]) for visit in visits] == [first, first + 1, first + 2]
    assert not any("Traceback" in line for line in server.lines)


def test_the_scope_outside_a_request(project, postgres_url, monkeypatch):
    [text] = [text for text in OTHERS if "request_scope()" in text]
    (project / "outside.py").write_text(text)
    monkeypatch.syspath_prepend(project)
    monkeypatch.setenv("DATABASE_URL", postgres_url)
    main = runpy.run_path(str(project / "outside.py"))["main"]
    assert asyncio.run(main()) == 2


async def test_plain_contextvars_with_the_ticket_s_pattern():
    [text] = [text for text in OTHERS if "ContextVar" in text]
    names: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), names)  # noqa: S102 (its own code)
    closed = []

    class Connection:
        async def close(self):
            closed.append(True)

    connection, receiver = names["connection"], names["close_connection"]
    try:
        assert isinstance(connection, contextvars.ContextVar)
        connection.set(Connection())
        await receiver()
        assert closed == [True]
    finally:
        request_finished.disconnect(receiver)


def test_no_block_is_left_out():
    assert set(FILES) == {"resources.py", "views.py", "mysite/asgi.py", "mysite/settings.py"}
    assert len(OTHERS) == 2
    assert INSTALL == "python -m pip install django-scoped"
    assert DEMO.endswith("python -m demo"), ".ci/run runs it as it stands"
    assert all("\n" not in command for command in SHELL)
    assert len(BLOCKS) == len(PYTHON) + len(SHELL)


def test_the_first_screen_says_what_hurts_and_what_one_writes():
    screen = README.splitlines()[:60]
    assert (
        "@request_scoped  # one per request: opened on first use, closed after the last byte"
        in screen
    )
    hurts = screen.index(next(line for line in screen if line.startswith("**What hurts.**")))
    assert hurts < screen.index("```python")


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "RELEASING.md"):
        for target, anchor in pages.LINK.findall(pages.without_blocks(ROOT / name)):
            other = ROOT / target if target else ROOT / name
            assert other.exists(), (name, target)
            if anchor:
                anchors = [pages.anchor(heading) for heading in pages.headings(other)]
                assert anchor in anchors, (name, target, anchor)
