"""The pages in ``docs/recipes/``, and the code in them."""

import re
from pathlib import Path

DIRECTORY = Path(__file__).parent.parent.parent / "docs" / "recipes"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


def names() -> list[str]:
    return sorted(page.name for page in DIRECTORY.glob("*.md"))


def sections(page: str) -> dict[str, str]:
    """The sections that have code, by heading."""
    _, *parts = HEADING.split((DIRECTORY / page).read_text())
    return {
        heading: text
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
        if BLOCK.search(text)
    }


def files(page: str, section: str) -> dict[str, str]:
    """A section's blocks by the name in their first line; those of one name are one file."""
    contents: dict[str, str] = {}
    for language, text in BLOCK.findall(sections(page)[section]):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", text)
            assert name, f"a block of {page} does not say which file it is: {text}"
            contents[name[1]] = contents.get(name[1], "") + text
    return contents
