"""
A picture of the page with a dozen requests: ``python -m demo.screenshot docs/demo.png``.
Needs the dependency group ``browser`` and Chromium.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, Playwright, sync_playwright

OPTIONS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Its sandbox does not work for root.
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
]
MESSAGES = [
    "Hello from the first tab.",
    "Open a second tab: what is written there appears here.",
    "<b>What people type stays text.</b>",
]
SCOPED = [
    *("background", "commit", "leave", "broken-stream", "raises", "missing"),
    *("stream", "children", "sync", "fine"),
]
STOCK = ["broken-stream", "children"]


def launch(playwright: Playwright) -> Browser:
    """Debian's Chromium where it is, else what Playwright has installed."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    return playwright.chromium.launch(executable_path=program, args=OPTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.screenshot", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1190)
    options = parser.parse_args()
    with tempfile.TemporaryFile("w+") as output, sync_playwright() as playwright:
        command = [sys.executable, "-m", "demo", "--port", "0"]
        demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True)
        try:
            page = launch(playwright).new_page(
                viewport={"width": options.width, "height": options.height},
                color_scheme="dark" if options.dark else "light",
            )
            page.goto(address(demo))
            compose(page)
            page.screenshot(path=options.file)
        finally:
            demo.terminate()
            demo.communicate()


def address(demo: "subprocess.Popen[str]") -> str:
    assert demo.stdout is not None  # noqa: S101 (narrows a type)
    for line in demo.stdout:
        if match := re.search(r"The demo: (\S+)", line):
            return match[1]
    raise RuntimeError("The demo did not start.")


def compose(page: Page) -> None:
    for message in MESSAGES:
        page.get_by_label("Message:", exact=True).fill(message)
        page.get_by_role("button", name="Post", exact=True).click()
        page.locator("#wall p").get_by_text(message, exact=True).wait_for()
    for ending in SCOPED:
        click(page, ending)
    page.get_by_role("switch").check(force=True)
    for ending in STOCK:
        click(page, ending)
    page.locator("#rows [data-ending='no connection left']").wait_for()
    page.wait_for_timeout(500)


def click(page: Page, ending: str) -> None:
    rows = page.locator(f"#rows [data-title$='/{ending}']")
    shown = rows.count()
    page.locator(f"[data-send={ending}]").click()
    rows.nth(shown).wait_for()
    page.wait_for_timeout(300)


if __name__ == "__main__":
    main()
