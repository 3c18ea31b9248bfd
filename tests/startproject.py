"""What ``django-admin startproject`` makes, with scoped in it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.slowness import within

ROOT = Path(__file__).parent.parent


class Project:
    """A project ``shop``, which is an app too: ``resources.py`` in it is found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._python("-m", "django", "startproject", "shop", str(folder)).check_returncode()
        self.append("settings.py", 'INSTALLED_APPS += ["scoped", "shop"]\n')

    def file(self, name: str) -> Path:
        return self.folder / "shop" / name

    def write(self, name: str, text: str) -> None:
        self.file(name).write_text(text)

    def append(self, name: str, text: str) -> None:
        with self.file(name).open("a") as file:
            file.write(text)

    def manage(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self._python("manage.py", *arguments)

    def _python(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**os.environ, "DJANGO_SETTINGS_MODULE": "shop.settings", "PYTHONPATH": str(ROOT)},
            timeout=within(30),
            check=False,
        )
