"""That nothing in the pages of docs/ goes untested, and no link leads nowhere."""

import re
from pathlib import Path

import pytest

from tests import pages

TESTS = [test.read_text() for test in Path(__file__).parent.glob("test_*.py")]
ALL = sorted(page.relative_to(pages.DOCS).as_posix() for page in pages.DOCS.rglob("*.md"))
# The recipes have tests of this kind of their own; tests/test_checks.py runs its page's code.
OURS = [page for page in ALL if "/" not in page and page != "checks.md"]
WRITTEN_BY_A_COMMAND = ["benchmarks.md", "guarantees.md", "servers.md"]


def is_used(page: str, section: str) -> bool:
    """Whether a test names the section, and then uses that name."""
    for text in TESTS:
        name = re.search(
            rf'^([A-Z_]+) = \(\s*"{re.escape(page)}",\s*"{re.escape(section)}",?\s*\)$', text, re.M
        )
        if name and len(re.findall(rf"\b{name[1]}\b", text)) > 1:
            return True
    return False


@pytest.mark.parametrize("page", OURS)
def test_every_section_with_code_is_run(page):
    for section, text in pages.sections(pages.DOCS / page).items():
        if "```python" in text:
            assert is_used(page, section), section


@pytest.mark.parametrize("page", OURS)
def test_every_fence_is_that_of_a_block(page):
    text = (pages.DOCS / page).read_text()
    assert text.count("```") == 2 * len(pages.BLOCK.findall(text))
    found = pages.sections(pages.DOCS / page).values()
    assert sum(len(pages.BLOCK.findall(section)) for section in found) == len(
        pages.BLOCK.findall(text)
    )


def test_the_index_has_every_page():
    text = (pages.DOCS / "README.md").read_text()
    linked = [target for target, _ in pages.LINK.findall(text)]
    expected = [page for page in ALL if "/" not in page and page != "README.md"]
    assert sorted(linked) == sorted([*expected, "recipes/README.md", "../README.md"])


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page):
    path = pages.DOCS / page
    for target, anchor in pages.LINK.findall(pages.without_blocks(path)):
        other = (path.parent / target).resolve() if target else path
        assert other.is_file(), target
        if anchor:
            anchors = [pages.anchor(heading) for heading in pages.headings(other)]
            assert anchor in anchors, (target, anchor)


@pytest.mark.parametrize("page", [page for page in ALL if page not in WRITTEN_BY_A_COMMAND])
def test_lines_are_wrapped(page):
    long = [
        line
        for line in pages.without_blocks(pages.DOCS / page).splitlines()
        if len(line) > 120 and not line.startswith("|")
    ]
    assert long == []


@pytest.mark.parametrize("page", [page for page in OURS if page not in WRITTEN_BY_A_COMMAND])
def test_a_page_is_short_and_begins_with_code_or_a_table(page):
    lines = (pages.DOCS / page).read_text().splitlines()
    first = next(
        number for number, line in enumerate(lines) if line.startswith(("```", "|")) and number
    )
    assert first < 10
    assert len(lines) < 250
