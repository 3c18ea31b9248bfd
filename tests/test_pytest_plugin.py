"""scoped.pytest_plugin, in a project of its own whose pytest runs in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = """\
SECRET_KEY = "plugin"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "urls"
INSTALLED_APPS = ["scoped"]
USE_TZ = True
SCOPED = {"SHUTDOWN_TIMEOUT": 0.1}
"""
CONFTEST = """\
import django

django.setup()
pytest_plugins = ["scoped.pytest_plugin"]
"""
RESOURCES = """\
from scoped import lifespan_scoped, request_scoped


@lifespan_scoped
async def pool():
    print("\\npool set up")
    yield object()
    print("\\npool torn down")


@request_scoped
async def db():
    await pool()
    try:
        yield object()
    except BaseException as error:
        print(f"\\ndb saw {type(error).__name__}")
        raise
    else:
        print("\\ndb saw success")


@request_scoped
def sync_db():
    try:
        yield object()
    except BaseException as error:
        print(f"\\nsync_db saw {type(error).__name__}")
        raise
    else:
        print("\\nsync_db saw success")
"""
URLS = """\
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

from resources import db, pool, sync_db


async def index(request):
    await db()
    return HttpResponse("index")


async def stream(request):
    await db()

    async def body():
        yield "stream"

    return StreamingHttpResponse(body())


def sync(request):
    sync_db()
    return HttpResponse("sync")


def sync_stream(request):
    sync_db()
    return StreamingHttpResponse(iter(["stream"]))


urlpatterns = [
    path("", index),
    path("stream", stream),
    path("sync", sync),
    path("sync-stream", sync_stream),
]
"""
# In each of these projects the tests' names say how they are to end.
ASYNC_TESTS = """\
import asyncio
import unittest

import pytest
from resources import db, pool

from scoped import current_scope, inspect

MARK


@pytest.fixture
async def user(request_scope):
    return await db()


async def test_scope_passes(request_scope):
    assert current_scope() is request_scope
    assert await db() is await db()


async def test_fixture_passes(user, request_scope):
    assert await db() is user
    assert await asyncio.create_task(db()) is user


async def test_fixture_fails(user):
    assert await db() is user
    raise ValueError("of the test")


async def test_scope_fails_by_word(request_scope):
    await db()
    pytest.fail("by word")


@pytest.mark.xfail(strict=True)
async def test_scope_xfailed(request_scope):
    await db()
    raise LookupError("expected")


async def test_scope_skipped(request_scope):
    await db()
    pytest.skip()


@pytest.fixture
async def broken(user):
    raise OSError("of a fixture")


async def test_broken_error(broken):
    pass


async def test_client_passes(scoped_client):
    for _ in range(2):
        assert (await scoped_client.get("/")).content == b"index"
    assert await pool() is await pool()


async def test_both_passes(request_scope, scoped_client):
    shared = await pool()
    await db()
    assert (await scoped_client.get("/")).content == b"index"
    assert await pool() is shared
    assert [one.name for one in inspect()].count("the lifespan") == 1


@pytest.mark.filterwarnings("ignore:The test .* is marked with:pytest.PytestWarning")
def test_sync_passes(scoped_client):  # in a module that a mark says to be async
    assert scoped_client.get("/sync").content == b"sync"


async def test_leak_passes_error(scoped_client):
    response = await scoped_client.get("/stream")
    test_leak_passes_error.response = response


async def test_leak_fails(scoped_client):
    response = await scoped_client.get("/stream")
    test_leak_passes_error.response = response
    raise ValueError("is enough")
"""
SYNC_TESTS = """\
import pytest
from resources import sync_db

from scoped import current_scope


@pytest.fixture
def user(request_scope):
    return sync_db()


def test_fixture_passes(user, request_scope):
    assert current_scope() is request_scope
    assert sync_db() is user


def test_fixture_fails(user):
    assert sync_db() is user
    raise ValueError("of the test")


def test_client_passes(scoped_client):
    assert scoped_client.get("/sync").content == b"sync"


def test_leak_passes_error(scoped_client):
    test_leak_passes_error.response = scoped_client.get("/sync-stream")
"""


class Outcome:
    def __init__(self, ran):
        self.text = ran.stdout + ran.stderr
        found = re.findall(r"^(\w+) [\w./]+::(?:\w+::)?(\w+)", ran.stdout, re.MULTILINE)
        self.tests = {name: set() for _, name in found}
        for outcome, name in found:
            self.tests[name].add(outcome)

    def count(self, line):
        return self.text.count(f"\n{line}\n")


def run(folder, *arguments, plugin="pytest_asyncio.plugin", **files):
    files = {"settings": SETTINGS, "conftest": CONFTEST, "resources": RESOURCES} | files
    for name, text in ({"urls": URLS} | files).items():
        (folder / f"{name}.py").write_text(text)
    options = ["-W", "error", "-p", "no:cacheprovider", "-rA", "-s", "-p", plugin, *arguments]
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "pytest", *options],
        cwd=folder,
        env=os.environ
        | {
            "DJANGO_SETTINGS_MODULE": "settings",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",
        },
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return Outcome(ran)


LOOP = ("-o", "asyncio_default_fixture_loop_scope=function")
RUNNERS = {
    "asyncio, function loops": (
        "pytest_asyncio.plugin",
        "",
        'asyncio_mode = "auto"\nasyncio_default_fixture_loop_scope = "function"\n',
    ),
    "asyncio, session loop": (
        "pytest_asyncio.plugin",
        "",
        'asyncio_mode = "auto"\nasyncio_default_fixture_loop_scope = "session"\n'
        'asyncio_default_test_loop_scope = "session"\n',
    ),
    "asyncio, a module's loop by a marker": (
        "pytest_asyncio.plugin",
        'pytestmark = pytest.mark.asyncio(loop_scope="module")',
        'asyncio_mode = "auto"\nasyncio_default_fixture_loop_scope = "module"\n',
    ),
    "anyio": (
        "anyio.pytest_plugin",
        "pytestmark = pytest.mark.anyio\n\n\n"
        '@pytest.fixture\ndef anyio_backend():\n    return "asyncio"',
        "",
    ),
    "anyio, session loop": (
        "anyio.pytest_plugin",
        "pytestmark = pytest.mark.anyio\n\n\n"
        '@pytest.fixture(scope="module")\ndef anyio_backend():\n    return "asyncio"',
        "",
    ),
}


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_test_that_fails_reaches_the_factories(tmp_path, runner):
    plugin, mark, options = RUNNERS[runner]
    (tmp_path / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\n{options}")
    outcome = run(tmp_path, plugin=plugin, test_async=ASYNC_TESTS.replace("MARK", mark))
    expected = {
        "test_scope_passes": {"PASSED"},
        "test_fixture_passes": {"PASSED"},
        "test_fixture_fails": {"FAILED"},
        "test_scope_fails_by_word": {"FAILED"},
        "test_scope_xfailed": {"XFAIL"},
        "test_broken_error": {"ERROR"},
        "test_client_passes": {"PASSED"},
        "test_both_passes": {"PASSED"},
        "test_sync_passes": {"PASSED"},
        "test_leak_passes_error": {"PASSED", "ERROR"},
        "test_leak_fails": {"FAILED"},
    }
    assert outcome.tests == expected, outcome.text
    for failure in [
        "ValueError",
        "Failed",
        "LookupError",
        "OSError",
    ]:
        assert outcome.count(f"db saw {failure}") == 1, (failure, outcome.text)
    # Two scopes, one skipped; two requests; a scope and a request.
    assert outcome.count("db saw success") >= 7, outcome.text
    assert "1 scope(s) still open" in outcome.text
    assert outcome.count("pool set up") == outcome.count("pool torn down") > 0


def test_sync_tests_have_the_same(tmp_path):
    outcome = run(tmp_path, plugin="no:asyncio", test_sync=SYNC_TESTS)
    assert outcome.tests == {
        "test_fixture_passes": {"PASSED"},
        "test_fixture_fails": {"FAILED"},
        "test_client_passes": {"PASSED"},
        "test_leak_passes_error": {"PASSED", "ERROR"},
    }, outcome.text
    assert outcome.count("sync_db saw ValueError") == 1


WHAT_PYTEST_KNOWS = """\
import unittest

import pytest
from django.test import SimpleTestCase
from resources import sync_db


class TestOfUnittest(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _scope(self, request_scope):
        yield

    def test_of_unittest(self):
        sync_db()
        raise ValueError


class TestOfDjango(SimpleTestCase):
    @pytest.fixture(autouse=True)
    def _scope(self, request_scope):
        yield

    def test_of_django(self):
        sync_db()
        raise OSError


@pytest.mark.xfail(strict=True)
def test_that_was_to_fail(request_scope):
    sync_db()


def test_that_unittest_skips(request_scope):
    sync_db()
    raise unittest.SkipTest("as unittest does")
"""


def test_what_pytest_alone_knows_to_have_failed_reaches_them_too(tmp_path):
    outcome = run(tmp_path, plugin="no:asyncio", test_unittest=WHAT_PYTEST_KNOWS)
    assert outcome.tests == {
        "test_of_unittest": {"FAILED"},
        "test_of_django": {"FAILED"},
        "test_that_was_to_fail": {"FAILED"},
    }, outcome.text
    assert "1 skipped" in outcome.text
    for seen in ("ValueError", "OSError", "Failed", "success"):
        assert outcome.count(f"sync_db saw {seen}") == 1, (seen, outcome.text)


INTERRUPTED = """import asyncio
import os
import signal

import pytest
from resources import db, sync_db


@pytest.fixture
def interrupted(request_scope):
    sync_db()
    raise KeyboardInterrupt


async def test_by_ctrl_c(request_scope):
    await db()
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(60)


def test_in_sync_code(request_scope):
    sync_db()
    raise KeyboardInterrupt


def test_in_set_up(interrupted): ...


def test_by_word(request_scope):
    sync_db()
    pytest.exit("enough")
"""


@pytest.mark.parametrize(
    ("test", "seen"),
    [
        ("test_by_ctrl_c", "db saw KeyboardInterrupt"),
        ("test_in_sync_code", "sync_db saw KeyboardInterrupt"),
        ("test_in_set_up", "sync_db saw KeyboardInterrupt"),
        ("test_by_word", "sync_db saw Exit"),
    ],
)
def test_one_that_is_interrupted_has_failed(tmp_path, test, seen):
    outcome = run(
        tmp_path, "-o", "asyncio_mode=auto", "-k", test, *LOOP, test_interrupted=INTERRUPTED
    )
    assert outcome.count(seen) == 1, outcome.text
    assert "saw success" not in outcome.text


BACKEND_OF_EACH = """import pytest
from resources import sync_db

from scoped.testing import AsyncClient, Client


@pytest.fixture(autouse=True)
def anyio_backend():
    return "asyncio"


def test_sync_client_passes(scoped_client):
    assert isinstance(scoped_client, Client)


def test_sync_scope_passes(request_scope):
    assert sync_db() is sync_db()


@pytest.mark.anyio
async def test_async_client_passes(scoped_client):
    assert isinstance(scoped_client, AsyncClient)
"""


def test_a_backend_for_each_test_makes_no_test_async(tmp_path):
    outcome = run(tmp_path, plugin="anyio.pytest_plugin", test_backend=BACKEND_OF_EACH)
    assert set(map(frozenset, outcome.tests.values())) == {frozenset({"PASSED"})}, outcome.text
    assert len(outcome.tests) == 3


# pytest-django

DATABASE = """
from urllib.parse import urlsplit

url = urlsplit(URL)
if url.scheme:
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": url.path.strip("/"),
            "USER": url.username or "",
            "PASSWORD": url.password or "",
            "HOST": url.hostname,
            "PORT": url.port,
            "TEST": {"NAME": "test_plugin"},
        }
    }
else:
    DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "TEST": {"NAME": "test.db"}}}
INSTALLED_APPS = ["scoped", "shows"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
"""
MODELS = """\
from django.db import models


class Show(models.Model):
    title = models.TextField()
"""
ORM_URLS = """\
from asgiref.sync import sync_to_async
from django.db import transaction
from django.http import HttpResponse
from django.urls import path
from shows.models import Show

from scoped import request_scoped


@request_scoped(until="response")
def atomic():
    with transaction.atomic():
        yield


async def index(request):
    await sync_to_async(atomic)()
    await Show.objects.acreate(title="Hamlet")
    return HttpResponse(await Show.objects.acount())


def sync(request):
    atomic()
    Show.objects.create(title="Hamlet")
    return HttpResponse(Show.objects.count())


urlpatterns = [path("", index), path("sync", sync)]
"""
ORM_TESTS = """\
import pytest
from asgiref.sync import sync_to_async
from shows.models import Show
from urls import atomic


@pytest.mark.django_db(transaction=True)
async def test_one_passes(scoped_client):
    for number in (1, 2):
        assert (await scoped_client.get("/")).content == str(number).encode()


@pytest.mark.django_db(transaction=True)
async def test_two_passes(scoped_client):
    await test_one_passes(scoped_client)


async def test_transaction_fails(request_scope, transactional_db):
    await sync_to_async(atomic)()
    await Show.objects.acreate(title="Hamlet")
    raise ValueError


@pytest.mark.django_db(transaction=True)
async def test_z_nothing_passes(request_scope):
    assert not await Show.objects.aexists()


@pytest.mark.django_db
def test_sync_passes(scoped_client):
    for number in (1, 2):
        assert scoped_client.get("/sync").content == str(number).encode()


def test_sync_again_passes(request_scope, db):
    atomic()
    assert not Show.objects.exists()
    Show.objects.create(title="Hamlet")
"""


@pytest.mark.parametrize("vendor", ["postgresql", "sqlite"])
def test_the_database_is_pytest_djangos(tmp_path, request, vendor):
    url = request.getfixturevalue("postgres_url") if vendor == "postgresql" else ""
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\n"
        'asyncio_mode = "auto"\nasyncio_default_fixture_loop_scope = "function"\n'
    )
    (tmp_path / "shows").mkdir()
    (tmp_path / "shows" / "__init__.py").touch()
    (tmp_path / "shows" / "models.py").write_text(MODELS)
    outcome = run(
        tmp_path,
        "-p",
        "pytest_django.plugin",
        settings=SETTINGS + DATABASE.replace("URL", repr(url)),
        conftest='pytest_plugins = ["scoped.pytest_plugin"]\n',
        urls=ORM_URLS,
        test_orm=ORM_TESTS,
    )
    for name, outcomes in outcome.tests.items():
        assert outcomes == {"FAILED" if name.endswith("fails") else "PASSED"}, outcome.text
    assert len(outcome.tests) == 6, outcome.text
    assert "1 failed, 5 passed in" in outcome.text, "and no error or warning at the end"
