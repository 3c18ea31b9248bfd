"""The demo's page, clicked through in Chromium."""

import re
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import django
import pytest
from demo.buttons import ENDINGS, LOST

from tests.browser.conftest import Open, tabs
from tests.processes import Demo, eventually

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.browser

# How each row ends, in the words of the page.
ENDS = {
    "fine": "200 fine",
    "sync": "200 fine",
    "children": "200 fine",
    "stream": "200 fine",
    "missing": "404 refused",
    "raises": "500 failed",
    "broken-stream": "200 broke off",
    "leave": "client gone",
    "commit": "500 failed",
    "background": "202 fine",
}
ANSWERS = {
    "fine": "Fine: 200, “All is well.”",
    "sync": "Sync view: 200, “All is well, in a thread.”",
    "children": "Ten children: 200, “Ten children asked, 1 got set up.”",
    "stream": "Stream: 200, “1 2 3 4 5”",
    "missing": "Not found: 404",
    "raises": "View raises: 500",
    "broken-stream": "Stream raises: the answer broke off",
    "leave": "Client leaves: left before the answer came",
    "commit": "COMMIT fails: 500",
    "background": "Background: 202, “Counting.”",
}
SIZE = 3  # of stock Django's pool
COUNTERPARTS = [ending.name for ending in ENDINGS if ending.has_counterpart]


@pytest.fixture
def page(tab: Open) -> "Iterator[Page]":
    page = tab()
    yield page
    eventually(lambda: gauge(page, "ours-in-use") == gauge(page, "ours-scopes") == 0)


def gauge(page: "Page", name: str) -> int:
    return int(page.locator(f"#{name}").inner_text())


def switch(page: "Page") -> None:
    page.get_by_text("to stock Django").click()


def click(page: "Page", ending: str, side: str = "scoped") -> "Locator":
    """Click the button, and return the row that this makes."""
    rows = page.locator(f"#rows [data-title='POST /{side}/{ending}']")
    ids = rows.evaluate_all("rows => rows.map((row) => row.dataset.id)")
    page.locator(f"button[data-send={ending}]").click()
    new = rows.and_(
        page.locator("#rows li" + "".join(f":not([data-id='{number}'])" for number in ids))
    )
    new.wait_for()
    number = new.get_attribute("data-id")
    return page.locator(f"#rows [data-id='{number}']")


def reset(page: "Page") -> None:
    page.get_by_role("button", name="Reset pool").click()
    eventually(lambda: gauge(page, "theirs-in-use") == 0)


class TestTheWall:
    def test_what_is_posted_in_one_tab_is_shown_in_another(self, tab: Open) -> None:
        one, other = tab(), tab()
        text = f"from one tab {uuid.uuid4()}"
        one.get_by_label("Message:").fill(text)
        one.get_by_role("button", name="Post").click()
        for page in (one, other):
            page.locator("#wall p", has_text=text).wait_for()
        assert one.get_by_label("Message:").input_value() == ""

    def test_what_people_type_stays_text(self, tab: Open) -> None:
        page = tab()
        text = (
            f"<img src=x onerror=\"document.title='hit'\"><b>{uuid.uuid4()}</b>\n<script>1</script>"
        )
        page.get_by_label("Message:").fill(text)
        page.get_by_role("button", name="Post").click()
        message = page.locator("#wall p").filter(has_text=text).first
        message.wait_for()
        assert message.inner_text() == text
        page.reload()  # from the template this time
        assert page.locator("#wall p").first.inner_text() == text
        assert page.locator("#wall img, #wall b, #wall script").count() == 0
        assert "hit" not in page.title()

    def test_what_cannot_be_posted_is_answered_in_words(self, tab: Open) -> None:
        page = tab()
        page.get_by_label("Message:").fill("kept " + "x" * 1000)
        page.get_by_label("Message:").evaluate(
            "area => { area.required = false; area.value = ' ' }"
        )
        page.get_by_role("button", name="Post").click()
        page.get_by_text("Write something first.").wait_for()


class TestOurs:
    @pytest.mark.parametrize("ending", [ending.name for ending in ENDINGS])
    def test_a_button_s_row_ends_as_it_says(self, page: "Page", ending: str) -> None:
        row = click(page, ending)
        row.locator(".how b", has_text=re.compile(rf"^{ENDS[ending]}$")).wait_for()
        page.locator("#answer", has_text=ANSWERS[ending]).wait_for()
        assert row.get_attribute("data-lost") == "0"
        names = row.locator(".names span").all_inner_texts()
        resources = {"commit": ["transaction", "db"], "background": []}.get(ending, ["db"])
        assert names == ["request", *resources]
        assert len(row.locator("rect.held").all()) == len(resources)
        label = row.locator("svg").get_attribute("aria-label") or ""
        assert label.count(" s") == len(names)
        assert "open" not in label

    def test_a_background_task_has_its_own_row(self, page: "Page") -> None:
        click(page, "background")
        task = page.locator("#rows li", has_text="count likes").first
        task.locator(".how b", has_text=re.compile("^open$")).wait_for()
        task.locator(".how b", has_text=re.compile("^fine$")).wait_for()
        assert task.locator(".names span").all_inner_texts() == ["request", "db"]

    def test_every_open_page_shows_the_row(self, tab: Open) -> None:
        one, other = tab(), tab()
        row = click(one, "fine")
        other.locator(f"#rows [data-id='{row.get_attribute('data-id')}']").wait_for()

    def test_a_page_is_a_row_until_it_is_closed(self, tab: Open) -> None:
        page = tab()
        eventually(lambda: gauge(page, "ours-pages") == 1)  # another test's have gone
        other = tab()
        eventually(lambda: gauge(page, "ours-pages") == 2)
        row = page.locator("#rows li[data-title='GET /events']").first
        assert row.get_attribute("data-ending") == "open"
        assert row.locator(".names span").all_inner_texts() == ["request", "subscription"]
        number = row.get_attribute("data-id")
        other.close()
        page.locator(f"#rows [data-id='{number}'][data-ending='client gone']").wait_for()
        eventually(lambda: gauge(page, "ours-pages") == 1)

    def test_after_a_reload_the_timeline_is_still_there(self, page: "Page") -> None:
        number = click(page, "fine").get_attribute("data-id")
        page.locator(f"#rows [data-id='{number}'][data-ending=fine]").wait_for()
        page.reload()
        page.locator(f"#rows [data-id='{number}'][data-ending=fine]").wait_for()


class TestStockDjango:
    @pytest.mark.parametrize("ending", COUNTERPARTS)
    def test_it_loses_what_it_says(self, page: "Page", ending: str) -> None:
        reset(page)
        switch(page)
        says = page.locator(f"button[data-send={ending}] .there")
        assert says.is_visible()
        is_lost = says.inner_text() == "connection lost"
        assert is_lost == (ending in LOST)
        assert is_lost or django.VERSION >= (6, 1)
        row = click(page, ending, "stock")
        lost = 0 if not is_lost else SIZE if ending == "children" else 1
        page.locator(
            f"#rows [data-id='{row.get_attribute('data-id')}']"
            f"[data-lost='{lost}']:not([data-ending=open])"
        ).wait_for()
        eventually(lambda: gauge(page, "theirs-lost") == gauge(page, "theirs-in-use") == lost)
        assert (f"{lost} lost" in row.locator(".how").inner_text()) == is_lost
        assert len(row.locator("rect.lost").all()) == lost
        assert len(page.locator("#theirs-cells .used").all()) == lost
        reset(page)
        eventually(lambda: row.get_attribute("data-lost") == "0")

    def test_its_requests_hang_beside_ours_at_zero(self, page: "Page") -> None:
        reset(page)
        switch(page)
        click(page, "children", "stock").locator("b", has_text="no connection left").wait_for()
        row = click(page, "fine", "stock")
        eventually(lambda: gauge(page, "theirs-waiting") == 1)
        switch(page)
        click(page, "fine").locator("b", has_text="200 fine").wait_for()
        eventually(lambda: gauge(page, "ours-in-use") == 0)
        row.locator("b", has_text="no connection left").wait_for()
        assert gauge(page, "theirs-in-use") == SIZE
        reset(page)

    def test_what_has_no_counterpart_cannot_be_sent_there(self, page: "Page") -> None:
        switch(page)
        for ending in ("commit", "background"):
            assert page.locator(f"button[data-send={ending}]").is_disabled()
        switch(page)
        for ending in ("commit", "background"):
            assert page.locator(f"button[data-send={ending}]").is_enabled()

    def test_it_says_which_django_runs_and_what_that_loses(self, page: "Page") -> None:
        page.get_by_role("heading", name=f"stock Django {django.get_version()}").wait_for()
        page.get_by_text("What it is known to lose").click()
        table = page.locator("details table")
        assert table.is_visible()
        blind = "it is called, but does not see it"
        assert table.inner_text().count(blind) == (1 if django.VERSION >= (6, 1) else 4)


class TestForEverybody:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [360, 768, 1280])
    def test_nothing_is_cut_off_and_it_can_be_read(
        self, browser: "Browser", demo: Demo, width: int, scheme: str
    ) -> None:
        size = {"width": width, "height": 800}
        with tabs(browser, demo.url, viewport=size, color_scheme=scheme) as tab:
            page = tab()
            click(page, "commit").locator("b", has_text="500").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            contrasts = page.evaluate(CONTRASTS)
            assert min(contrasts.values()) >= 4.5, contrasts

    def test_nothing_jumps(self, tab: Open) -> None:
        page = tab()
        where = "['#rows', '#wall', '#answer', '#ours', '#theirs'].map((id) => " + (
            "{ const box = document.querySelector(id).getBoundingClientRect();"
            " return [box.x, box.y, box.width] })"
        )
        before = page.evaluate(where)
        for ending in ("fine", "commit", "raises"):
            click(page, ending)
        switch(page)
        assert page.evaluate(where) == before

    def test_all_of_it_is_reached_by_keyboard_and_the_focus_is_seen(self, tab: Open) -> None:
        page = tab()
        reached = []
        for _ in range(30):
            page.keyboard.press("Tab")
            name, is_seen = page.evaluate(FOCUSED)
            if name in reached or not name:
                break
            reached.append(name)
            assert is_seen, name
        buttons = [ending.label for ending in ENDINGS]
        assert reached == [
            "stock",
            *buttons,
            "Reset pool",
            "What it is known to lose",
            "id_text",
            "Post",
        ]
        page.locator("#stock").focus()
        page.keyboard.press("Space")
        assert page.locator("#stock").is_checked()
        page.keyboard.press("Space")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.locator("#answer", has_text=ANSWERS["fine"]).wait_for()

    def test_everything_has_a_name(self, tab: Open) -> None:
        page = tab()
        click(page, "fine").locator("b", has_text="200 fine").wait_for()
        assert page.locator("html").get_attribute("lang") == "en"
        assert page.get_by_role("switch", name="to stock Django").count() == 1
        assert page.get_by_role("status").count() == 1
        assert page.locator("#wall").get_attribute("aria-live") == "polite"
        for region in ("Send a request", "Timeline", "Message wall", "scoped"):
            assert page.get_by_role("region", name=region, exact=True).count() == 1
        assert page.locator("svg[role=img]:not([aria-label])").count() == 0


FOCUSED = """() => {
  const one = document.activeElement;
  if (!one || one === document.body) return ["", true];
  const shown = one.id === "stock" ? one.nextElementSibling : one;
  const text = (one.querySelector("b") ?? one).textContent.trim();
  const name = one.id && one.id !== "reset" ? one.id : text;
  return [name, getComputedStyle(shown).outlineStyle === "solid"];
}"""

# WCAG's contrast of each text with what is behind it.
CONTRASTS = """() => {
  const options = { willReadFrequently: true };
  const canvas = document.createElement("canvas").getContext("2d", options);
  const over = (below, color) => {
    for (const style of [`rgb(${below})`, color]) {
      canvas.fillStyle = style;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (color) => color
    .map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (one) => {
    if (!one) return [255, 255, 255];
    return over(ground(one.parentElement), getComputedStyle(one).backgroundColor);
  };
  const isRead = (one) => {
    const hasText = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const isThere = one.checkVisibility({ visibilityProperty: true });
    return hasText && isThere && !one.closest(":disabled, template, svg");
  };
  const contrasts = {};
  for (const one of [...document.querySelectorAll("body *")].filter(isRead)) {
    const below = ground(one);
    const own = luminance(over(below, getComputedStyle(one).color));
    const [dark, light] = [own, luminance(below)].sort((a, b) => a - b);
    const name = `${one.tagName} ${one.className} ${one.textContent.trim().slice(0, 30)}`;
    contrasts[name] = (light + 0.05) / (dark + 0.05);
  }
  return contrasts;
}"""
