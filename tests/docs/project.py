"""A project of a test's own, and what Django's own handler leaves open in it."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from django.test import override_settings


@contextmanager
def urls(*patterns: Any) -> Iterator[None]:
    """A project with these, without a lifespan, which would wait for what is left open."""
    module = ModuleType("urls")
    module.urlpatterns = list(patterns)  # type: ignore[attr-defined]
    with override_settings(ROOT_URLCONF=module):
        yield


@contextmanager
def its_leaks_ignored() -> Iterator[None]:
    """The files of its request bodies, for which Python warns when they are collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
