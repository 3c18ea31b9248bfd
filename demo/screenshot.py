"""
Pictures of the page after its 200 requests, light and dark: ``python -m demo.screenshot docs``
writes ``demo.png`` and ``demo-dark.png`` there. Needs the dependency group ``browser`` and
Chromium.
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
PICTURES = {"demo.png": "light", "demo-dark.png": "dark"}
ENDINGS = ["fine", "broken-stream", "children"]  # the rows that the picture shows, the last on top


def launch(playwright: Playwright) -> Browser:
    """Debian's Chromium where it is, else what Playwright has installed."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    return playwright.chromium.launch(executable_path=program, args=OPTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.screenshot", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1330)
    options = parser.parse_args()
    with tempfile.TemporaryFile("w+") as output, sync_playwright() as playwright:
        command = [sys.executable, "-m", "demo", "--port", "0"]
        demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True)
        try:
            page = launch(playwright).new_page(
                viewport={"width": options.width, "height": options.height}
            )
            page.goto(address(demo))
            page.get_by_text("web process").wait_for()
            compose(page)
            for name, scheme in PICTURES.items():
                page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                page.screenshot(path=options.folder / name)
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
    """The score, whose sentence stands on top, and after it some endings."""
    page.locator("[data-run=mixed]").click()
    page.locator("#sentence[data-over=true]").wait_for(timeout=120_000)
    for ending in ENDINGS:
        page.get_by_role("button", name="give back the lost").click()
        page.locator("#stock-lost", has_text="0 lost").wait_for()
        page.locator(f"[data-send={ending}]").click()
        row = page.locator(f"#rows > li[data-name={ending}]").first
        row.wait_for()
        for side in ("scoped", "stock"):
            row.locator(f".side[data-kind={side}]:not([data-ending=open])").wait_for()
    page.wait_for_timeout(2000)  # PostgreSQL is asked once a second
    page.evaluate("document.activeElement.blur()")


if __name__ == "__main__":
    main()
