"""Chromium, and tabs of it that notice what goes wrong in them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.processes import Demo

if TYPE_CHECKING:  # collected without it, too
    from playwright.sync_api import Browser, Page

Open = Callable[[], "Page"]


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    from demo.screenshot import launch

    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo(postgres_url: str, redis_url: str) -> Iterator[Demo]:
    with Demo("--port", "0", DATABASE_URL=postgres_url, REDIS_URL=redis_url) as demo:
        yield demo


@contextmanager
def tabs(browser: "Browser", url: str, **options: object) -> Iterator[Open]:
    """Open as many tabs as are asked for; none may complain in its console."""
    complaints: list[str] = []
    context = browser.new_context(**options)  # type: ignore[arg-type]
    context.set_default_timeout(10_000)

    def open_tab() -> "Page":
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text)
                if message.type in ("error", "warning") and not is_asked_for(message.location)
                else None
            ),
        )
        page.goto(url)
        page.get_by_text("web process").wait_for()
        return page

    try:
        yield open_tab
        assert complaints == []
    finally:
        context.close()


def is_asked_for(location: object) -> bool:
    """Chromium reports every 404, 422 and 500, and what breaks off: which is what was asked for."""
    url = str(location["url"]) if isinstance(location, dict) else str(getattr(location, "url", ""))
    return any(path in url for path in ("/scoped/", "/stock/", "/messages", "/run/"))


@pytest.fixture
def tab(browser: "Browser", demo: Demo) -> Iterator[Open]:
    with tabs(browser, demo.url) as open_tab:
        yield open_tab
