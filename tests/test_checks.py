"""What ``manage.py check`` says of a project before it is served, and of what it keeps silent."""

import contextvars
import linecache
import logging
import re
import runpy
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType

import asgiref
import django
import pytest
from django.apps import apps
from django.conf import settings
from django.core.checks import ERROR, WARNING, run_checks
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.wsgi import WSGIHandler
from django.core.management import call_command, get_commands
from django.core.management.base import SystemCheckError
from django.http import Http404
from django.test import RequestFactory, override_settings
from django.urls import path

import scoped.checks
from scoped import lifespan_scoped, request_scoped
from scoped.asgi import ScopedASGIHandler
from scoped.checks.yields import first_skipped_line
from scoped.core.resource import Resource
from scoped.core.scope import Scope
from scoped.serving.receivers import connect
from scoped.testing import override
from scoped.wsgi import ScopedWSGIHandler
from tests.startproject import Project

HANDLER_ID = "scoped.W001" if django.VERSION < (6, 1) else "scoped.W002"
DOCS = (Path(__file__).parent.parent / "docs" / "checks.md").read_text()


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    """Those of one test, not those of all test modules."""
    monkeypatch.setattr(Resource, "declared", type(Resource.declared)())
    return Resource.declared


def found(check_id=None, *, deploy=False):
    return [
        message
        for message in run_checks(tags=["scoped"], include_deployment_checks=deploy)
        if check_id is None or message.id == check_id
    ]


def check(*options):
    """
    Ours alone, for a library that another test has imported may have brought checks of its
    own. In a Context of its own: checks open caches, which requests would close.
    """
    contextvars.copy_context().run(call_command, "check", "--tag", "scoped", *options)


def test_a_project_without_fault_gets_no_message():
    @request_scoped
    async def db():
        yield "db"

    assert found() == []


def test_they_are_among_all_checks_and_have_a_tag(capsys):
    check("--list-tags")
    assert "scoped" in capsys.readouterr().out.split()


class TestAsgiref:
    @pytest.mark.parametrize("version", ["3.12.1", "3.9", "2.0"])
    def test_an_old_one_is_an_error(self, monkeypatch, version):
        monkeypatch.setattr(asgiref, "__version__", version)
        [message] = found()
        assert (message.id, message.level) == ("scoped.E001", ERROR)
        assert version in message.msg
        assert "3.13" in message.hint

    @pytest.mark.parametrize("version", ["3.13.0", "3.13.0b1", "3.14.2", "4.0"])
    def test_a_newer_one_is_none(self, monkeypatch, version):
        monkeypatch.setattr(asgiref, "__version__", version)
        assert found() == []


class TestSettings:
    """That they come into force, and when not, is in test_conf.py."""

    def test_a_mistyped_key_is_an_error_that_names_the_right_one(self, monkeypatch):
        monkeypatch.setattr(settings, "SCOPED", {"TEARDOWN_TIMOUT": 5}, raising=False)
        [message] = found()
        assert (message.id, message.level) == ("scoped.E002", ERROR)
        assert "TEARDOWN_TIMOUT" in message.msg
        assert "Did you mean TEARDOWN_TIMEOUT in place of TEARDOWN_TIMOUT?" in message.hint

    @pytest.mark.parametrize("key", ["teardown_timeout", "TEARDOWN-TIMEOUT", "TEAR_DOWN_TIMEOUT"])
    def test_other_spellings_are_understood(self, monkeypatch, key):
        monkeypatch.setattr(settings, "SCOPED", {key: 5}, raising=False)
        assert "Did you mean TEARDOWN_TIMEOUT" in found()[0].hint

    def test_each_of_several_is_answered(self, monkeypatch):
        mistakes = {"TEARDOWN_TIMOUT": 5, "MAX_THREADS": 5}
        monkeypatch.setattr(settings, "SCOPED", mistakes, raising=False)
        assert found()[0].hint.endswith(
            "Did you mean MAX_IDLE_THREADS in place of MAX_THREADS? "
            "Did you mean TEARDOWN_TIMEOUT in place of TEARDOWN_TIMOUT?"
        )

    def test_a_key_like_none_is_told_which_there_are(self, monkeypatch):
        monkeypatch.setattr(settings, "SCOPED", {"COLOUR": "red", 5: 5}, raising=False)
        [message] = found()
        assert "5, COLOUR" in message.msg
        assert message.hint.startswith("Known: TEARDOWN_TIMEOUT, SLOW_TEARDOWN, SHUTDOWN_TIMEOUT, ")
        assert message.hint.endswith(", MAX_IDLE_THREADS.")
        assert "Did you mean" not in message.hint

    def test_every_mistake_is_named_at_once(self, monkeypatch):
        mistakes = {"TYPO": 1, "TEARDOWN_TIMEOUT": 0, "MAX_IDLE_THREADS": float("inf")}
        monkeypatch.setattr(settings, "SCOPED", mistakes, raising=False)
        assert [message.msg for message in found("scoped.E002")] == [
            "SCOPED has unknown keys: TYPO.",
            "SCOPED['TEARDOWN_TIMEOUT'] is 0.",
            "SCOPED['MAX_IDLE_THREADS'] is inf.",
        ]

    @pytest.mark.parametrize("value", [None, ["TEARDOWN_TIMEOUT"], "fast"])
    def test_what_is_no_dict_is_an_error(self, monkeypatch, value):
        monkeypatch.setattr(settings, "SCOPED", value, raising=False)
        [message] = found("scoped.E002")
        assert message.hint == "Make it a dict."

    def test_they_stop_the_commands_that_run_the_checks(self, monkeypatch):
        monkeypatch.setattr(settings, "SCOPED", {"TEARDOWN_TIMEOUT": -1}, raising=False)
        with pytest.raises(SystemCheckError, match=r"scoped\.E002"):
            check()

    def test_what_runs_no_checks_logs_them_and_keeps_the_defaults(self, monkeypatch, caplog):
        mistakes = {"TEARDOWN_TIMEOUT": 3, "SHUTDOWN_TIMEOUT": -1}
        monkeypatch.setattr(settings, "SCOPED", mistakes, raising=False)
        before = Scope.teardown_timeout
        apps.get_app_config("scoped").ready()
        [record] = caplog.records
        assert (record.name, record.levelno) == ("scoped", logging.ERROR)
        assert "SCOPED['SHUTDOWN_TIMEOUT'] is -1. Set it to" in record.getMessage()
        assert Scope.teardown_timeout == before

    def test_our_handler_refuses_to_start(self, monkeypatch):
        monkeypatch.setattr(settings, "SCOPED", {"TEARDOWN_TIMOUT": 5}, raising=False)
        with pytest.raises(ImproperlyConfigured, match="Did you mean TEARDOWN_TIMEOUT"):
            ScopedASGIHandler()


packages = count()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A project's package, as yet with urls.py alone; its name is that of no other test's."""
    package = tmp_path / f"site_{next(packages)}"
    package.mkdir()
    for name in ("__init__.py", "urls.py"):
        (package / name).write_text("urlpatterns = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    with override_settings(ROOT_URLCONF=f"{package.name}.urls"):
        yield package
    for module in [name for name in sys.modules if name.partition(".")[0] == package.name]:
        del sys.modules[module]


DJANGOS = (
    "from django.core.asgi import get_asgi_application\napplication = get_asgi_application()\n"
)
OURS = DJANGOS.replace("django.core", "scoped")


class TestHandler:
    def test_djangos_own_is_a_warning(self, site):
        (site / "asgi.py").write_text(DJANGOS)
        [message] = found()
        assert (message.id, message.level) == (HANDLER_ID, WARNING)
        assert str(site / "asgi.py") in message.msg
        assert "from scoped.asgi import get_asgi_application" in message.hint

    @pytest.mark.only_if(django.VERSION < (6, 1), reason="from then on it keeps the Context")
    def test_before_6_1_it_names_the_error_that_is_to_come(self, site):
        (site / "asgi.py").write_text(DJANGOS)
        assert "raise NoScopeError" in found()[0].msg

    @pytest.mark.only_if(django.VERSION >= (6, 1), reason="before, it loses the Context")
    def test_on_6_1_it_says_what_is_not_torn_down(self, site):
        (site / "asgi.py").write_text(DJANGOS)
        assert "not torn down when a stream" in found()[0].msg

    def test_ours_is_none(self, site):
        (site / "asgi.py").write_text(OURS)
        assert found() == []

    @pytest.mark.parametrize(
        "text",
        [
            "import django.core.asgi\napplication = django.core.asgi.get_asgi_application()\n",
            "from django.core import asgi\napplication = asgi.get_asgi_application()\n",
            "from django.core.handlers.asgi import ASGIHandler as Base\napplication = Base()\n",
            "def application():\n    from django.core.asgi import get_asgi_application as get\n",
        ],
    )
    def test_it_is_found_in_other_spellings(self, site, text):
        (site / "asgi.py").write_text(text)
        assert [message.id for message in found()] == [HANDLER_ID]

    @pytest.mark.parametrize(
        "text",
        [
            "from scoped import asgi\napplication = asgi.get_asgi_application()\n",
            "# from django.core.asgi import get_asgi_application\n",
            "from django.core.handlers.asgi import ASGIRequest\n",
            "from django.core.asgi import get_asgi_application as stock\n" + OURS,
            "from somewhere import application\n",
            "this is no Python",
        ],
    )
    def test_what_does_not_show_it_gets_no_warning(self, site, text):
        (site / "asgi.py").write_text(text)
        assert found() == []

    def test_the_file_is_not_run(self, site):
        (site / "asgi.py").write_text(DJANGOS + "raise SystemExit('run')\n")
        assert len(found()) == 1
        assert f"{site.name}.asgi" not in sys.modules

    def test_asgi_application_names_the_file(self, site):
        (site / "asgi.py").write_text(DJANGOS)
        (site / "routing.py").write_text(OURS)
        with override_settings(ASGI_APPLICATION=f"{site.name}.routing.application"):
            assert found() == []
        (site / "routing.py").write_text(DJANGOS)
        with override_settings(ASGI_APPLICATION=f"{site.name}.routing.application"):
            assert [str(site / "routing.py") in message.msg for message in found()] == [True]

    @pytest.mark.parametrize("setting", ["ASGI_APPLICATION", "WSGI_APPLICATION"])
    @pytest.mark.parametrize(
        "value", ["nowhere.routing.application", "broken.routing.application", "application", 3]
    )
    def test_an_application_that_cannot_be_found_is_somebody_elses_error(
        self, site, setting, value, tmp_path, monkeypatch
    ):
        (tmp_path / "broken.py").write_text("1 / 0\n")
        monkeypatch.syspath_prepend(tmp_path)
        with override_settings(**{setting: value}):
            assert found() == []

    def test_settings_in_a_package_of_their_own_are_understood(self, site):
        (site / "settings").mkdir()
        (site / "settings" / "__init__.py").touch()
        (site / "settings" / "production.py").touch()
        (site / "asgi.py").write_text(DJANGOS)
        module = f"{site.name}.settings.production"
        with override_settings(ROOT_URLCONF="tests.urls", SETTINGS_MODULE=module):
            assert [message.id for message in found()] == [HANDLER_ID]

    def test_the_wsgi_application_shows_where_to_look(self, site):
        (site / "wsgi.py").touch()
        (site / "asgi.py").write_text(DJANGOS)
        wsgi = f"{site.name}.wsgi.application"
        with override_settings(ROOT_URLCONF="tests.urls", WSGI_APPLICATION=wsgi):
            assert [message.id for message in found()] == [HANDLER_ID]

    def test_it_is_silenced_as_any_other(self, site, capsys):
        (site / "asgi.py").write_text(DJANGOS)
        with override_settings(SILENCED_SYSTEM_CHECKS=[HANDLER_ID]):
            check("--fail-level", "WARNING")
        assert "1 silenced" in capsys.readouterr().out


class TestWSGI:
    @pytest.fixture
    def async_resource(self):
        @request_scoped
        async def db():
            yield "db"

        return db

    def test_async_resources_and_no_asgi_application_are_a_warning(self, site, async_resource):
        (site / "wsgi.py").touch()
        [message] = found()
        assert (message.id, message.level) == ("scoped.W003", WARNING)
        assert async_resource.resource.factory.name in message.msg

    def test_the_setting_will_do(self, site, async_resource):
        with override_settings(WSGI_APPLICATION=f"{site.name}.wsgi.application"):
            assert [message.id for message in found()] == ["scoped.W003"]

    def test_sync_resources_work_there(self, site):
        @lifespan_scoped
        def registry():
            yield "registry"

        (site / "wsgi.py").touch()
        assert found() == []

    def test_an_asgi_application_beside_it_is_enough(self, site, async_resource):
        (site / "wsgi.py").touch()
        (site / "asgi.py").write_text(OURS)
        assert found() == []

    def test_a_project_that_shows_neither_gets_no_warning(self, site, async_resource):
        assert found() == []

    def test_what_the_views_declare_is_seen_too(self, site):
        (site / "wsgi.py").touch()
        (site / "urls.py").write_text(
            "from scoped import request_scoped\n"
            "@request_scoped\nasync def of_a_view():\n    return 1\nurlpatterns = []\n"
        )
        assert "urls.of_a_view" in found("scoped.W003")[0].msg


class TestRunserver:
    """No check is told which command runs: `sys.argv` says so."""

    @pytest.fixture
    def site(self, site, monkeypatch):
        (site / "asgi.py").write_text(OURS)
        monkeypatch.chdir(site.parent)
        monkeypatch.setattr(sys, "argv", ["manage.py", "runserver", "8001"])
        return site

    @pytest.fixture
    def db(self):
        @request_scoped
        async def db():
            yield "db"

        return db

    def test_where_async_resources_are_declared_it_says_how_to_serve_them(self, site, db):
        [message] = found()
        assert (message.id, message.level) == ("scoped.W005", WARNING)
        assert db.resource.factory.name in message.msg
        assert f"`uvicorn --reload {site.name}.asgi:application" in message.hint

    def test_it_names_the_application_as_servers_take_it(self, site, db, monkeypatch):
        inner = site / "inner"
        inner.mkdir()
        for name in ("__init__.py", "settings.py"):
            (inner / name).touch()
        (site / "asgi.py").rename(inner / "asgi.py")
        with override_settings(ROOT_URLCONF=None, SETTINGS_MODULE=f"{site.name}.inner.settings"):
            monkeypatch.chdir(inner)
            [message] = found()
            assert f"`uvicorn --reload {site.name}.inner.asgi:application " in message.hint
        (site / "routing.py").write_text(OURS)
        with override_settings(ASGI_APPLICATION=f"{site.name}.routing.app"):
            [message] = found()
            assert f"`uvicorn --reload {site.name}.routing:app " in message.hint

    def test_a_setting_that_names_none_is_none(self, site, db):
        with override_settings(ASGI_APPLICATION=""):
            [message] = found()
        assert f"`uvicorn --reload {site.name}.asgi:application " in message.hint

    def test_a_folder_of_sources_is_no_package(self, site, db, monkeypatch):
        monkeypatch.syspath_prepend(site.parent.parent)
        [message] = found()
        assert f"`uvicorn --reload {site.name}.asgi:application " in message.hint

    def test_that_of_staticfiles_is_djangos_too(self, site, db):
        with apps_with("django.contrib.staticfiles"):
            assert [message.id for message in found()] == ["scoped.W005"]

    def test_that_of_another_app_may_serve_over_asgi(self, site, db, monkeypatch):
        monkeypatch.setattr(scoped.checks, "get_commands", lambda: {"runserver": "daphne"})
        assert found() == []

    @pytest.mark.parametrize("argv", [["manage.py", "check"], ["manage.py"], ["uvicorn"]])
    def test_other_commands_are_not_meant(self, site, db, monkeypatch, argv):
        monkeypatch.setattr(sys, "argv", argv)
        assert found() == []

    def test_sync_resources_work_there(self, site):
        @request_scoped
        def tenant():
            return "tenant"

        assert found() == []

    def test_a_project_without_an_asgi_application_is_told_that_and_no_more(self, site, db):
        (site / "asgi.py").unlink()
        (site / "wsgi.py").touch()
        assert [message.id for message in found()] == ["scoped.W003"]


@contextmanager
def apps_with(name):
    with override_settings(INSTALLED_APPS=[*settings.INSTALLED_APPS, name]):
        get_commands.cache_clear()
        yield
    get_commands.cache_clear()


class TestDeploy:
    """What `check --deploy` adds: tests override, and every new project has a wsgi.py."""

    @pytest.fixture
    def transaction(self):
        @request_scoped
        def transaction():
            yield "transaction"

        return transaction

    def test_an_override_in_force_is_named_with_its_resource(self, site, transaction):
        with override(transaction, "a fake"):
            assert found() == []
            [message] = found(deploy=True)
        assert (message.id, message.level) == ("scoped.W006", WARNING)
        assert message.obj is transaction.resource
        assert str(message).startswith(str(transaction.resource))
        assert found(deploy=True) == []

    @pytest.mark.parametrize(
        "source",
        [
            "from django.core.wsgi import get_wsgi_application\n",
            "from django.core.handlers import wsgi\nwsgi.WSGIHandler()\n",
            "from django.core.handlers.wsgi import WSGIHandler\n",
        ],
    )
    def test_djangos_wsgi_handler_is_a_warning_where_sync_resources_are_torn_down(
        self, site, transaction, source
    ):
        (site / "wsgi.py").write_text(source)
        assert found() == []
        messages = [message.id for message in found(deploy=True)]
        if "WSGIHandler()" in source:  # no name of it is imported: not every way is seen
            assert messages == []
            return
        assert messages == ["scoped.W007"]
        [message] = found(deploy=True)
        assert transaction.resource.factory.name in message.msg
        assert f"{site.name}/wsgi.py serves" in message.msg
        assert "scoped.wsgi" in message.hint

    def test_ours_is_none(self, site, transaction):
        (site / "wsgi.py").write_text("from scoped.wsgi import get_wsgi_application\n")
        assert found(deploy=True) == []

    def test_where_nothing_would_commit_it_is_none(self, site):
        @request_scoped
        def tenant():
            return "tenant"

        @lifespan_scoped
        def registry():
            yield "registry"

        (site / "asgi.py").write_text(OURS)
        (site / "wsgi.py").write_text("from django.core.wsgi import get_wsgi_application\n")
        assert found(deploy=True) == []

    @pytest.mark.parametrize(
        ("handler", "ending"), [(WSGIHandler, "committed"), (ScopedWSGIHandler, "rolled back")]
    )
    def test_what_it_says_of_djangos_wsgi_handler_is_so(self, handler, ending):
        log = []

        @request_scoped
        def transaction():
            try:
                yield
            except BaseException:
                log.append("rolled back")
                raise
            log.append("committed")

        def view(request):
            transaction()
            raise Http404

        module = ModuleType("urls")
        module.urlpatterns = [path("", view)]
        connect()
        with override_settings(ROOT_URLCONF=module, ALLOWED_HOSTS=["*"]):
            statuses = []
            environ = RequestFactory()._base_environ(PATH_INFO="/")

            def serve():
                handler()(environ, lambda status, headers: statuses.append(status)).close()

            contextvars.copy_context().run(serve)
        assert statuses == ["404 Not Found"]
        assert log == [ending]


# In each a failure would skip what is in the line of `close()`, and that first.
SKIPPED = {
    "after it": """
        c = 1
        yield c
        close()
    """,
    "after a with": """
        with a:
            yield
        close()
    """,
    "after try and finally": """
        try: yield
        finally: pass
        close()
    """,
    "after try and except": """
        try: yield
        except Exception: log()
        close()
    """,
    "after a failure that is raised again": """
        try: yield
        except BaseException: raise
        close()
    """,
    "in the same branch": """
        if a:
            yield
            close()
    """,
    "after branches": """
        if a: yield 1
        else: yield 2
        close()
    """,
    "after a match": """
        match a:
            case 1: yield
        close()
    """,
    "after a loop that it leaves": """
        while True: yield; break
        "nothing"
        close()
    """,
    "in a loop after it": """
        yield
        for c in d:
            c.close()
    """,
    "in a with that comes after it": """
        yield
        pass
        with a: close()
    """,
    "in a try that comes after it": """
        yield
        try:
            close()
        finally: pass
    """,
    "in a finally that comes after it": """
        yield
        try: pass
        finally: close()
    """,
    "in an except that comes after it": """
        yield
        try: pass
        except ValueError: close()
    """,
    "in the else in which it stands": """
        try: pass
        except ValueError: c = None
        else: yield c; close()
    """,
    "after an else, which the except is not for": """
        try: c = connect()
        except: c = None
        else: yield c
        close()
    """,
    "in a handler in which it stands": """
        try: pass
        except ValueError:
            yield; close()
    """,
    "in the finally in which it stands": """
        try: pass
        finally:
            yield; close()
    """,
    "on return": """
        c = 1
        yield c
        return c.close()
    """,
    "by assignment": """
        global c
        yield
        c = None  # in place of close()
    """,
    "after another generator": """
        c = 1
        yield from other()
        close()
    """,
    "in an except though there is a finally": """
        yield
        try: pass
        except ValueError: close()
        finally: pass
    """,
    "in an else that comes after it": """
        yield
        try: pass
        except ValueError: pass
        else: close()
    """,
    "after a try that swallows another failure": """
        yield
        try: pass
        except: return
        close()
    """,
    "after a handler in which it stands": """
        try: c = connect()
        except OSError: yield None
        close()
    """,
    "in the other branch": """
        if a: pass
        else:
            yield
            close()
    """,
    "of a value that is sent": """
        c = 1
        d = yield c
        close()
    """,
}

NOT_SKIPPED = {
    "nothing": "yield",
    "nothing to speak of": """
        yield
        "The end."
        pass
        ...
        return
    """,
    "return of what is there": """
        c = 1
        yield c
        return c
    """,
    "finally": """
        try: yield
        finally: close()
    """,
    "with": """
        with a as c:
            yield c
    """,
    "commit in a with": """
        with a as c:
            yield c
            c.commit()
    """,
    "commit in a try": """
        try:
            yield
            commit()
        except BaseException:
            rollback()
            raise
    """,
    "commit in else": """
        try: yield
        except BaseException:
            rollback()
            raise
        else: commit()
    """,
    "commit in else, and finally": """
        try: yield
        except ValueError: rollback()
        else: commit()
        finally: close()
    """,
    "all around": """
        with a:
            b()
            try: yield
            except ValueError: raise
            else: commit()
            c()
    """,
    "after a failure that is swallowed": """
        try: yield
        except: log()
        close()
    """,
    "after any failure that is swallowed": """
        try: yield
        except (BaseException, ValueError): log()
        close()
    """,
    "another branch": """
        if a:
            yield 1
            return
        with b as c:
            yield c
    """,
    "another branch that has ended": """
        if a:
            yield 1
            return
        b = 2
        yield b
    """,
    "another yield": """
        if a: yield 1
        if not a: yield 2
    """,
    "a handler's branch": """
        try: c = connect()
        except OSError:
            yield None
            return
        with c: yield c
    """,
    "else within finally": """
        try: c = connect()
        except OSError: raise
        else:
            yield c
            c.commit()
        finally: close()
    """,
    "a function that yields": """
        def f():
            yield
            close()
        g = lambda: (yield)
        close(f, g)
        yield f
    """,
    "a loop": """
        for _ in range(3):
            try: c = connect()
            except OSError: continue
            with c: yield c
            break
    """,
    "a function that is defined after it": """
        yield
        def f(): close()
    """,
    "a raise": """
        yield
        raise AssertionError
    """,
}


def factory_with(body, tmp_path, *, is_async=False):
    """A factory with that body, from a file, as any is."""
    lines = body.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip()) if len(lines) > 1 else 0
    lines = ["    " + line[indent:] for line in lines if line.strip()]
    if is_async:
        lines = [line.replace("with a", "async with a") for line in lines]
    path = tmp_path / "factories.py"
    path.write_text("\n".join([f"{'async ' * is_async}def factory():", *lines, ""]))
    return runpy.run_path(str(path))["factory"]


def line_of_close(tmp_path):
    lines = (tmp_path / "factories.py").read_text().splitlines()
    [number] = [number for number, line in enumerate(lines, 1) if "close()" in line]
    return number


class TestYields:
    @pytest.mark.parametrize("body", SKIPPED.values(), ids=SKIPPED)
    def test_what_a_failure_would_skip_is_found(self, body, tmp_path):
        line = first_skipped_line(factory_with(body, tmp_path))
        assert line == line_of_close(tmp_path)

    @pytest.mark.parametrize("body", NOT_SKIPPED.values(), ids=NOT_SKIPPED)
    def test_what_is_safe_or_meant_so_is_not(self, body, tmp_path):
        assert first_skipped_line(factory_with(body, tmp_path)) is None

    @pytest.mark.parametrize("name", ["after it", "after a with", "with", "commit in a with"])
    def test_async_ones_are_looked_at_alike(self, name, tmp_path):
        body = {**SKIPPED, **NOT_SKIPPED}[name]
        line = first_skipped_line(factory_with(body, tmp_path, is_async=True))
        assert line == (line_of_close(tmp_path) if name in SKIPPED else None)

    def test_the_warning_names_the_resource_and_its_place_and_the_line(self):
        @request_scoped
        async def client():
            client = object()
            yield client
            del client  # four lines below its decorator

        [message] = found()
        factory = client.resource.factory
        assert (message.id, message.level) == ("scoped.W004", WARNING)
        assert str(message).startswith(f"{factory}: (scoped.W004) ")
        line = int(factory.declared_at.rpartition(":")[2]) + 4
        assert f"Line {line} is skipped when the request fails" in message.msg
        assert "`finally:`" in message.hint
        assert "`else:`" in message.hint

    def test_of_a_lifespan_it_says_so(self):
        @lifespan_scoped
        def registry():
            yield "registry"
            print("torn down")

        assert "when the lifespan fails" in found()[0].msg

    def test_a_string_over_several_lines_does_not_hide_it(self):
        @request_scoped
        def text():
            yield """
to the left of everything
"""
            print("torn down")

        assert [message.id for message in found()] == ["scoped.W004"]

    def test_factories_that_show_no_source_get_no_warning(self):
        names = {"request_scoped": request_scoped}
        exec("@request_scoped\ndef unseen():\n    yield 1\n    print()\n", names)  # noqa: S102 (source is not found)
        kept = [names["unseen"], request_scoped(lambda: (yield)), request_scoped(globals)]
        assert found() == []
        assert len(Resource.declared) == len(kept)

    @pytest.mark.parametrize(
        "edited", ["def factory(\n    print((1\n", "('\n\n", '""" \n', "\0\n\0", ""]
    )
    def test_a_source_that_has_been_edited_since_gets_no_warning(self, tmp_path, edited):
        factory = factory_with(SKIPPED["after it"], tmp_path)
        (tmp_path / "factories.py").write_text(edited)
        linecache.checkcache()
        assert first_skipped_line(factory) is None

    def test_a_lambda_is_not_taken_for_the_function_around_it(self, tmp_path):
        body = "inner = lambda: (yield); yield inner; inner.close()"
        path = tmp_path / "factories.py"
        path.write_text(f"def outer(): {body}\n")
        outer = runpy.run_path(str(path))["outer"]
        assert first_skipped_line(outer) == 1
        assert first_skipped_line(next(outer())) is None

    def test_functions_and_coroutine_functions_get_no_warning(self):
        @request_scoped
        def user():
            return print

        @request_scoped
        async def tenant():
            print("tenant")

        assert found() == []


def sections():
    """Of docs/checks.md: the id and the text of each."""
    _, *parts = re.split(r"^## ", DOCS, flags=re.MULTILINE)
    return {part.partition("\n")[0]: part for part in parts}


class TestDocs:
    def test_every_check_has_its_section(self):
        source = Path(scoped.checks.__file__).read_text()
        assert list(sections()) == sorted(set(re.findall(r'id="(scoped\.\w+)"', source)))

    def test_of_the_factories_there_the_first_is_warned_of_and_no_other(self, tmp_path):
        blocks = re.findall(r"^```python\n(.*?)^```$", sections()["scoped.W004"], re.M | re.S)
        lines = []
        for block in blocks:
            (tmp_path / "block.py").write_text(block)
            names = runpy.run_path(
                str(tmp_path / "block.py"), {"request_scoped": lambda factory: factory}
            )
            [factory] = [names[name] for name in re.findall(r"^async def (\w+)", block, re.M)]
            lines.append(first_skipped_line(factory))
        assert len(lines) == 5
        assert lines == [5, None, None, None, None]
        assert "# skipped" in blocks[0].splitlines()[4]

    def test_the_mistake_in_a_setting_is_answered_as_it_says(self, monkeypatch):
        [setting] = re.findall(r"^SCOPED = (\{.*\})  # (.*)$", sections()["scoped.E002"], re.M)
        monkeypatch.setattr(settings, "SCOPED", eval(setting[0]), raising=False)  # noqa: S307 (the page's)
        assert setting[1] in found()[0].hint


RESOURCES = """\
from scoped import request_scoped


@request_scoped
async def db():
    yield "db"
    print("closed")
"""


class TestARealProject:
    """One that ``django-admin startproject`` made, and ``manage.py check`` in it."""

    @pytest.fixture
    def project(self, tmp_path):
        return Project(tmp_path)

    def test_it_is_told_all_and_then_has_no_issue_left(self, project):
        project.write("resources.py", RESOURCES)
        checked = project.manage("check")
        assert checked.returncode == 0, checked.stderr
        assert f"({HANDLER_ID}) shop/asgi.py serves the project" in checked.stderr
        assert re.search(
            r"shop\.resources\.db \(\S+resources\.py:4\): \(scoped\.W004\) Line 7 is skipped",
            checked.stderr,
        )
        assert "identified 2 issues" in checked.stderr

        asgi = project.file("asgi.py").read_text()
        project.write("asgi.py", asgi.replace("django.core.asgi", "scoped.asgi"))
        project.write("resources.py", RESOURCES.replace('    print("closed")\n', ""))
        checked = project.manage("check", "--fail-level", "WARNING")
        assert checked.returncode == 0, checked.stderr
        assert "no issues" in checked.stdout

        project.file("asgi.py").unlink()
        checked = project.manage("check", "--fail-level", "WARNING")
        assert checked.returncode == 1
        assert "(scoped.W003)" in checked.stderr

    def test_who_follows_the_readme_to_runserver_is_told_how_to_serve(self, project):
        project.write("resources.py", RESOURCES.replace('    print("closed")\n', ""))
        asgi = project.file("asgi.py").read_text()
        project.write("asgi.py", asgi.replace("django.core.asgi", "scoped.asgi"))
        project.append("wsgi.py", "raise SystemExit('it would serve now')\n")
        project.append("settings.py", "DATABASES = {}\n")
        run = project.manage("runserver", "--noreload", "127.0.0.1:0")
        assert "(scoped.W005) Django's runserver is a WSGI server." in run.stderr
        assert "uvicorn --reload shop.asgi:application" in run.stderr

    def test_an_override_that_is_left_in_the_code_is_found_before_it_is_deployed(self, project):
        left = "from scoped.testing import override\noverride(db, 'a fake').__enter__()\n"
        project.write("resources.py", RESOURCES.replace('    print("closed")\n', "") + left)
        assert "scoped.W006" not in project.manage("check").stderr
        checked = project.manage("check", "--deploy", "--tag", "scoped")
        assert "shop.resources.db (" in checked.stderr
        assert "(scoped.W006) An override() of it is in force" in checked.stderr

    def test_a_mistyped_setting_is_reported_by_check_and_refused_by_the_server(self, project):
        project.append("settings.py", 'SCOPED = {"TEARDOWN_TIMOUT": 5}\n')
        checked = project.manage("check")
        assert checked.returncode == 1
        assert "(scoped.E002) SCOPED has unknown keys: TEARDOWN_TIMOUT." in checked.stderr
        assert "Did you mean TEARDOWN_TIMEOUT in place of TEARDOWN_TIMOUT?" in checked.stderr
        assert "Traceback" not in checked.stderr

        project.write("asgi.py", "from scoped.asgi import get_asgi_application as a\na()\n")
        served = project.manage("shell", "-c", "import shop.asgi")
        assert served.returncode != 0
        assert "ImproperlyConfigured: SCOPED has unknown keys: TEARDOWN_TIMOUT." in served.stderr
