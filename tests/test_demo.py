"""The demo, as its visitors meet it: a real process, real servers, real connections."""

import asyncio
import json
import re
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import asyncpg
import httpx
import pytest
from redis import Redis

from demo.__main__ import address_of, describe, listen
from demo.servers import Server
from demo.stage.reports import BEHIND, PAGES, News, TooManyPagesError
from tests.processes import (
    BY_CTRL_C,
    WITHOUT_DEV_MODE,
    Demo,
    Visitor,
    descendants,
    eventually,
    is_alive,
)
from tests.slowness import within
from tests.watching import Page


@pytest.fixture(scope="module")
def demo(postgres_url: str, redis_url: str) -> Iterator[Demo]:
    with Demo("--port", "0", DATABASE_URL=postgres_url, REDIS_URL=redis_url) as demo:
        yield demo


@pytest.fixture
def visitor(demo: Demo) -> Iterator[Visitor]:
    with Visitor(demo) as visitor:
        yield visitor


@pytest.fixture
def watcher(demo: Demo) -> Iterator[Page]:
    """A page that sees how many are open: itself alone, in the end."""
    with Page(demo) as watcher:
        eventually(lambda: watcher.gauge("pages") == 1)  # another test's have gone
        yield watcher
        eventually(lambda: watcher.gauge("pages") == 1)


@contextmanager
def events(visitor: Visitor, path: str = "/events", **headers: str) -> Iterator[Iterator[str]]:
    """The lines of an event stream that is subscribed when the block begins."""
    with visitor.stream("GET", path, headers=headers) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith(":")
        yield lines


def next_message(lines: Iterator[str]) -> dict[str, object]:
    return next_data(lines, "id: ")


def next_report(lines: Iterator[str]) -> dict[str, Any]:
    return next_data(lines, "event: timeline")


def next_data(lines: Iterator[str], after: str) -> dict[str, Any]:
    while not next(lines).startswith(after):
        pass
    data: dict[str, Any] = json.loads(next(lines).removeprefix("data: "))
    return data


def unique(text: str = "message") -> str:
    return f"{text} {uuid.uuid4()}"


class TestTheWall:
    def test_what_is_posted_is_on_the_page_newest_first(self, visitor: Visitor) -> None:
        first, second = unique(), unique()
        for text in (first, second):
            response = visitor.write(text)
            assert (response.status_code, response.headers["Location"]) == (303, "/")
        page = visitor.page()
        assert 0 < page.index(second) < page.index(first)

    def test_the_page_has_the_latest_ten(self, visitor: Visitor) -> None:
        texts = [unique() for _ in range(11)]
        for text in texts:
            visitor.write(text)
        page = visitor.page()
        assert page.count('<li id="message-') == 10
        assert texts[0] not in page
        assert all(text in page for text in texts[1:])

    def test_what_people_type_is_text_and_never_markup(self, visitor: Visitor) -> None:
        text = unique('<script>alert("1")</script> & <b>')
        visitor.write(text)
        page = visitor.page()
        assert text not in page
        assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &lt;b&gt;" in page

    def test_the_end_of_a_line_counts_once_and_2000_characters_are_not_too_many(
        self, visitor: Visitor
    ) -> None:
        mark = unique()
        text = mark + "\r\n" + "\N{PILE OF POO}" * (2000 - len(mark) - 1)
        assert visitor.write(text).status_code == 303
        assert text.replace("\r\n", "\n") in visitor.page()

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "Write something first."),
            (" \r\n\t ", "Write something first."),
            ("kept <" + "x" * 1995, "at most 2000 characters"),
            ("kept < \0", "Null characters are not allowed."),
        ],
        ids=["empty", "blank", "too long", "NUL"],
    )
    def test_what_cannot_be_posted_is_refused_in_words_and_kept_in_the_form(
        self, visitor: Visitor, text: str, complaint: str
    ) -> None:
        before = re.findall(r'id="(message-\d+)"', visitor.page())
        response = visitor.write(text)
        assert response.status_code == 422
        assert complaint in response.text
        typed = re.search(r"<textarea[^>]*>\s?(.*?)</textarea>", response.text, re.DOTALL)
        assert typed
        assert ("kept &lt;" in typed[1]) == ("kept <" in text)
        assert re.findall(r'id="(message-\d+)"', visitor.page()) == before

    def test_what_a_strange_charset_makes_of_the_text_is_stored_as_far_as_it_can_be(
        self, visitor: Visitor
    ) -> None:
        mark = unique()
        field = (
            f'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n{mark}+2AA-\r\n--x--\r\n'
        )
        kind = "multipart/form-data; boundary=x; charset=utf-7"  # which has lone surrogates
        headers = {"X-CSRFToken": visitor.token, "Content-Type": kind}
        response = visitor.post("/messages", content=field.encode(), headers=headers)
        assert response.status_code == 303
        assert f"{mark}?" in visitor.page()

    def test_a_form_from_elsewhere_is_refused(self, visitor: Visitor) -> None:
        text = unique()
        assert visitor.post("/messages", data={"text": text}).status_code == 403
        token = visitor.token
        response = visitor.post(
            "/messages",
            data={"text": text, "csrfmiddlewaretoken": token},
            headers={"Origin": "http://elsewhere.example"},
        )
        assert response.status_code == 403
        assert text not in visitor.page()

    def test_where_a_proxy_in_front_speaks_tls_its_origin_is_ours(
        self, postgres_url: str, redis_url: str
    ) -> None:
        environment = {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url}
        environment |= {"ALLOWED_HOSTS": "demo.example"}
        environment |= {"CSRF_TRUSTED_ORIGINS": "https://demo.example"}
        form = {"text": unique(), "csrfmiddlewaretoken": "x" * 32}
        headers = {"Host": "demo.example", "Cookie": f"csrftoken={'x' * 32}"}
        with Demo("--port", "0", **environment) as demo, Visitor(demo) as visitor:
            for origin, statuses in {
                "https://demo.example": (303, 200),
                "https://other.example": (403, 403),
            }.items():
                told = headers | {"Origin": origin}
                written = visitor.post("/messages", data=form, headers=told)
                clicked = visitor.post("/scoped/fine", headers=told)
                assert (written.status_code, clicked.status_code) == statuses

    def test_a_host_that_is_not_ours_is_refused(self, visitor: Visitor) -> None:
        assert visitor.get("/", headers={"Host": "elsewhere.example"}).status_code == 400

    @pytest.mark.parametrize(
        ("method", "path"), [("POST", "/"), ("GET", "/messages"), ("HEAD", "/events")]
    )
    def test_a_page_has_its_methods_and_no_others(
        self, visitor: Visitor, method: str, path: str
    ) -> None:
        headers = {"X-CSRFToken": visitor.token}
        assert visitor.request(method, path, headers=headers).status_code == 405

    def test_the_page_needs_nothing_from_elsewhere(self, visitor: Visitor) -> None:
        page = visitor.page().replace(str(visitor.base_url), "")
        files = re.findall(r'<(?:link|script)[^>]+(?:href|src)="([^"]+)"', page)
        assert files == ["data:,", "/static/demo.css", "/static/demo.js"]
        for text in (page, *(visitor.get(file).text for file in files[1:])):
            assert not re.search(r"//\w+\.\w+", text.replace("//www.w3.org/2000/svg", ""))


class TestTheEventStream:
    def test_every_open_page_gets_what_is_posted(self, visitor: Visitor, demo: Demo) -> None:
        text = unique("<b>two\nlines</b>")
        with Visitor(demo) as other, events(visitor) as mine, events(other) as theirs:
            visitor.write(text)
            assert next_message(mine)["text"] == text
            assert next_message(theirs)["text"] == text

    def test_it_is_marked_as_what_nobody_on_the_way_may_keep(self, visitor: Visitor) -> None:
        with visitor.stream("GET", "/events") as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            assert response.headers["Cache-Control"] == "no-cache"
            assert response.headers["X-Accel-Buffering"] == "no"

    def test_what_was_missed_comes_first(self, visitor: Visitor) -> None:
        missed = [unique(), unique()]
        with events(visitor) as lines:
            visitor.write("seen")
            seen = next_message(lines)["id"]
        for text in missed:
            visitor.write(text)
        with events(visitor, f"/events?after={seen}") as lines:
            assert [next_message(lines)["text"] for _ in missed] == missed
        # What the browser says when it connects again counts more than what the page said.
        with events(visitor, "/events?after=0", **{"Last-Event-ID": str(seen)}) as lines:
            assert [next_message(lines)["text"] for _ in missed] == missed

    @pytest.mark.parametrize("after", ["", "-1", "x", "٣", "9" * 40])
    def test_nonsense_about_what_was_seen_is_ignored(self, visitor: Visitor, after: str) -> None:
        text = unique()
        with events(visitor, f"/events?after={after}") as lines:
            visitor.write(text)
            assert next_message(lines)["text"] == text

    def test_a_page_that_is_closed_is_no_longer_told(self, demo: Demo, watcher: Page) -> None:
        with Visitor(demo) as visitor, events(visitor):
            eventually(lambda: watcher.gauge("pages") == 2)
            with Visitor(demo) as another, events(another):
                eventually(lambda: watcher.gauge("pages") == 3)
            eventually(lambda: watcher.gauge("pages") == 2)

    def test_nor_is_one_whose_connection_broke(self, demo: Demo, watcher: Page) -> None:
        url = httpx.URL(demo.url)
        with socket.create_connection((url.host, url.port), timeout=within(10)) as connection:
            connection.sendall(f"GET /events HTTP/1.1\r\nHost: {url.host}\r\n\r\n".encode())
            received = b""
            while b": subscribed" not in received:
                received += connection.recv(4096)
            eventually(lambda: watcher.gauge("pages") == 2)
            linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # ends with RST

    def test_open_pages_keep_no_connection_of_postgresql_or_redis(
        self, demo: Demo, watcher: Page, redis_url: str
    ) -> None:
        url = httpx.URL(demo.url)
        request = f"GET /events?after=0 HTTP/1.1\r\nHost: {url.host}\r\n\r\n".encode()
        with Redis.from_url(redis_url) as client, ExitStack() as stack:

            def subscribed() -> int:
                return sum(int(one["sub"]) for one in client.client_list(_type="pubsub"))

            before = subscribed()
            for _ in range(30):  # three times as many as the pool has connections
                page = socket.create_connection((url.host, url.port), timeout=within(10))
                stack.enter_context(page)
                page.sendall(request)
            eventually(lambda: watcher.gauge("pages") == 31)
            eventually(lambda: watcher.gauge("scoped", "in_use") == 0)
            assert subscribed() == before
            with Visitor(demo) as visitor:
                assert visitor.write(unique()).status_code == 303

    def test_a_slow_page_holds_no_more_than_the_latest_reports(self) -> None:
        news = News()
        with news.heard() as queue:
            for number in range(3 * BEHIND):
                news.tell("timeline", str(number))
            assert queue.qsize() == BEHIND
            latest = [queue.get_nowait()[1] for _ in range(BEHIND)]
        assert latest == [str(number) for number in range(2 * BEHIND, 3 * BEHIND)]

    def test_there_are_only_so_many_pages(self) -> None:
        news = News()
        with ExitStack() as stack:
            for _ in range(PAGES):
                stack.enter_context(news.heard())
            with pytest.raises(TooManyPagesError):
                stack.enter_context(news.heard())
        with news.heard():
            pass


class TestUnderLoad:
    def test_two_hundred_requests_twenty_at_once_leave_nothing_behind(
        self, postgres_url: str, redis_url: str
    ) -> None:
        before = idle_connections(postgres_url)
        environment = {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url}
        with Demo("--port", "0", command=WITHOUT_DEV_MODE, **environment) as demo:
            asyncio.run(two_hundred_requests(demo))
            # A pool of ten at most, and the page's own: stock Django's two, and one that looks on.
            assert before < idle_connections(postgres_url) <= before + 13
            with Page(demo) as page:
                eventually(lambda: page.gauge("pages") == 1 and page.settled())
            # The pool's own view: it does not close before every connection is back.
            demo.process.terminate()
            assert demo.process.wait(within(10)) in BY_CTRL_C
            assert "ERROR" not in demo.output
        assert idle_connections(postgres_url) == before


async def two_hundred_requests(demo: Demo) -> None:
    twenty_at_once = asyncio.Semaphore(20)
    async with httpx.AsyncClient(base_url=demo.url, timeout=within(20)) as client:
        token = re.search(r'csrfmiddlewaretoken" value="(\w+)"', (await client.get("/")).text)
        assert token

        async def post() -> int:
            text = {"text": unique(), "csrfmiddlewaretoken": token[1]}
            async with twenty_at_once:
                return (await client.post("/messages", data=text)).status_code

        async def look_and_leave() -> int:
            async with twenty_at_once, client.stream("GET", "/events?after=0") as stream:
                return stream.status_code

        requests = [look_and_leave() if number % 10 == 0 else post() for number in range(200)]
        assert sorted(await asyncio.gather(*requests)) == [200] * 20 + [303] * 180


def idle_connections(postgres_url: str) -> int:
    """How many connections to the database there are, once none is in use."""

    async def states() -> set[tuple[int, str]]:
        connection = await asyncpg.connect(postgres_url)
        try:
            rows = await connection.fetch(
                "SELECT pid, state FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            return {(row["pid"], row["state"]) for row in rows}
        finally:
            await connection.close()

    def idle() -> list[int] | None:
        found = asyncio.run(states())
        return [len(found)] if all(state == "idle" for _, state in found) else None

    return int(eventually(idle)[0])


class TestItsProcess:
    def test_ctrl_c_ends_it_and_its_servers_within_seconds_though_a_page_is_open(
        self,
    ) -> None:
        with Demo("--port", "0") as demo, Visitor(demo) as visitor, events(visitor):
            servers, folders = descendants(demo.process.pid), demo.folders
            assert len(folders) == 2
            assert all(folder.is_dir() for folder in folders)
            assert len(servers) > len(folders)
            started = time.monotonic()
            demo.press_ctrl_c()
            assert demo.process.wait(within(10)) in BY_CTRL_C
            assert time.monotonic() - started < within(5)
            assert "Traceback" not in demo.output
            assert "ERROR" not in demo.output
            assert not any(folder.exists() for folder in folders)
            eventually(lambda: not any(map(is_alive, servers)))

    @pytest.mark.parametrize(
        "signals",
        [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]],
        ids=["SIGTERM", "Ctrl-C twice"],
    )
    def test_so_does(
        self, signals: list[signal.Signals], postgres_url: str, redis_url: str
    ) -> None:
        environment = {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url}
        with Demo("--port", "0", **environment) as demo, Visitor(demo) as visitor, events(visitor):
            started = time.monotonic()
            for number in signals:
                demo.process.send_signal(number)
                time.sleep(0.3)  # pressed, and pressed again; whichever state that meets
            assert demo.process.wait(within(10)) in BY_CTRL_C
            assert time.monotonic() - started < within(5)
            assert "Traceback" not in demo.output

    def test_an_open_page_is_no_reason_to_cut_anything_off(
        self, postgres_url: str, redis_url: str
    ) -> None:
        environment = {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url}
        with Demo("--port", "0", **environment) as demo, Visitor(demo) as visitor:
            with events(visitor) as lines, ThreadPoolExecutor() as threads:
                with Visitor(demo) as other, Page(demo) as page:
                    click = threads.submit(other.post, "/scoped/turns")  # takes a second
                    eventually(lambda: page.new("/scoped/turns"))
                    demo.process.terminate()
                    list(lines)  # to its end, which it says itself
                    assert click.result().status_code == 200
            assert demo.process.wait(within(10)) in BY_CTRL_C
            assert "ERROR" not in demo.output

    def test_killed_it_leaves_no_server_and_no_data(self) -> None:
        with Demo("--port", "0") as demo, Visitor(demo) as visitor, events(visitor):
            servers, folders = descendants(demo.process.pid), demo.folders
            assert len(folders) == 2
            demo.process.kill()
            demo.process.wait()
            eventually(lambda: not any(folder.exists() for folder in folders))
            eventually(lambda: not any(map(is_alive, servers)))

    async def test_several_may_start_at_once_on_an_empty_database(
        self, postgres_url: str, redis_url: str
    ) -> None:
        name = f"empty_{uuid.uuid4().hex}"
        admin = await asyncpg.connect(postgres_url)
        try:
            await admin.execute(f"CREATE DATABASE {name}")
            url = httpx.URL(postgres_url).copy_with(path=f"/{name}")
            environment = {"DATABASE_URL": str(url), "REDIS_URL": redis_url}
            demos = [Demo("--port", "0", **environment) for _ in range(3)]
            try:
                for demo in demos:
                    with Visitor(demo) as visitor:
                        assert visitor.write(unique()).status_code == 303
            finally:
                for demo in demos:
                    demo.__exit__()
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        finally:
            await admin.close()

    def test_it_takes_another_port_where_8000_is_taken_and_none_was_asked_for(
        self, postgres_url: str, redis_url: str
    ) -> None:
        try:
            taken = socket.create_server(("127.0.0.1", 8000))
        except OSError:
            taken = socket.socket()  # somebody else has it: as good
        with taken, Demo(DATABASE_URL=postgres_url, REDIS_URL=redis_url) as demo:
            assert httpx.get(demo.url).status_code == 200
            assert httpx.URL(demo.url).port != 8000
            assert "Port 8000 is taken" in demo.output

    @pytest.mark.parametrize("ask", ["--port", "PORT"])
    def test_it_takes_no_other_port_than_the_one_that_was_asked_for(self, ask: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            asked = Demo(ask, port) if ask.startswith("-") else Demo(**{ask: port})
            with asked as demo:
                assert demo.process.wait(within(10)) == 1
                assert f"Cannot listen on port {port}" in demo.output
                assert "Traceback" not in demo.output

    @pytest.mark.parametrize(
        ("arguments", "environment", "said"),
        [
            (["--host", "nowhere.invalid"], {}, "Cannot listen at 'nowhere.invalid'"),
            (["--host", "192.0.2.1"], {}, "Cannot listen on port 8000 of 192.0.2.1"),
            (["--port", "65536"], {}, "--port is '65536'. Make it a number from 0"),
            (["--port", "-1"], {}, "--port is '-1'. Make it a number from 0"),
            (["--port", "x"], {}, "--port is 'x'. Make it a number from 0"),
            ([], {"PORT": ""}, "PORT is ''. Make it a number from 0"),
            ([], {"PORT": "٣"}, "PORT is '٣'. Make it a number from 0"),
        ],
    )
    def test_one_line_says_what_is_wrong_with_its_address(
        self, arguments: list[str], environment: dict[str, str], said: str
    ) -> None:
        with Demo(*arguments, PYTHONIOENCODING="utf-8", **environment) as demo:
            assert demo.process.wait(within(30)) == 1
            (line,) = demo.output.splitlines()
            assert line.startswith(said)

    def test_it_says_at_once_what_it_starts_and_a_ctrl_c_ends_it_while_that_starts(self) -> None:
        with Demo("--port", "0") as demo:
            eventually(lambda: "Starting PostgreSQL and Redis ..." in demo.output)
            assert demo.output.splitlines() == ["Starting PostgreSQL and Redis ..."]
            servers = descendants(demo.process.pid)
            demo.press_ctrl_c()
            assert demo.process.wait(within(30)) in BY_CTRL_C
            assert "Traceback" not in demo.output
            assert "ERROR" not in demo.output
            eventually(lambda: not any(map(is_alive, servers)), 30)

    def test_what_is_named_is_not_said_to_be_started(
        self, postgres_url: str, redis_url: str
    ) -> None:
        with Demo("--port", "0", DATABASE_URL=postgres_url, REDIS_URL=redis_url) as demo:
            assert demo.url
            assert "Starting" not in demo.output

    @pytest.mark.parametrize(
        ("host", "address", "shown"),
        [
            ("127.0.0.1", "", "http://127.0.0.1:"),
            ("0.0.0.0", "", "http://127.0.0.1:"),
            ("127.0.0.1", "http://demo.example:81/", "http://demo.example:81/"),
        ],
    )
    def test_the_address_that_it_prints_is_one_to_open(
        self, host: str, address: str, shown: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ADDRESS", address)
        with listen(host, 0) as listener:
            assert address_of(listener).startswith(shown)

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
            ("postgresql://me:s3cret@[::1]:5/db?password=s3cret", "postgresql://[::1]:5/db"),
            ("redis://:s3cret@@cache:6379/0", "redis://cache:6379/0"),
        ],
    )
    def test_it_says_where_its_servers_are_but_no_password(self, url: str, shown: str) -> None:
        assert describe(Server(url, "Name")) == f"Name: {shown}"
