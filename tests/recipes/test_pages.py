"""That nothing in the pages goes untested. Their links: tests/docs/test_pages.py."""

import re
from pathlib import Path

import pytest

from tests.recipes import pages

HERE = Path(__file__).parent
# What takes the dependency group `neighbours` is run beside the rest of that.
FOLDERS = [HERE, HERE.parent / "neighbours"]
TESTS = "".join(test.read_text() for folder in FOLDERS for test in folder.glob("test_*.py"))


@pytest.mark.parametrize("page", pages.names())
def test_every_section_with_code_is_run(page):
    for section in pages.sections(page):
        assert re.search(rf'"{page}",(?: "[^"]+",)* "{section}"', TESTS), section


@pytest.mark.parametrize("page", pages.names())
def test_every_block_of_code_is_in_a_section(page):
    text = (pages.DIRECTORY / page).read_text()
    assert len(pages.BLOCK.findall(text)) == sum(
        len(pages.BLOCK.findall(section)) for section in pages.sections(page).values()
    )
    assert text.count("\n```") == 2 * len(pages.BLOCK.findall(text))


def test_the_index_has_every_page():
    linked = re.findall(r"\]\((\w+\.md)\)", (pages.DIRECTORY / "README.md").read_text())
    assert sorted([*linked, "README.md"]) == pages.names()
