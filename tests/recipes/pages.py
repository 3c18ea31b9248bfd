"""The pages in ``docs/recipes/``, and the code in them."""

from tests import pages

DIRECTORY = pages.DOCS / "recipes"
BLOCK, HEADING = pages.BLOCK, pages.HEADING


def names() -> list[str]:
    return sorted(page.name for page in DIRECTORY.glob("*.md"))


def sections(page: str) -> dict[str, str]:
    """The sections that have code, by heading."""
    return pages.sections(DIRECTORY / page)
