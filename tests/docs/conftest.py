import pytest

from tests import pages
from tests.recipes.conftest import backends, keys, notes, serve

__all__ = ["backends", "keys", "notes", "serve"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Imports the files of one section of a page in ``docs/``, or of several."""
    yield from pages.importer(tmp_path, monkeypatch, pages.DOCS)
