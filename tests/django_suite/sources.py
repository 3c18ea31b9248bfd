"""Gets Django's tests: its source distribution, downloaded once and unpacked."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

__all__ = ["default_cache", "django_source"]


def default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "django-scoped"


def django_source(version: str, cache: Path) -> Path:
    """The unpacked source distribution of that version of Django, from ``cache`` if it is there."""
    source = cache / f"django-{version}"
    if not source.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Moved into place when complete: an interrupted run leaves nothing half done.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            archive = _download(version, Path(folder))
            _unpack(archive, Path(folder)).rename(source)
    found = _version_of(source)
    if found != version:
        raise SystemExit(f"{source} holds Django {found}, not {version}. Remove it and try again.")
    return source


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    # The tests of a later Django are wanted too, one that may not run on this Python.
    command += ["--no-deps", "--no-binary", "django", "--ignore-requires-python"]
    # What is said of the Django to install does not hold for the one to read.
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    try:
        subprocess.run([*command, f"django=={version}"], check=True, env=environment)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pip could not download the source of Django {version}.") from error
    [archive] = folder.glob("*.tar.gz")
    return archive


def _unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:  # Python 3.11 before 3.11.4
            for member in tar:
                inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
                if not inside or not (member.isfile() or member.isdir()):
                    raise SystemExit(f"{archive.name} holds {member.name!r}: not unpacked.")
                tar.extract(member, folder)
    [source] = (path for path in folder.iterdir() if path.is_dir())
    return source


def _version_of(source: Path) -> str | None:
    for line in (source / "PKG-INFO").read_text(encoding="utf-8").splitlines():
        if line.startswith("Version: "):
            return line.removeprefix("Version: ")
    return None
