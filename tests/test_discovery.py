"""
Promise 26: what is declared with ``eager=True`` is set up when the server starts, wherever a
project declares it; or it is said that it was too late.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from scoped import lifespan_scope, lifespan_scoped, request_scope
from scoped.core.lifespan import eager
from scoped.discovery import import_resources, import_urls
from tests.startproject import Project

DECLARES = """
from scoped import lifespan_scoped

@lifespan_scoped(eager=True)
async def pool():
    print("pool of", __name__)
    yield "pool"
"""
START = """
import asyncio
from shop.asgi import application

async def main():
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive():
        return next(messages)

    async def send(message):
        print(message["type"])

    await application({"type": "lifespan"}, receive, send)

asyncio.run(main())
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    project.append("settings.py", 'INSTALLED_APPS.remove("shop")\n')
    project.write(
        "asgi.py",
        "from scoped.asgi import get_asgi_application\napplication = get_asgi_application()\n",
    )
    (tmp_path / "start.py").write_text(START)
    return project


def start(project: Project) -> list[str]:
    done = project._python("start.py")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    return lines[:-2]


def listed(project: Project) -> Any:
    rows = json.loads(project.manage("scoped", "--json").stdout)
    return [(row["name"], row["eager"]) for row in rows]


def test_in_resources_of_an_installed_app(project: Project) -> None:
    project.append("settings.py", 'INSTALLED_APPS += ["shop"]\n')
    project.write("resources.py", DECLARES)
    assert start(project) == ["pool of shop.resources"]
    assert listed(project) == [("shop.resources.pool", True)]


def test_in_resources_of_the_projects_package_though_that_is_no_app(project: Project) -> None:
    project.write("resources.py", DECLARES)
    assert start(project) == ["pool of shop.resources"]
    assert listed(project) == [("shop.resources.pool", True)]


def test_in_resources_beside_manage_py(project: Project) -> None:
    (project.folder / "resources.py").write_text(DECLARES)
    assert start(project) == ["pool of resources"]
    assert listed(project) == [("resources.pool", True)]


def test_in_what_the_urlconf_imports(project: Project) -> None:
    project.write("views.py", DECLARES)
    project.append("urls.py", "import shop.views\n")
    assert start(project) == ["pool of shop.views"]
    assert listed(project) == [("shop.views.pool", True)]


def test_not_in_somebody_elses_module_of_that_name(project: Project, tmp_path: Path) -> None:
    elsewhere = tmp_path / "site-packages"
    elsewhere.mkdir()
    (elsewhere / "resources.py").write_text('raise RuntimeError("not the project\'s")\n')
    project.append("settings.py", f"import sys\nsys.path.append({str(elsewhere)!r})\n")
    assert start(project) == []


def test_a_urlconf_that_cannot_be_imported_is_told_and_the_rest_is_set_up(project: Project) -> None:
    project.write("resources.py", DECLARES)
    project.append("urls.py", 'raise RuntimeError("no views")\n')
    assert start(project) == ["pool of shop.resources"]
    said = project._python("start.py").stderr
    assert "The URLconf could not be imported" in said
    assert "RuntimeError: no views" in said


def test_one_whose_package_raises_is_told_of_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "raises").mkdir()
    (tmp_path / "raises" / "__init__.py").write_text("raise RuntimeError('no package')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with override_settings(ROOT_URLCONF="raises.urls"):
        import_resources()
        for _ in range(3):  # as several checks do
            import_urls()
    assert caplog.text.count("The URLconf could not be imported") == 1


@pytest.mark.parametrize("urlconf", [None, "nowhere.urls"])
def test_where_there_is_no_urlconf_there_is_nothing_to_find(
    urlconf: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with override_settings(ROOT_URLCONF=urlconf):
        import_resources()
        import_urls()
    assert ("No module named 'nowhere'" in caplog.text) is (urlconf is not None)


async def test_declared_after_start_up_it_is_told_that_it_is_too_late(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = list(eager)
    try:
        async with lifespan_scope():
            with caplog.at_level(logging.WARNING, "scoped"):

                @lifespan_scoped(eager=True)
                async def late() -> str:
                    return "late"

            assert "late" in caplog.text
            assert "after start-up, too late" in caplog.text
            async with request_scope():
                assert await late() == "late"
    finally:
        eager[:] = before
