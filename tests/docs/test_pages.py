"""That nothing in the pages of docs/ goes untested, and no link leads nowhere."""

import re
from pathlib import Path

import pytest

from tests import pages

TESTS = [test.read_text() for test in Path(__file__).parent.glob("test_*.py")]
ALL = sorted(page.relative_to(pages.DOCS).as_posix() for page in pages.DOCS.rglob("*.md"))
TESTED_ELSEWHERE = ("changelog.md", "checks.md", "tutorial.md")
# The recipes have tests of this kind of their own; tests/test_checks.py runs its page's code, and
# tests/docs/test_tutorial.py its page from the first line to the last.
OURS = [page for page in ALL if "/" not in page and page not in TESTED_ELSEWHERE]
WRITTEN_BY_A_COMMAND = [
    *("benchmarks.md", "benchmarks-instructions.md", "guarantees.md", "servers.md"),
]


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
    linked = [target for target, _ in pages.LINK.findall((pages.DOCS / "index.md").read_text())]
    expected = [page for page in ALL if "/" not in page and page != "index.md"]
    assert sorted(linked) == sorted([*expected, "recipes/README.md"])


def test_the_site_s_table_of_contents_has_every_page_once():
    """Sphinx would warn too, at the build; what is missing goes into a toctree of docs/index.md."""
    listed: list[str] = []
    for name, text in pages.BLOCK.findall((pages.DOCS / "index.md").read_text()):
        if name == "{toctree}":
            for entry in re.findall(r"^[a-z].*$", text, re.MULTILINE):
                found = [
                    page.relative_to(pages.DOCS).as_posix()
                    for page in pages.DOCS.glob(f"{entry}.md")
                ]
                assert found, f"{entry} is no page"
                # As Sphinx does: a star stands for what is not listed yet.
                listed += [page for page in found if "*" not in entry or page not in listed]
    assert sorted(listed) == [page for page in ALL if page != "index.md"]


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
    assert len(lines) < 260
