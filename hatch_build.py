"""
Makes the README of the package, which PyPI shows alone: there a link into the
repository must be a whole URL. ``project.urls`` has it, in one place; while that is
empty, what would lead nowhere is left as plain text.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"\[([^\]]+)\]\((?!https://)([^)]+)\)")
PICTURE = re.compile(r"<picture>.*?</picture>\n*", re.DOTALL)
FILE = re.compile(r'(src|srcset)="(?!https://)([^"]+)"')


def readme(text: str, repository: str | None) -> str:
    """``text`` as it can be shown anywhere."""
    if not repository:
        return LINK.sub(r"\1", PICTURE.sub("", text))
    text = LINK.sub(rf"[\1]({repository}/blob/main/\2)", text)
    return FILE.sub(rf'\1="{repository}/raw/main/\2"', text)


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        root = Path(self.root)
        urls = tomllib.loads((root / "pyproject.toml").read_text())["project"].get("urls", {})
        text = readme((root / "README.md").read_text(), urls.get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
