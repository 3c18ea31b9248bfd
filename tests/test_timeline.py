"""The demo's timeline, gauges and runs: what they say of each way in which a request ends."""

import html
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import django
import httpx
import psycopg
import pytest

from demo.stage.buttons import ALONE, ENDINGS, PAIRS, Ending
from demo.stage.code import Listing
from demo.stage.runs import MIX, mixed_list
from tests.processes import Demo, Visitor, eventually
from tests.watching import Page, Row, bars

OURS = [
    # name, status, how it ends, first and last byte
    ("fine", 200, "fine", "both"),
    ("sync", 200, "fine", "both"),
    ("stream", 200, "fine", "both"),
    ("missing", 404, "refused", "both"),
    ("raises", 500, "failed", "both"),
    ("leave", None, "client gone", "none"),
    ("broken-stream", 200, "broke off", "first"),
    ("children", 200, "fine", "both"),
    ("commit", 500, "failed", "both"),
    ("background", 202, "fine", "both"),
    ("release", 200, "fine", "both"),
    ("long-stream", 200, "fine", "both"),
    ("turns", 200, "fine", "both"),
    ("setup-fails", 500, "failed", "both"),
    ("teardown-raises", 200, "fine", "both"),
    ("teardown-hangs", 200, "fine", "both"),
]
HOLDS = {
    "commit": ["db", "transaction"],
    "background": [],
    "turns": ["turn"],
    "setup-fails": ["db", "refused"],
    "teardown-raises": ["db", "careless"],
    "teardown-hangs": ["db", "stuck"],
}
SIZE = 10  # of each pool
COUNTERPARTS = [ending.name for ending in PAIRS if ending.is_in_runs]
# Those after which stock Django's connection is lost, on the Django that runs.
LOST = {"children", "broken-stream"}
if django.VERSION < (6, 1):
    LOST = set(COUNTERPARTS)


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
        return page.post(path)
    except (httpx.ReadTimeout, httpx.RemoteProtocolError):
        return None
    finally:
        page.timeout = httpx.Timeout(10)


def reset(page: Page) -> None:
    # What is cut off is over a moment later: only what is lost by then can be taken back.
    eventually(lambda: not (page.post("/reset") and page.gauge("stock", "in_use")))


class TestOurs:
    def test_every_button_is_here(self) -> None:
        assert {name for name, *_ in OURS} == {one.name for one in ENDINGS if one.is_in_runs}

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
        assert sorted(bars(row)) == sorted(HOLDS.get(name, ["db"]))
        assert all(within(row, bar) for bar in row["bars"])
        eventually(page.settled)
        assert page.gauge("scoped", "lost") == 0

    def test_ten_children_get_one_connection(self, page: Page) -> None:
        assert page.click("/scoped/children").text == "Ten tasks asked, and got 1."

    def test_a_stream_holds_its_connection_to_the_last_byte(self, page: Page) -> None:
        page.click("/scoped/stream")
        (row,) = page.ended("/scoped/stream")
        assert row["last_byte"] - row["first_byte"] > 0.3
        assert bars(row)["db"]["closing"] >= row["last_byte"]

    def test_a_transaction_ends_before_the_first_byte_and_a_commit_that_fails_is_told(
        self, page: Page, postgres_url: str
    ) -> None:
        response = page.click("/scoped/commit")
        assert response.status_code == 500
        (row,) = page.ended("/scoped/commit")
        transaction, connection = bars(row)["transaction"], bars(row)["db"]
        assert "likes_message_id_fkey" in transaction["error"]
        assert (
            transaction["ended"] <= row["first_byte"] <= row["last_byte"] <= connection["closing"]
        )
        assert (transaction["asked_by"], connection["asked_by"]) == (None, "transaction")
        with psycopg.connect(postgres_url) as database:
            assert database.execute("SELECT count(*) FROM likes").fetchone() == (0,)
        eventually(lambda: {one.get("likes") for one in page.gauges.values()} == {0})

    def test_a_background_task_has_a_row_and_a_connection_of_its_own(self, page: Page) -> None:
        page.click("/scoped/background")
        (task,) = page.ended("count likes")
        (request,) = page.ended("/scoped/background")
        assert task["kind"] == "background"
        assert task["ending"] == "fine"
        assert task["ended"] - request["ended"] > 0.3
        assert [bar["name"] for bar in task["bars"]] == ["db"]
        assert within(task, task["bars"][0])

    def test_a_stream_that_has_given_back_its_connection_holds_none(self, page: Page) -> None:
        assert page.click("/scoped/release").text == "1 2 3 4 5 "
        (row,) = page.ended("/scoped/release")
        assert bars(row)["db"]["ended"] < row["last_byte"]

    def test_what_waits_for_its_turn_is_seen_to_wait(self, page: Page) -> None:
        with ThreadPoolExecutor() as threads:
            clicks = [threads.submit(page.click, "/scoped/turns") for _ in range(2)]
            waits = eventually(
                lambda: [
                    bar
                    for row in page.new("/scoped/turns")
                    for bar in row["bars"]
                    if bar["name"] == "turn" and bar["ready"] is None
                ]
            )
            assert [click.result().status_code for click in clicks] == [200, 200]
        assert waits[0]["ended"] is None
        rows = page.ended("/scoped/turns", 2)
        assert all(len(row["bars"]) == 1 for row in rows)  # what waited is what was set up
        first, second = sorted((bars(row)["turn"] for row in rows), key=lambda bar: bar["ready"])
        assert first["ended"] <= second["ready"] + 0.1

    @pytest.mark.parametrize(
        ("name", "resource", "words"),
        [
            ("setup-fails", "refused", "The set-up raises."),
            ("teardown-raises", "careless", "The teardown raises."),
            ("teardown-hangs", "stuck", "took longer than 2 seconds to be torn down"),
        ],
    )
    def test_what_fails_is_said_in_words_and_the_connection_is_given_back(
        self, page: Page, name: str, resource: str, words: str
    ) -> None:
        page.click(f"/scoped/{name}")
        (row,) = page.ended(f"/scoped/{name}")
        assert words in bars(row)[resource]["error"]
        assert bars(row)["db"]["ended"] is not None
        assert bars(row)["db"]["error"] == ""
        eventually(lambda: page.gauge("scoped", "in_use") == 0)

    def test_a_stream_that_holds_a_connection_for_long_is_said_in_the_row_and_in_the_log(
        self, page: Page, demo: Demo
    ) -> None:
        page.click("/scoped/long-stream")
        (row,) = page.ended("/scoped/long-stream")
        assert row["error"] == "db held by a stream that does not need it"
        assert bars(row)["db"]["ended"] is not None
        said = "the request GET /scoped/long-stream has been streaming for 1 seconds, and holds"
        eventually(lambda: said in demo.output or said.replace("GET", "POST") in demo.output)
        assert "/events has been streaming" not in demo.output

    def test_an_open_page_is_a_request_too_and_ends_when_it_is_closed(
        self, page: Page, demo: Demo
    ) -> None:
        eventually(lambda: page.gauge("pages") == 1)  # another test's have gone
        with Page(demo) as other:
            eventually(lambda: page.gauge("pages") == 2 and page.new("/events"))
            (row,) = page.new("/events")
            assert row["ended"] is None
            assert bars(row)["heard"]["ended"] is None
            assert other.gauges
        (row,) = page.ended("/events")
        assert row["ending"] == "client gone"
        assert bars(row)["heard"]["ended"] is not None
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
    held = [] if bar["ready"] is None and bar["error"] else [bar["ready"], bar["closing"]]
    times = [row["began"], bar["began"], *held, bar["ended"], row["ended"]]
    return None not in times and all(later - earlier > -0.01 for earlier, later in pairwise(times))


class TestStockDjango:
    @pytest.mark.parametrize("name", COUNTERPARTS)
    def test_it_loses_what_the_django_that_runs_loses(self, page: Page, name: str) -> None:
        reset(page)
        path = f"/stock/{name}"
        end(page, path)
        (row,) = page.ended(path)
        lost = [bar for bar in row["bars"] if bar["ended"] is None]
        assert row["kind"] == "stock"
        if name == "children" and lost:  # as many as the pool opens within a second
            assert len(row["bars"]) == 10
            assert all(bar["error"] for bar in row["bars"] if bar not in lost)
        else:
            assert len(lost) == (name in LOST)
        assert bool(lost) == (name in LOST)
        eventually(lambda: page.gauge("stock", "lost") == len(lost))
        assert page.gauge("stock", "in_use") == len(lost)
        pids = {pid: name for one in page.gauges.values() for pid, name in one["lost"].items()}
        assert list(pids.values()) == [name] * len(lost)
        # And PostgreSQL has them, idle.
        eventually(lambda: set(pids) <= {str(one["pid"]) for one in activity(page, "stock")})

    def test_what_was_lost_stays_said_after_a_reset(self, page: Page) -> None:
        reset(page)
        end(page, "/stock/broken-stream")
        (row,) = page.ended("/stock/broken-stream")
        eventually(lambda: page.gauge("stock", "lost") == 1)
        reset(page)
        eventually(lambda: page.new("/stock/broken-stream")[0]["bars"][0]["taken"] is not None)
        (after,) = page.new("/stock/broken-stream")
        assert after["bars"][0]["ended"] is None  # it was not given back
        assert after["bars"][0]["taken"] > row["ended"]
        assert page.gauge("stock", "lost") == page.gauge("stock", "in_use") == 0

    def test_a_reset_takes_nothing_from_a_request_that_goes_on(self, page: Page) -> None:
        reset(page)
        with ThreadPoolExecutor() as threads:
            click = threads.submit(page.click, "/stock/stream")
            eventually(lambda: any(row["first_byte"] for row in page.new("/stock/stream")))
            page.post("/reset")
            assert click.result().text == "1 2 3 4 5 "

    def test_with_none_left_a_request_waits_a_second_and_says_so_and_ours_go_on(
        self, page: Page, demo: Demo
    ) -> None:
        reset(page)
        lose_all(page)
        assert page.click("/stock/fine").status_code == 500
        (row,) = page.ended("/stock/fine")
        assert row["found_none"]
        assert row["error"] == "no connection was left, after a second of waiting"
        assert row["bars"][0]["ready"] is None
        assert row["ended"] - row["began"] > 0.9
        assert page.click("/scoped/fine").status_code == 200
        eventually(page.settled)
        reset(page)
        assert page.click("/stock/fine").status_code == 200
        assert "TimeoutError" not in demo.output  # what fails on purpose has no traceback
        reset(page)


def lose_all(page: Page) -> None:
    """Ten at a time, or as many as there are."""
    while page.gauge("stock", "lost") < SIZE:
        before = page.gauge("stock", "lost")
        page.post("/stock/children")
        eventually(lambda before=before: page.gauge("stock", "lost") > before)


def activity(page: Page, side: str) -> list[dict[str, Any]]:
    """What PostgreSQL has said last of that side's connections."""
    return [
        one
        for gauges in page.gauges.values()
        for one in gauges.get("activity") or []
        if one["application_name"] == side
    ]


class TestTheRuns:
    def test_of_200_requests_to_both_scoped_answers_all_and_stock_django_runs_out(
        self, page: Page
    ) -> None:
        reset(page)
        assert page.post("/run/mixed").status_code == 202
        assert page.post("/run/mixed").status_code == 409  # one at a time
        score = eventually(
            lambda: page.score if page.score.get("began", 0) > page.before else None, 30
        )
        score = eventually(lambda: page.score if page.score["over"] else None, 120)
        scoped, stock = score["scoped"], score["stock"]
        assert scoped["sent"] == stock["sent"] == 200
        assert scoped["fine"] == stock["fine"] == 125
        assert (scoped["answered"], scoped["found_none"], scoped["lost"]) == (125, 0, 0)
        # How soon its pool runs dry, and whether one is left at the end, is a matter of timing.
        assert stock["answered"] < 125
        assert stock["found_none"] > 0
        assert SIZE / 2 < stock["lost"] <= SIZE
        # And asyncpg's own count of its pool.
        eventually(lambda: page.gauge("stock", "in_use") == stock["lost"])
        eventually(page.settled)
        assert page.new("/scoped/fine") == []  # counted, not shown
        reset(page)

    def test_both_get_the_same_list_and_it_is_mixed(self) -> None:
        names = mixed_list()
        assert names == mixed_list()
        assert {name: names.count(name) for name in names} == MIX
        assert set(MIX) == set(COUNTERPARTS)
        assert len(names) == 200
        assert "broken-stream" in names[:40]

    def test_all_endings_are_run_those_with_a_counterpart_as_pairs(self, page: Page) -> None:
        reset(page)
        assert page.post("/run/endings").status_code == 202
        rows = {name: page.ended(f"/scoped/{name}", seconds=60) for name, *_ in OURS}
        assert all(len(one) == 1 for one in rows.values())
        for name in COUNTERPARTS:
            (theirs,) = page.ended(f"/stock/{name}")
            assert theirs["pair"] == rows[name][0]["pair"] != ""
        lost = [row["title"] for row in page.new("/stock/") if is_lost(row)]
        # On a Django that loses one each time, nothing is left for the last.
        assert set(lost) == {f"POST /stock/{name}" for name in LOST}
        eventually(page.settled)
        reset(page)

    def test_no_other_run_is_known(self, page: Page) -> None:
        assert page.post("/run/everything").status_code == 404
        assert page.get("/run/mixed").status_code == 405


def is_lost(row: Row) -> bool:
    return any(bar["ended"] is None for bar in row["bars"])


class TestAShutdown:
    def test_what_it_cuts_off_ends_as_shut_down_and_the_page_hears_of_it(
        self, postgres_url: str, redis_url: str
    ) -> None:
        with Demo("--port", "0", DATABASE_URL=postgres_url, REDIS_URL=redis_url) as demo:
            with Page(demo) as page:
                began = page.before
                end(page, "/scoped/shutdown")
                eventually(lambda: "Served anew." in demo.output, 30)
            with Page(demo) as page:
                (row,) = [
                    row
                    for row in page.rows.values()
                    if row["title"] == "POST /scoped/shutdown" and row["began"] > began
                ]
                assert row["ending"] == "shut down"
                assert bars(row)["db"]["ended"] is not None
                assert page.click("/scoped/fine").status_code == 200
                assert page.click("/stock/fine").status_code == 200
            assert "Traceback" not in demo.output
            assert "ERROR" not in demo.output


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
    def test_a_click_comes_from_the_page_or_from_no_page_as_with_curl(
        self, page: Page, demo: Demo, path: str
    ) -> None:
        assert page.get(path).status_code == 405
        assert page.post(path).status_code in (200, 204)
        here, elsewhere = {"Origin": demo.url.rstrip("/")}, {"Origin": "http://elsewhere.example"}
        assert page.post(path, headers=here).status_code in (200, 204)
        assert page.post(path, headers=elsewhere).status_code == 403
        assert page.post(path, headers={"Origin": "null"}).status_code == 403

    def test_health_minds_neither_the_host_nor_a_pool_that_is_in_use(self, page: Page) -> None:
        response = page.get("/health", headers={"Host": "elsewhere.example"})
        assert (response.status_code, response.text) == (200, "Healthy.")

    def test_ids_are_of_one_process_s_life(self, postgres_url: str, redis_url: str) -> None:
        names = set()
        for _ in range(2):
            with Demo("--port", "0", DATABASE_URL=postgres_url, REDIS_URL=redis_url) as demo:
                with Page(demo) as page:
                    page.click("/scoped/fine")
                    (row,) = page.ended("/scoped/fine")
                    names.add(row["process"].split(":")[-1])
                    assert row["id"].startswith(row["process"])
        assert len(names) == 2

    @pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.name)
    def test_the_code_beside_a_button_is_what_runs_with_its_line_marked(
        self, page: Page, ending: Ending
    ) -> None:
        sides = [ending.scoped, *([ending.stock] if ending.stock else [])]
        assert all(any(line.is_marked for line in side.lines) for side in sides)
        for listing in [ending.code, *sides]:
            assert listing.lines
            for line in listing.lines:
                assert html.escape(line.text) in page.page_text
        assert (ending in PAIRS) == (ending.stock is not None)
        assert (ending in ALONE) == (ending.stock is None)

    def test_a_mark_that_is_nowhere_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no such line"):
            Listing(mixed_list, marks={"no such line": ""})
        with pytest.raises(ValueError, match="is no line of"):
            Listing(mixed_list, lines=["no such line"])


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
            eventually(lambda: other.post("/stock/children") and page.gauge("stock", "lost") > 0)
            reset(page)  # reaches the other process, too
            assert other.click("/stock/stream").status_code == 200
            reset(page)
