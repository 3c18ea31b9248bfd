"""
``docker compose up --scale web=3`` without Docker: demo/nginx.conf in a real
nginx, in front of web processes at 127.0.0.2, 127.0.0.3 and so on.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.browser.conftest import tabs
from tests.browser.names import NameServer
from tests.processes import ROOT, Demo, Visitor, eventually, free_port
from tests.test_timeline import end
from tests.watching import Page, bars

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


class Site:
    """The proxy, the web processes behind it, and the name server that knows these."""

    def __init__(self, folder: Path, names: NameServer, environment: dict[str, str]) -> None:
        self.names = names
        self.environment = environment
        self.port, self.web_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.configuration = folder / "nginx.conf"
        text = (ROOT / "demo" / "nginx.conf").read_text()
        for there, here in {
            "listen 8000;": f"listen 127.0.0.1:{self.port};",
            "$web:8000;": f"$web:{self.web_port};",
            "resolver 127.0.0.11 ": f"resolver 127.0.0.1:{names.port} ",
        }.items():
            assert text.count(there) == 1
            text = text.replace(there, here)
        text = text.replace(" /tmp/", f" {folder}/")  # the pid, and what is on its way
        self.configuration.write_text(text)
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program, "nginx is not installed"
        self.command = [program, "-p", str(folder), "-c", str(self.configuration)]
        self.command += ["-g", "daemon off;"]

    @contextmanager
    def proxy(self) -> Iterator[None]:
        subprocess.run([*self.command, "-t"], check=True, capture_output=True)
        with subprocess.Popen(self.command, stderr=subprocess.PIPE) as nginx:
            try:
                eventually(self.answers)
                yield
            finally:
                nginx.terminate()

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code in (200, 502)
        except httpx.TransportError:
            return False

    @contextmanager
    def web(self) -> Iterator[Demo]:
        """One more web process."""
        address = f"127.0.0.{len(self.names.addresses) + 2}"
        options = ["--host", address, "--port", str(self.web_port)]
        with Demo(*options, **self.environment) as demo:
            assert demo.url
            self.names.addresses.append(address)
            yield demo
            self.names.addresses.remove(address)


@pytest.fixture(scope="module")
def site(
    postgres_url: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    environment = {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url}
    environment["ALLOWED_HOSTS"] = "localhost,127.0.0.1"
    with ExitStack() as stack:
        names = stack.enter_context(NameServer())
        site = Site(tmp_path_factory.mktemp("nginx"), names, environment)
        for _ in range(2):
            stack.enter_context(site.web())
        stack.enter_context(site.proxy())
        yield site


@pytest.fixture
def page(site: Site) -> Iterator[Page]:
    with Page(site.url) as page:
        yield page


def all_answer(page: Page) -> bool:
    """Whether, of some more requests, each process has answered one: nginx draws lots for them."""
    assert page.click("/scoped/missing").status_code == 404
    return {row["process"] for row in page.new("/scoped/missing")} == set(page.gauges)


def test_two_web_processes_share_the_requests_and_show_one_timeline_and_one_wall(
    page: Page,
) -> None:
    eventually(lambda: len(page.gauges) == 2)
    eventually(lambda: all_answer(page), 30)
    texts = [f"message {number}" for number in range(6)]
    for text in texts:
        assert page.write(text).status_code == 303
    eventually(lambda: set(texts) <= set(page.messages))


def test_a_process_more_is_found_without_a_restart(site: Site, page: Page) -> None:
    eventually(lambda: len(page.gauges) == 2)
    with site.web():
        eventually(lambda: len(page.gauges) == 3)
        eventually(lambda: all_answer(page), 30)


def test_what_is_streamed_passes_at_once(page: Page) -> None:
    arrived = []
    with page.stream("POST", "/scoped/stream", headers={"X-CSRFToken": page.token}) as response:
        for part in response.iter_text():
            arrived.append((part, time.monotonic()))
    assert [part for part, _ in arrived] == [f"{number} " for number in range(1, 6)]
    assert arrived[-1][1] - arrived[0][1] > 0.25


def test_who_goes_away_in_front_is_missed_behind(page: Page) -> None:
    page.start_anew()
    assert end(page, "/scoped/leave") is None
    (row,) = page.ended("/scoped/leave")
    assert row["ending"] == "client gone"
    assert bars(row)["db"]["ended"] is not None


def test_a_form_is_accepted_from_its_own_origin_and_no_other(site: Site, page: Page) -> None:
    form = {"text": "from the proxy", "csrfmiddlewaretoken": page.token}
    for origin, status in ((site.url, 303), ("http://127.0.0.1:1", 403)):
        assert page.post("/messages", data=form, headers={"Origin": origin}).status_code == status


def test_a_reset_of_stock_django_s_pools_reaches_all_processes(site: Site, page: Page) -> None:
    eventually(lambda: len(page.gauges) == 2)
    for address in site.names.addresses:  # not through nginx, so that each loses one
        with Visitor(f"http://{address}:{site.web_port}") as visitor:
            visitor.headers["Host"] = "localhost"
            end(visitor, "/stock/broken-stream")
    eventually(lambda: [one["stock"]["lost"] for one in page.gauges.values()] == [1, 1])
    assert page.click("/reset").status_code == 204
    eventually(lambda: page.gauge("stock", "in_use") == 0)


def test_a_browser_sees_both(site: Site, browser: "Browser") -> None:
    with tabs(browser, site.url) as tab:
        one, other = tab(), tab()
        for page in (one, other):
            page.get_by_text(re.compile("2 web processes")).wait_for()
        one.get_by_label("Message:").fill("through nginx")
        one.get_by_role("button", name="Post").click()
        other.locator("#wall p", has_text="through nginx").first.wait_for()


def test_where_no_web_process_answers_nor_does_the_health_check(
    tmp_path: Path, postgres_url: str, redis_url: str
) -> None:
    with NameServer() as names:
        site = Site(tmp_path, names, {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url})
        with site.proxy():
            assert httpx.get(f"{site.url}/health").status_code == 502


def test_who_asks_waits_no_longer_than_a_moment_for_a_process_that_is_gone(
    site: Site, page: Page
) -> None:
    # An address at which nothing answers, not even "no": as a container's that has been removed.
    with socket.socket() as full:
        full.bind(("127.0.0.99", site.web_port))
        full.listen(0)
        waiting = []
        try:
            for _ in range(3):  # its queue is full: who comes now hears nothing
                one = socket.socket()
                one.setblocking(False)
                one.connect_ex(("127.0.0.99", site.web_port))
                waiting.append(one)
            site.names.addresses.append("127.0.0.99")
            time.sleep(1.5)  # nginx keeps a name's addresses for a second
            began = time.monotonic()
            for _ in range(6):
                assert page.get("/").status_code == 200
            assert time.monotonic() - began < 30  # a minute each, by default
        finally:
            site.names.addresses.remove("127.0.0.99")
            for one in waiting:
                one.close()
