"""The pages in ``docs/``, and the code in them."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from scoped.core.lifespan import eager

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```([\w{}-]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^##? (.+)$", re.MULTILINE)  # no comment of Python's begins a block so
LINK = re.compile(r"\]\((?!https:)([^)#]*)#?([^)]*)\)")


def without_blocks(page: Path) -> str:
    """Its text, in which each line of a block is an empty one."""
    return BLOCK.sub(lambda block: "\n" * block[0].count("\n"), page.read_text())


def headings(page: Path) -> list[str]:
    return HEADING.findall(without_blocks(page))


def sections(page: Path) -> dict[str, str]:
    """The sections that have code, by heading: a page's title is one too."""
    lines = page.read_text().splitlines(keepends=True)
    found: dict[str, str] = {}
    heading = ""
    for line, bare in zip(lines, without_blocks(page).split("\n"), strict=False):
        if match := HEADING.match(bare):
            heading = match[1]
        found[heading] = found.get(heading, "") + line
    return {heading: text for heading, text in found.items() if BLOCK.search(text)}


def files(page: Path, section: str) -> dict[str, str]:
    """A section's blocks by the name in their first line; those of one name are one file."""
    contents: dict[str, str] = {}
    for language, text in BLOCK.findall(sections(page)[section]):
        if language == "python":
            # Below mysite/ in the project of who reads it.
            name = re.match(r"# (?:mysite/)?(\w+\.py)\n", text)
            assert name, f"a block of {page} does not say which file it is: {text}"
            contents[name[1]] = contents.get(name[1], "") + text
    return contents


def blocks(page: Path, section: str, language: str) -> list[str]:
    """A section's blocks in another language than Python: output, commands."""
    return [text for other, text in BLOCK.findall(sections(page)[section]) if other == language]


def anchor(heading: str) -> str:
    """What a link to it ends in."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def importer(
    folder: Path, monkeypatch: Any, directory: Path
) -> Iterator[Callable[..., SimpleNamespace]]:
    """
    For a fixture: imports the files of sections, each given as a page and headings in it,
    as a project would. Later files stand in for earlier ones.
    """
    monkeypatch.syspath_prepend(folder)
    before: dict[str, ModuleType | None] = {}
    eager_before = list(eager)

    def load(page: str, *names: str) -> dict[str, ModuleType]:
        found: dict[str, str] = {}
        for name in names:
            found |= files(directory / page, name)
        for name, text in found.items():
            (folder / name).write_text(text)
            module = name.removesuffix(".py")
            before.setdefault(module, sys.modules.pop(module, None))
        importlib.invalidate_caches()
        return {name: importlib.import_module(name.removesuffix(".py")) for name in found}

    def load_all(*sections: tuple[str, ...]) -> SimpleNamespace:
        modules: dict[str, ModuleType] = {}
        for page, *names in sections:
            modules |= load(page, *names)
        return SimpleNamespace(
            **{name.removesuffix(".py"): module for name, module in modules.items()}
        )

    yield load_all
    eager[:] = eager_before
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
