"""``manage.py scoped`` lists what is declared, and where."""

import gc
import json
import sys
from pathlib import Path

import pytest
from django.core.management import call_command

from scoped import lifespan_scoped, request_scope, request_scoped
from scoped.core import lifespan as lifespans
from scoped.core.resource import Resource
from tests.startproject import Project


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    """Those of one test, not those of all test modules."""
    monkeypatch.setattr(Resource, "declared", type(Resource.declared)())
    before, lifespans.eager[:] = list(lifespans.eager), []
    yield Resource.declared
    lifespans.eager[:] = before


def listed(capsys):
    call_command("scoped")
    return capsys.readouterr().out.splitlines()


def as_json(capsys):
    call_command("scoped", "--json")
    return json.loads(capsys.readouterr().out)


def test_it_says_what_to_do_where_nothing_is_declared(capsys):
    [line] = listed(capsys)
    assert line.startswith("No resource is declared. Decorate a factory with @request_scoped")
    assert as_json(capsys) == []


def test_it_lists_name_lifetime_kind_eagerness_and_place(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    first = sys._getframe().f_lineno + 2

    @lifespan_scoped(eager=True)
    async def pool():
        yield "pool"

    @request_scoped
    async def db():
        return "db"

    @request_scoped
    def tenant():
        yield "tenant"

    @lifespan_scoped
    def registry():
        return "registry"

    rows = as_json(capsys)
    assert [
        (row["name"].rpartition(".")[2], row["lifetime"], row["kind"], row["eager"]) for row in rows
    ] == [
        ("pool", "lifespan", "async generator", True),
        ("db", "request", "coroutine function", False),
        ("tenant", "request", "generator", False),
        ("registry", "lifespan", "function", False),
    ]
    assert {row["file"] for row in rows} == {str(Path("tests", "test_command.py"))}
    assert [row["line"] - first for row in rows] == [0, 4, 8, 12]

    heading, *lines = listed(capsys)
    assert heading.split() == ["NAME", "LIFETIME", "KIND", "EAGER", "DECLARED", "AT"]
    for row, line in zip(rows, lines, strict=True):
        for column in ("name", "lifetime", "kind"):
            assert line[heading.index(column.upper()) :].startswith(row[column] + "  ")
        assert line[heading.index("EAGER") :].startswith("yes" if row["eager"] else "no")
        assert line.endswith(f"  {row['file']}:{row['line']}")


def test_a_place_outside_the_current_directory_is_named_in_full(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    @request_scoped
    def tenant():
        return "tenant"

    assert as_json(capsys)[0]["file"] == __file__


def test_they_are_sorted_by_module_and_line(capsys):
    def declare(module, line, name):
        names = {"__name__": module}
        exec("\n" * line + f"def {name}(): pass", names)  # noqa: S102 (to have a line of it)
        return request_scoped(names[name])

    kept = [declare("b", 1, "z"), declare("a", 20, "x"), declare("b", 0, "y"), declare("a", 3, "z")]
    assert [row["name"] for row in as_json(capsys)] == ["a.z", "a.x", "b.y", "b.z"]
    assert len(kept) == 4


def test_a_builtin_has_no_place(capsys):
    kept = request_scoped(globals)
    [row] = as_json(capsys)
    assert (row["name"], row["file"], row["line"]) == ("builtins.globals", None, None)
    assert listed(capsys)[1].endswith("a builtin")
    assert kept


def test_what_a_function_declares_ends_with_it(capsys, declared):
    def work():
        @request_scoped
        def tenant():
            return tenant  # so in a circle with itself

        with request_scope():
            tenant()
        assert len(declared) == 1

    work()
    gc.collect()
    assert as_json(capsys) == []


def test_in_a_real_project(tmp_path):
    project = Project(tmp_path)
    project.write(
        "resources.py",
        "from scoped import lifespan_scoped, request_scoped\n\n"
        "@lifespan_scoped(eager=True)\nasync def pool():\n    yield 'pool'\n\n"
        "@request_scoped\ndef tenant():\n    return 'tenant'\n",
    )
    project.write(
        "urls.py",
        "from scoped import request_scoped\n\n"
        "@request_scoped\nasync def of_a_view():\n    return 1\n\nurlpatterns = []\n",
    )
    ran = project.manage("scoped")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "NAME                   LIFETIME  KIND                EAGER  DECLARED AT",
        "shop.resources.pool    lifespan  async generator     yes    shop/resources.py:3",
        "shop.resources.tenant  request   function            no     shop/resources.py:7",
        "shop.urls.of_a_view    request   coroutine function  no     shop/urls.py:3",
    ]
    ran = project.manage("scoped", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)[2] == {
        "name": "shop.urls.of_a_view",
        "lifetime": "request",
        "kind": "coroutine function",
        "eager": False,
        "file": "shop/urls.py",
        "line": 3,
    }
