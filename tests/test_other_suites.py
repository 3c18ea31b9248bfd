"""The tests of a project on Django, run by ``python -m tests.other_suites``."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

CONFTEST = """
from django.conf import settings
from django.http import HttpResponse
from django.urls import path

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])
urlpatterns = [path("", lambda request: HttpResponse())]
"""

THEIRS = """
import tests
from django.test import Client, SimpleTestCase

class Theirs(SimpleTestCase):
    def test_it(self):
        assert tests.__file__ == __file__.replace("test_it", "__init__")
        assert Client().get("/").status_code == 200
"""


def test_a_projects_own_tests_are_served_by_our_handlers_and_by_djangos_to_compare(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "test_it.py").write_text(THEIRS)

    def run(*options: str) -> str:
        command = [sys.executable, "-m", "tests.other_suites", str(tmp_path), *options]
        environment = {**os.environ, "DJANGO_SETTINGS_MODULE": ""}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert "1 passed" in done.stdout, done.stdout + done.stderr
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "1 Client requests, 0 of them without a scope" in run()
    assert "Client requests" not in run("--stock", "-rA")
