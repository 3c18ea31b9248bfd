"""docs/testing.md: its tests run as a project's, in pytest processes of their own."""

import os
import subprocess
import sys
import time
import unittest
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import pytest
from django.http import HttpResponse
from django.test import LiveServerTestCase, override_settings
from django.urls import path

from scoped import (
    current_scope,
    inspect,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.testing import override
from tests import pages
from tests.docs.project import urls
from tests.slowness import within

PAGE = pages.DOCS / "testing.md"
ASYNC = ("testing.md", "Tests")
SYNC = ("testing.md", "Sync tests")
FIXTURES = ("testing.md", "Fixtures of pytest's")
DJANGO = ("testing.md", "Django's TestCase")
STAYS = ("testing.md", "What stays set up")
ROOT = Path(__file__).parents[2]

SETTINGS = """\
SECRET_KEY = "docs"
INSTALLED_APPS = ["scoped"]
ROOT_URLCONF = "urls"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
"""
RESOURCES = """\
from scoped import current_scope, lifespan_scoped, request_scoped


@lifespan_scoped
async def pool():
    raise OSError("no server in tests")
    yield


@request_scoped
async def db():
    yield await pool()


@request_scoped
def tenant():
    return "public"
"""
VIEWS = """\
from django.db import connection
from django.http import HttpResponse, StreamingHttpResponse

from resources import db, tenant


async def index(request):
    return HttpResponse(await (await db()).fetchval("SELECT 3"))


async def stream(request):
    async def body():
        for _ in range(2):
            yield str(await (await db()).fetchval("SELECT 3"))

    return StreamingHttpResponse(body())


def whoami(request):
    return HttpResponse(tenant())


def rows(request):
    with connection.cursor() as cursor:
        return HttpResponse(cursor.execute("SELECT number FROM numbers").fetchone()[0])
"""
URLS = """\
from django.urls import path

import views

urlpatterns = [
    path("", views.index),
    path("stream", views.stream),
    path("whoami", views.whoami),
    path("rows", views.rows),
]
"""
# A connection that is closed takes its database in memory along.
ROWS = """\
from django.db import connection
from test_case import ViewTests


class RowTests(ViewTests):
    def setUp(self):
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE numbers (number int)")  # rolled back with the rest
            cursor.execute("INSERT INTO numbers VALUES (7)")

    def test_sync_rows(self):
        assert [self.client.get("/rows").content for _ in range(2)] == [b"7"] * 2

    async def test_async_rows(self):
        async with self.async_client as client:
            for _ in range(2):
                assert (await client.get("/rows")).content == b"7"
"""
SETUP = "import django\n\ndjango.setup()\n"


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-p", "pytest_asyncio.plugin", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "settings",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # twice as fast
        },
        capture_output=True,
        text=True,
        timeout=within(50),
        check=False,
    )


def test_the_tests_of_the_page_pass_in_a_project(tmp_path):
    files = {"settings.py": SETTINGS, "resources.py": RESOURCES, "views.py": VIEWS, "urls.py": URLS}
    for _, section in (ASYNC, SYNC, DJANGO):
        files |= pages.files(PAGE, section)
    files["test_rows.py"] = ROWS
    files["conftest.py"] = SETUP + files["conftest.py"]
    [files["pyproject.toml"]] = pages.blocks(PAGE, ASYNC[1], "toml")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    outcome = run(tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "14 passed" in outcome.stdout, outcome.stdout


REAL = (
    RESOURCES.replace('raise OSError("no server in tests")\n    yield', "yield Pool()")
    + """

class Pool:
    async def fetchval(self, query):
        return 3
"""
)


def test_the_fixtures_of_the_page(tmp_path):
    files = {"settings.py": SETTINGS, "resources.py": REAL, "views.py": VIEWS, "urls.py": URLS}
    files |= pages.files(PAGE, FIXTURES[1])
    files["conftest.py"] = SETUP + files["conftest.py"]
    [files["pyproject.toml"]] = pages.blocks(PAGE, ASYNC[1], "toml")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    outcome = run(tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "2 passed" in outcome.stdout, outcome.stdout


SHARED = """\
from scoped import current_scope, lifespan_scoped, request_scope

log = []


@lifespan_scoped
async def pool():
    log.append("set up")
    yield object()
    print("torn down")


async def test_one():
    async with request_scope():
        await pool()
    assert log == ["set up"]


test_two = test_three = test_one
"""


def test_a_session_shares_its_pool(tmp_path):
    fixture = pages.files(PAGE, STAYS[1])["session.py"]
    (tmp_path / "conftest.py").write_text(SETUP + fixture)
    [text] = pages.blocks(PAGE, STAYS[1], "toml")
    (tmp_path / "pyproject.toml").write_text(text)
    (tmp_path / "settings.py").write_text(SETTINGS)
    (tmp_path / "test_shared.py").write_text(SHARED)
    outcome = run(tmp_path, "-s")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "3 passed" in outcome.stdout
    assert outcome.stdout.count("torn down") == 1


def test_a_function_as_a_value():
    def fake_clock():
        return 12

    @request_scoped
    def clock():
        raise AssertionError

    with override(clock, lambda: fake_clock), request_scope():
        assert clock() is fake_clock


@request_scoped
async def witness():
    try:
        yield "value"
    except ValueError:
        log.append("failure")
        raise
    else:
        log.append("success")


@pytest.fixture
async def scope():
    async with request_scope() as scope:
        yield scope
    assert log == ["success"]


async def test_a_scope_of_a_fixture_works_and_does_not_see_a_failure(scope):
    assert current_scope() is scope
    assert await witness() == "value"
    with pytest.raises(ValueError):
        raise ValueError  # what a test that fails would do


async def test_a_scope_of_the_test_does():
    with pytest.raises(ValueError):
        async with request_scope():
            await witness()
            raise ValueError
    assert log == ["failure"]


# What stays set up; the clients' rows are held by tests/test_testing.py

log: list[str] = []


@lifespan_scoped
async def pool():
    log.append("+pool")
    yield
    log.append("-pool")


@lifespan_scoped
def registry():
    log.append("+registry")
    yield
    log.append("-registry")


@pytest.fixture(autouse=True)
def _fresh():
    log.clear()


async def test_how_long_in_async_code():
    async with lifespan_scope():
        for _ in range(2):
            async with request_scope():
                await pool()
        assert log == ["+pool"]
    assert log == ["+pool", "-pool"]
    log.clear()
    async with request_scope():
        await pool()
    assert log == ["+pool", "-pool"]
    log.clear()
    async with request_scope():
        value = await pool()
        async with lifespan_scope():
            assert await pool() is value
        assert log == ["+pool"]
    assert log == ["+pool", "-pool"]


def test_how_long_in_sync_code():
    with lifespan_scope():
        for _ in range(2):
            with request_scope():
                registry()
        assert log == ["+registry"]
    assert log == ["+registry", "-registry"]


@pytest.mark.parametrize("is_held", [True, False])
def test_how_long_in_a_live_server(is_held):
    def view(request):
        registry()
        return HttpResponse("ok")

    class Tests(LiveServerTestCase):
        databases = frozenset()

        def test(self):
            with lifespan_scope() if is_held else nullcontext():
                for _ in range(2):
                    with urllib.request.urlopen(f"{self.live_server_url}/live") as response:  # noqa: S310 (on loopback)
                        assert response.read() == b"ok"
                    while [scope for scope in inspect() if scope.name == "the request GET /live"]:
                        time.sleep(0.001)  # it ends after its client has all

    with urls(path("live", view)), override_settings(STATIC_URL="static/"):
        unittest.TestSuite([Tests("test")]).run(result := unittest.TestResult())
    assert result.wasSuccessful(), result
    assert log == ["+registry", "-registry"] * (1 if is_held else 2)
