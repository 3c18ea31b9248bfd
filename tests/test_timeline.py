"""The demo's timeline and gauges: what they say of each way in which a request ends."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import django
import httpx
import psycopg
import pytest

from demo.buttons import ENDINGS, LOST
from tests import slowness
from tests.processes import ROOT, Demo, Visitor, eventually
from tests.watching import Page, Row, bars

OURS = [
    # name, status, how it ends, first and last byte
    ("fine", 200, "fine", "both"),
    ("sync", 200, "fine", "both"),
    ("raises", 500, "failed", "both"),
    ("missing", 404, "refused", "both"),
    ("children", 200, "fine", "both"),
    ("stream", 200, "fine", "both"),
    ("broken-stream", 200, "broke off", "first"),
    ("leave", None, "client gone", "none"),
    ("commit", 500, "failed", "both"),
    ("background", 202, "fine", "both"),
]
SIZE = 3  # of stock Django's pool
COUNTERPARTS = [ending.name for ending in ENDINGS if ending.has_counterpart]


pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def demo(postgres_url: str, redis_url: str) -> Iterator[Demo]:
    with Demo("--port", "0", DATABASE_URL=postgres_url, REDIS_URL=redis_url) as demo:
        yield demo


@pytest.fixture(scope="module")
def open_page(demo: Demo) -> Iterator[Page]:
    with Page(demo) as page:
        yield page


@pytest.fixture
def page(open_page: Page) -> Iterator[Page]:
    open_page.start_anew()
    yield open_page
    eventually(open_page.settled)


def end(page: Visitor, path: str) -> httpx.Response | None:
    """Send the request, and leave it or be left by it where that is its ending."""
    try:
        if path.endswith("leave"):
            page.timeout = httpx.Timeout(0.5)
        return page.click(path)
    except (httpx.ReadTimeout, httpx.RemoteProtocolError):
        return None
    finally:
        page.timeout = httpx.Timeout(10)


def reset(page: Page) -> None:
    page.click("/reset")
    eventually(lambda: not page.gauge("stock", "in_use"))


class TestOurs:
    def test_every_button_is_here(self) -> None:
        assert {name for name, *_ in OURS} == {ending.name for ending in ENDINGS}
        views = (ROOT / "demo" / "endings.py").read_text()
        assert set(re.findall(r'path\("([\w-]+)"', views)) == set(COUNTERPARTS)

    @pytest.mark.parametrize(("name", "status", "ending", "has"), OURS)
    def test_a_row_says_how_the_request_ended_and_everything_is_torn_down(
        self, page: Page, name: str, status: int | None, ending: str, has: str
    ) -> None:
        path = f"/scoped/{name}"
        response = end(page, path)
        assert (response and response.status_code) == (None if has != "both" else status)
        (row,) = page.ended(path)
        assert (row["ending"], row["status"], row["kind"]) == (ending, status, "scoped")
        assert (row["first_byte"] is not None) == (has in ("both", "first"))
        assert (row["last_byte"] is not None) == (has == "both")
        assert all(within(row, bar) for bar in row["bars"])
        assert [bar["name"] for bar in row["bars"]] == {
            "commit": ["db", "transaction"],
            "background": [],
        }.get(name, ["db"])
        eventually(page.settled)

    def test_ten_children_get_one_connection(self, page: Page) -> None:
        assert page.click("/scoped/children").text == "Ten children asked, 1 got set up."

    def test_a_stream_holds_its_connection_to_the_last_byte(self, page: Page) -> None:
        page.click("/scoped/stream")
        (row,) = page.ended("/scoped/stream")
        assert row["last_byte"] - row["first_byte"] > 0.5
        assert bars(row)["db"]["closing"] >= row["last_byte"]

    def test_a_transaction_ends_before_the_first_byte_and_a_commit_that_fails_is_told(
        self, page: Page, postgres_url: str
    ) -> None:
        response = page.click("/scoped/commit")
        assert response.status_code == 500
        (row,) = page.ended("/scoped/commit")
        transaction, connection = bars(row)["transaction"], bars(row)["db"]
        assert transaction["failed"]
        assert (
            transaction["ended"] <= row["first_byte"] <= row["last_byte"] <= connection["closing"]
        )
        assert (transaction["asked_by"], connection["asked_by"]) == (None, "transaction")
        with psycopg.connect(postgres_url) as database:
            assert database.execute("SELECT count(*) FROM likes").fetchone() == (0,)

    def test_a_background_task_has_a_row_and_a_connection_of_its_own(self, page: Page) -> None:
        page.click("/scoped/background")
        (task,) = page.ended("count likes")
        (request,) = page.ended("/scoped/background")
        assert task["kind"] == "background"
        assert task["ending"] == "fine"
        assert task["ended"] - request["ended"] > 0.5
        assert [bar["name"] for bar in task["bars"]] == ["db"]
        assert within(task, task["bars"][0])

    def test_an_open_page_is_a_request_too_and_ends_when_it_is_closed(
        self, page: Page, demo: Demo
    ) -> None:
        eventually(lambda: page.gauge("pages") == 1)  # another test's have gone
        with Page(demo) as other:
            eventually(lambda: page.gauge("pages") == 2 and page.new("/events"))
            (row,) = page.new("/events")
            assert row["ended"] is None
            assert bars(row)["subscription"]["ended"] is None
            assert other.gauges
        (row,) = page.ended("/events")
        assert row["ending"] == "client gone"
        assert bars(row)["subscription"]["ended"] is not None
        eventually(lambda: page.gauge("pages") == 1)

    def test_a_page_that_opens_is_shown_what_ended_lately(self, page: Page, demo: Demo) -> None:
        page.click("/scoped/fine")
        (row,) = page.ended("/scoped/fine")
        with Page(demo) as later:
            assert later.rows[row["id"]] == row

    def test_health_and_the_page_s_own_files_have_no_row(self, page: Page) -> None:
        for path in ("/health", "/static/demo.css", "/static/demo.js"):
            assert page.get(path).status_code == 200
        page.click("/scoped/fine")
        page.ended("/scoped/fine")
        assert page.new("/health") == page.new("/static") == []


def within(row: Row, bar: dict[str, Any]) -> bool:
    # The row ends when the application returns, so after the last teardown.
    times = [row["began"], bar["began"], bar["ready"], bar["closing"], bar["ended"], row["ended"]]
    return None not in times and all(later - earlier > -0.01 for earlier, later in pairwise(times))


class TestStockDjango:
    @pytest.mark.parametrize("name", COUNTERPARTS)
    def test_it_loses_what_is_said_of_the_django_that_runs(self, page: Page, name: str) -> None:
        reset(page)
        path = f"/stock/{name}"
        end(page, path)
        (row,) = page.ended(path)
        lost = [bar for bar in row["bars"] if bar["ended"] is None]
        assert row["kind"] == "stock"
        assert len(lost) == (0 if name not in LOST else SIZE if name == "children" else 1)
        eventually(lambda: page.gauge("stock", "lost") == len(lost))
        assert page.gauge("stock", "in_use") == len(lost)
        reset(page)
        eventually(lambda: all(bar["ended"] for bar in page.new(path)[0]["bars"]))

    def test_what_is_said_follows_the_version(self, page: Page) -> None:
        always = {"children", "broken-stream"}
        assert (always if django.VERSION >= (6, 1) else set(COUNTERPARTS)) == LOST
        text = page.page()
        assert f"stock Django {django.get_version()}" in text
        assert text.count("connection lost") == len(LOST)
        assert text.count("given back") == len(COUNTERPARTS) - len(LOST)
        assert ("it sees it" in text) == (django.VERSION >= (6, 1))

    def test_with_none_left_a_request_hangs_for_a_few_seconds_and_says_so_and_ours_go_on(
        self, page: Page, demo: Demo
    ) -> None:
        reset(page)
        end(page, "/stock/children")
        eventually(lambda: page.gauge("stock", "in_use") == SIZE)
        assert page.click("/stock/fine").status_code == 500
        (row,) = page.ended("/stock/fine")
        assert row["remark"] == "no connection left"
        assert 2.5 < row["ended"] - row["began"] < 3 + slowness.within(3)
        assert page.click("/scoped/fine").status_code == 200
        eventually(page.settled)
        reset(page)
        assert page.click("/stock/fine").status_code == 200
        assert "NoConnectionLeftError" not in demo.output  # what fails on purpose has no traceback
        reset(page)


class TestThePage:
    def test_only_its_own_files_can_run_or_be_sent_to(self, page: Page) -> None:
        for response in (page.get("/"), page.get("/none"), page.click("/stock/none")):
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
            assert "unsafe" not in policy
        assert not any(word in page.page() for word in ("<style", " style=", " onclick"))

    def test_there_are_no_other_files(self, page: Page) -> None:
        for name in ("demo.py", "%2e%2e%2fsettings.py", ""):
            assert page.get(f"/static/{name}").status_code == 404

    @pytest.mark.parametrize("path", ["/scoped/fine", "/stock/fine", "/reset"])
    def test_a_click_comes_from_the_page(self, page: Page, path: str) -> None:
        assert page.get(path).status_code == 405
        assert page.post(path).status_code == 403

    def test_health_says_when_it_is_not_well(self, postgres_url: str, redis_url: str) -> None:
        with Demo("--port", "0", DATABASE_URL=postgres_url, REDIS_URL=redis_url) as demo:
            with Visitor(demo) as visitor:
                assert visitor.get("/health").text == "Healthy."


class TestSeveralProcesses:
    def test_they_show_one_timeline_and_one_wall(self, postgres_url: str, redis_url: str) -> None:
        environment = {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url}
        with (
            Demo("--port", "0", **environment) as first,
            Demo("--port", "0", **environment) as second,
            Page(first) as page,
            Page(second) as other,
        ):
            eventually(lambda: len(page.gauges) == len(other.gauges))
            other.click("/scoped/fine")
            other.write("from the second")
            (row,) = page.ended("/scoped/fine")
            assert row == other.ended("/scoped/fine")[0]
            eventually(lambda: "from the second" in page.messages)
            end(other, "/stock/children")
            eventually(lambda: page.gauge("stock", "in_use") == SIZE)
            reset(page)  # reaches the other process, too
            assert other.click("/stock/stream").status_code == 200
            reset(page)
