"""Django inside another ASGI application, which passes no lifespan on. Promise 16."""

import signal

import httpx
import pytest

from tests import pages
from tests.uvicorn import ROOT, uvicorn

pytestmark = [pytest.mark.neighbours, pytest.mark.timeout(300)]

STARLETTE = ("serving.md", "Inside Starlette or FastAPI")


@pytest.fixture
def served(tmp_path):
    """uvicorn, after three requests, ended by SIGTERM."""

    def serve(**environment):
        page, section = STARLETTE
        for name, text in pages.files(pages.DOCS / "recipes" / page, section).items():
            (tmp_path / name).write_text(text)
        path = f"{ROOT}:{tmp_path}"
        with uvicorn("tests.neighbours.mounted", PYTHONPATH=path, **environment) as server:
            with httpx.Client(base_url=server.url) as client:
                assert [client.get("/").text for _ in range(3)] == ["pool"] * 3
            server.stop(signal.SIGTERM)
        return server.lines

    return serve


def test_the_recipe_holds_the_lifespan_as_long_as_the_server_lives(served):
    lines = served(WITH_THE_RECIPE="yes")
    assert lines.count("pool torn down") == 1
    assert not any("the server has not begun one" in line for line in lines)


def test_without_it_one_line_says_what_is_missing(served):
    lines = served()
    assert sum("the server has not begun one" in line for line in lines) == 1
