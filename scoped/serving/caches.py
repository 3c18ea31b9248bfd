"""Whether Django's ``close_caches`` would do a thing at the end of a request."""

from typing import ClassVar

from django.core.cache import caches
from django.core.cache.backends.base import BaseCache
from django.utils.module_loading import import_string

__all__ = ["caches_have_to_be_closed"]


class _Seen:
    """The project's caches that were looked through last, and what was found."""

    settings: ClassVar[object] = None
    have_to_be_closed: ClassVar[bool] = False


def caches_have_to_be_closed() -> bool:
    """Whether the ``close()`` of any of the project's caches is not the one that does nothing."""
    if _Seen.settings is not (settings := caches.settings):
        _Seen.have_to_be_closed = any(_closes(cache["BACKEND"]) for cache in settings.values())
        _Seen.settings = settings
    return _Seen.have_to_be_closed


def _closes(backend: str) -> bool:
    try:
        return import_string(backend).close is not BaseCache.close
    except (ImportError, AttributeError):  # no such cache, or one of another make
        return True
