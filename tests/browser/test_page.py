"""The demo's page, clicked through in Chromium."""

import re
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import django
import httpx
import pytest

from demo.stage.buttons import ALONE, ENDINGS, PAIRS
from tests.browser.conftest import Open, tabs
from tests.processes import Demo, eventually, free_port
from tests.test_timeline import COUNTERPARTS, HOLDS, LOST

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.browser

SIZE = 10  # of each pool
LABELS = {ending.name: ending.label for ending in ENDINGS}

# What the page says of scoped's side: what became of the connection, and what was answered.
SAID = {
    "fine": ("given back after", "200"),
    "sync": ("given back after", "200"),
    "stream": ("given back after", "200"),
    "missing": ("given back after", "404"),
    "raises": ("given back after", "500 · The view raises."),
    "leave": ("given back after", "the client left"),
    "broken-stream": ("given back after", "200, broke off · The stream raises."),
    "children": ("given back after", "200"),
    "commit": ("given back after", "500 · .*likes_message_id_fkey.* · and there is no row"),
    "background": ("held nothing", "202"),
    "release": ("given back after", "200"),
    "long-stream": ("given back after", "200 · db held by a stream that does not need it"),
    "turns": ("given back after", "200"),
    "setup-fails": ("given back after", "500 · refused: The set-up raises."),
    "teardown-raises": ("given back after", "200 · careless: The teardown raises."),
    "teardown-hangs": ("given back after", "200 · stuck: .*took longer than 2 seconds.*"),
}


@pytest.fixture
def page(tab: Open) -> "Iterator[Page]":
    page = tab()
    yield page
    eventually(lambda: gauge(page, "scoped-in-use") == gauge(page, "scopes") == 0)


def gauge(page: "Page", name: str) -> int:
    text = page.locator(f"#{name}").inner_text()
    return int(text.removesuffix(" lost"))


def click(page: "Page", ending: str) -> "Locator":
    """Click the button, and return the row that this makes."""
    known = page.locator("#rows > li[data-key]").evaluate_all(
        "all => all.map((one) => one.dataset.key)"
    )
    page.locator(f"[data-send={ending}]").click()
    others = "".join(f":not([data-key='{key}'])" for key in known)
    new = page.locator(f"#rows > li[data-name='{ending}']{others}")
    new.wait_for()
    return page.locator(f"#rows > li[data-key='{new.get_attribute('data-key')}']")


def side(row: "Locator", kind: str) -> "Locator":
    """A lane of the row, once its request is over."""
    lane = row.locator(f".side[data-kind={kind}]:not([data-ending=open])")
    lane.wait_for()
    return lane


def reset(page: "Page") -> None:
    page.get_by_role("button", name="give back the lost").click()
    eventually(lambda: gauge(page, "stock-lost") == 0)


def expect(lane: "Locator", fate: str, answer: str) -> None:
    wanted = re.compile(f"^{fate}.*\n{answer}$", re.DOTALL)
    eventually(lambda: wanted.match(lane.locator(".words").inner_text().strip()))


class TestTheMinute:
    def test_what_is_read_first_says_what_scoped_does_and_what_lost_means(
        self, page: "Page"
    ) -> None:
        text, at = " ".join(page.locator("body").inner_text().split()), 0
        order = [
            "scoped every request gives its connection back",
            "Each button calls the same view twice: once served by scoped, once by stock Django "
            "with a ContextVar and request_finished. Both have a pool of 10 real PostgreSQL "
            "connections. A connection that a request took, and nobody gives back, is lost.",
            "1 · Run it",
            f"stock Django {django.get_version()}",
            "2 · The code of “stream raises”",
            "request_finished is never sent when a request ends like this",
            "3 · What became of the connections",
            "4 · What PostgreSQL says",
            "5 · And a page that uses it",
        ]
        for part in order:  # what was run before may be told of in between
            at = text.find(part, at)
            assert at >= 0, part

    def test_a_label_is_no_forecast(self, page: "Page") -> None:
        for button in page.locator("[data-send]").all():
            assert not re.search("lost|given back|fails and", button.inner_text())


class TestThePair:
    @pytest.mark.parametrize("ending", COUNTERPARTS)
    def test_a_click_goes_to_both_and_says_what_became_of_each(
        self, page: "Page", ending: str
    ) -> None:
        reset(page)
        row = click(page, ending)
        ours, theirs = side(row, "scoped"), side(row, "stock")
        expect(ours, *SAID[ending])
        assert ours.get_attribute("data-lost") == "0"
        number = int(theirs.get_attribute("data-lost") or 0)
        assert (number > 0) == (ending in LOST)
        assert number <= (SIZE if ending == "children" else 1)
        words = theirs.locator(".words b").inner_text()
        several = f"{number} connections lost for" if number > 1 else "lost for"
        assert words.startswith(several if number else "given back after")
        verdict = row.locator(".verdict")
        eventually(lambda: verdict.inner_text() == ("" if number else "no difference"))
        # The pool, and PostgreSQL, say so too; and only what is lost is red.
        eventually(lambda: gauge(page, "stock-lost") == gauge(page, "stock-in-use") == number)
        assert page.locator("#stock-cells .gone").count() == number
        eventually(lambda: page.locator("#activity tr.lost").count() == number)
        assert row.locator("rect.lost").count() == number
        reset(page)
        eventually(lambda: theirs.get_attribute("data-lost") == "0")
        if number:
            eventually(lambda: "lost for" in theirs.locator(".words b").inner_text())
            assert "then taken back" in theirs.locator(".words b").inner_text()
            assert row.locator("rect.lost").count() == number

    @pytest.mark.parametrize("ending", [ending.name for ending in ALONE])
    def test_what_has_no_counterpart_has_one_lane(self, page: "Page", ending: str) -> None:
        row = click(page, ending)
        lane = side(row, "scoped")
        expect(lane, *SAID[ending])
        assert row.locator(".side[data-kind=stock]").count() == 0
        assert lane.locator(".who span").all_inner_texts() == HOLDS.get(ending, ["db"])
        assert row.locator("rect.lost").count() == 0

    def test_a_background_task_has_a_lane_of_its_own(self, page: "Page") -> None:
        row = click(page, "background")
        expect(side(row, "background"), "given back after", "done")

    def test_what_waits_is_a_bar_that_grows(self, page: "Page") -> None:
        page.locator("[data-send=turns]").dblclick()
        lane = page.locator("#rows .side", has_text="waits for turn").first
        lane.wait_for()
        eventually(lambda: page.locator("#rows rect.wait").count() > 0)
        eventually(lambda: page.locator("#rows .side[data-ending=open]").count() == 0, 20)

    def test_what_is_lost_goes_on_being_lost(self, page: "Page") -> None:
        reset(page)
        words = side(click(page, "broken-stream"), "stock").locator(".words b")
        first = words.inner_text()
        eventually(lambda: words.inner_text() != first)
        reset(page)

    def test_every_open_page_shows_it_and_after_a_reload_it_is_still_there(self, tab: Open) -> None:
        one, other = tab(), tab()
        key = click(one, "fine").get_attribute("data-key")
        for page in (one, other):
            side(page.locator(f"#rows > li[data-key='{key}']"), "stock")
        one.reload()
        side(one.locator(f"#rows > li[data-key='{key}']"), "scoped")

    def test_all_rows_have_one_axis(self, page: "Page") -> None:
        click(page, "release")
        marks = page.locator("#axis text").all_text_contents()
        assert marks[0] == "0 s"
        assert all(re.match(r"[\d.]+ s$", mark) for mark in marks)
        widths = page.locator("#rows .lane").evaluate_all(
            "all => all.map((one) => one.clientWidth)"
        )
        axis = page.locator("#axis").evaluate("(one) => one.clientWidth")
        assert all(abs(width - axis) <= 1 for width in widths)


class TestTheRuns:
    @pytest.mark.timeout(180)
    def test_200_requests_end_in_one_sentence_that_says_it_all(self, page: "Page") -> None:
        reset(page)
        page.get_by_role("button", name="200 requests, mixed").click()
        page.locator("#sentence[data-over=false]").wait_for()
        page.get_by_role("button", name="200 requests, mixed").click()
        page.locator("#answer", has_text="A run is going on already").wait_for()
        sentence = page.locator("#sentence[data-over=true]")
        sentence.wait_for(timeout=120_000)
        said = re.match(
            r"Of 125 plain requests, scoped answered 125 and lost no connection; "
            r"stock Django [\d.]+ answered (\d+) and lost (\d+)\.$",
            sentence.inner_text(),
        )
        assert said, sentence.inner_text()
        assert int(said[1]) < 125
        lost = int(said[2])
        assert SIZE / 2 < lost <= SIZE
        eventually(lambda: page.locator("#stock-cells .gone").count() == lost)
        eventually(lambda: page.locator("#activity tr.lost").count() == lost)
        assert "found no connection left" in page.locator("#stock-score").inner_text()
        assert re.search(r"p50 \d+ ms · p99 \d+ ms", page.locator("#scoped-score").inner_text())
        page.reload()  # who opens it later sees it, too
        eventually(lambda: page.locator("#sentence").inner_text() == said[0])
        reset(page)

    @pytest.mark.timeout(180)
    def test_all_endings_are_run_one_after_the_other(self, page: "Page") -> None:
        reset(page)
        runs = page.locator("#rows > li[data-key]:not([data-key^=click])")
        before = runs.count()
        page.locator("[data-run=endings]").click()
        wanted = sum(ending.is_in_runs for ending in ENDINGS)
        eventually(lambda: runs.count() == min(before + wanted, 24), 60)
        eventually(lambda: page.locator("#rows .side[data-ending=open]").count() == 0, 30)
        reset(page)


class TestTheCode:
    def test_the_chosen_button_s_code_is_shown_and_no_other(self, page: "Page") -> None:
        for name in ("children", "commit"):
            click(page, name)
            shown = page.locator("[data-code]:visible")
            assert shown.count() == 1
            assert shown.get_attribute("data-code") == name
            assert page.locator("#code").inner_text() == f"2 · The code of “{LABELS[name]}”"
            assert page.locator("[data-send][aria-pressed=true]").inner_text() == LABELS[name]
            assert shown.locator("mark").count() > 0

    def test_the_line_to_copy_does_what_it_says(self, page: "Page", demo: Demo) -> None:
        line = page.locator("[data-code=broken-stream] .copy").first.inner_text()
        found = re.match(r"curl -X POST (http://\S+)$", line)
        assert found
        assert found[1] == f"{demo.url}scoped/broken-stream"
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(found[1])


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
        page.get_by_label("Message:").evaluate(
            "area => { area.required = false; area.value = ' ' }"
        )
        page.get_by_role("button", name="Post").click()
        page.get_by_text("Write something first.").wait_for()


class TestAServerThatIsAway:
    def test_the_page_says_so_and_goes_on_when_it_is_back(
        self, browser: "Browser", postgres_url: str, redis_url: str
    ) -> None:
        environment = {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url}
        port = str(free_port())
        context = browser.new_context()
        context.set_default_timeout(20_000)
        try:
            page = context.new_page()
            with Demo("--port", port, **environment) as demo:
                page.goto(demo.url)
                page.locator("#state", has_text="live").wait_for()
                key = click(page, "fine").get_attribute("data-key")
                demo.process.kill()
            page.locator("#state", has_text="the server is away").wait_for()
            page.locator("[data-send=fine]").click()
            page.locator("#answer", has_text="was not sent: the server is away").wait_for()
            page.locator("[data-run=mixed]").click()
            page.locator("#answer", has_text="Not sent: the server is away").wait_for()
            page.get_by_label("Message:").fill("still here")
            page.get_by_role("button", name="Post").click()
            page.locator("#posted", has_text="Not posted: the server is away").wait_for()
            assert page.get_by_label("Message:").input_value() == "still here"
            with Demo("--port", port, **environment) as demo:
                assert demo.url
                page.locator("#state", has_text="live").wait_for()
                # The processes have the same pid in a container; their rows are not mixed up.
                assert click(page, "fine").get_attribute("data-key") != key
                assert page.locator(f"#rows > li[data-key='{key}']").count() == 1
        finally:
            context.close()

    def test_a_restart_cuts_off_what_goes_on_and_the_page_shows_it(
        self, browser: "Browser", postgres_url: str, redis_url: str
    ) -> None:
        environment = {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url}
        context = browser.new_context()
        context.set_default_timeout(20_000)
        try:
            with Demo("--port", "0", **environment) as demo:
                page = context.new_page()
                page.goto(demo.url)
                page.locator("#state", has_text="live").wait_for()
                row = click(page, "shutdown")
                expect(side(row, "scoped"), "given back after", "shut down")
                page.locator("#state", has_text="live").wait_for()
                side(click(page, "fine"), "stock")
        finally:
            context.close()


class TestForEverybody:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [390, 768, 1280, 1440])
    def test_nothing_is_cut_off_and_it_can_be_read(
        self, browser: "Browser", demo: Demo, width: int, scheme: str
    ) -> None:
        size = {"width": width, "height": 800}
        with tabs(browser, demo.url, viewport=size, color_scheme=scheme) as tab:
            page = tab()
            side(click(page, "commit"), "scoped")
            side(click(page, "broken-stream"), "stock")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            contrasts = page.evaluate(CONTRASTS)
            assert min(contrasts.values()) >= 4.5, contrasts
            cut = page.locator("button, h1, h2, .words, .what").evaluate_all(
                "all => all.filter((one) => one.scrollWidth > one.clientWidth + 1)"
                ".map((one) => one.textContent)"
            )
            assert [text for text in cut if text.strip() != "give back the lost"] == []
            reset(page)

    @pytest.mark.parametrize("width", [390, 1280])
    def test_forced_colours_lose_nothing(self, browser: "Browser", demo: Demo, width: int) -> None:
        size = {"width": width, "height": 800}
        with tabs(browser, demo.url, viewport=size, forced_colors="active") as tab:
            page = tab()
            side(click(page, "broken-stream"), "stock")
            fills = page.evaluate(
                """() => Object.fromEntries(["held", "bytes", "hatch-ground"].map((name) =>
                [name, getComputedStyle(document.querySelector("." + name)).fill]))"""
            )
            assert len(set(fills.values())) == 3  # told apart, in the system's own colours
            assert "rgb(217, 72, 59)" not in fills.values()
            pressed = page.locator("[aria-pressed=true]")
            assert pressed.evaluate("(one) => getComputedStyle(one).borderStyle") == "double"
            mark = page.locator("[data-code]:visible mark").first
            assert mark.evaluate("(one) => getComputedStyle(one).borderBottomStyle") == "solid"
            reset(page)

    def test_nothing_jumps(self, browser: "Browser", demo: Demo) -> None:
        with tabs(browser, demo.url, viewport={"width": 1280, "height": 800}) as tab:
            page = tab()
            where = "['#run', '#scoped', '#stock', '#code', '#timeline', '#rows'].map((id) => " + (
                "{ const box = document.querySelector(id).getBoundingClientRect();"
                " return [box.x, box.y + window.scrollY, box.width] })"
            )
            before = page.evaluate(where)
            for ending in ("fine", "commit", "children"):
                click(page, ending)
            assert [[*box[:2]] for box in page.evaluate(where)] == [[*box[:2]] for box in before]
            side(page.locator("#rows > li[data-name=children]").first, "stock")
            reset(page)

    def test_all_of_it_is_reached_by_keyboard_and_the_focus_is_seen(self, tab: Open) -> None:
        page = tab()
        reached = []
        for _ in range(60):
            page.keyboard.press("Tab")
            name, is_seen = page.evaluate(FOCUSED)
            if not name:
                break
            reached.append(name)
            assert is_seen, name
        chips = [ending.label for ending in [*PAIRS, *ALONE]]
        assert reached[:2] == [f"Run all {len(SAID)} endings", "200 requests, mixed"]
        assert [name for name in reached if name in chips] == chips
        rest = [name for name in reached[2:] if name not in chips]
        assert rest == ["give back the lost", "pre", "pre", "pre", "the table", "id_text", "Post"]
        page.locator("[data-send=fine]").focus()
        page.keyboard.press("Enter")
        row = page.locator("#rows > li[data-name=fine]").first
        row.wait_for()
        page.locator("[data-send=fine]").focus()
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED)[0] == LABELS["sync"]

    def test_everything_has_a_name_and_says_what_it_shows(self, page: "Page") -> None:
        reset(page)
        row = click(page, "broken-stream")
        lane = side(row, "stock").locator("svg")
        eventually(
            lambda: re.match(
                r"stock: request [\d.]+ s, db lost$", lane.get_attribute("aria-label") or ""
            )
        )
        ours = side(row, "scoped").locator("svg").get_attribute("aria-label") or ""
        assert re.match(r"scoped: request [\d.]+ s, db held for [\d.]+ s$", ours)
        assert page.locator("html").get_attribute("lang") == "en"
        assert page.get_by_role("status").count() == 4
        assert page.locator("#wall").get_attribute("aria-live") == "polite"
        for region in (
            *("1 · Run it", "scoped", f"stock Django {django.get_version()}"),
            *("2 · The code of “stream raises”", "3 · What became of the connections"),
            *("4 · What PostgreSQL says", "5 · And a page that uses it: open two"),
        ):
            assert page.get_by_role("region", name=region, exact=True).count() == 1
        assert page.locator("svg[role=img]:not([aria-label])").count() == 0
        cells = page.locator("#stock-cells").get_attribute("aria-label") or ""
        assert re.match(r"10 connections: \d+ in use, 1 lost, \d+ idle$", cells)
        reset(page)


FOCUSED = """() => {
  const one = document.activeElement;
  if (!one || one === document.body) return ["", true];
  const tag = one.tagName.toLowerCase();
  const text = (one.getAttribute("aria-label") ?? one.textContent).trim();
  const name = tag === "pre" ? "pre" : one.id && one.id !== "reset" ? one.id : text;
  return [name, getComputedStyle(one).outlineStyle === "solid"];
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
