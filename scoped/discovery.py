"""
Finds what a project declares, where projects declare it: in ``resources.py`` of the installed apps,
of the project's own package and beside ``manage.py``, and in what its URLconf imports.
"""

import logging
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from django.conf import settings
from django.urls import get_resolver
from django.utils.module_loading import autodiscover_modules

from scoped.core.names import printable_repr

__all__ = ["import_resources", "import_urls"]

logger = logging.getLogger("scoped")


_told: list[str] = []  # what the URLconf has raised


def import_resources() -> None:
    """Every ``resources.py``. Raises what one of them raises."""
    autodiscover_modules("resources")
    for name in _beside_the_settings():
        if name not in sys.modules and _is_there(name):
            import_module(name)


def import_urls() -> None:
    """
    The URLconf, and with it the views, as Django does at the first request. What it raises is
    logged: each request will meet it again, and Django has a page for that.
    """
    if not getattr(settings, "ROOT_URLCONF", None):
        return
    try:
        _ = get_resolver().urlconf_module
        _told.clear()
    except Exception as error:
        if (said := printable_repr(error)) in _told:  # by the last of several checks, say
            return
        _told[:] = [said]
        logger.error(
            "The URLconf could not be imported, so what it declares is not known: it is not set up "
            "at start-up, though it be declared with eager=True, and not listed. %s",
            said,
            exc_info=error,
        )


def _beside_the_settings() -> list[str]:
    """The project's own package is often no app, and small projects have none at all."""
    packages = [
        module.rpartition(".")[0]
        for module in (
            getattr(settings, "SETTINGS_MODULE", None),
            getattr(settings, "ROOT_URLCONF", None),
        )
        if isinstance(module, str)
    ]
    names = [f"{package}.resources" if package else "resources" for package in packages]
    return list(dict.fromkeys([*names, "resources"]))


def _is_there(name: str) -> bool:
    try:
        spec = find_spec(name)
    except Exception:  # the package around it runs; who needs that meets what it raises
        return False
    if spec is None or spec.origin is None:
        return False
    # A distribution may have a module of that name at the top: only the project's own counts.
    return "." in name or _is_the_projects(Path(spec.origin))


def _is_the_projects(path: Path) -> bool:
    module = sys.modules.get(str(getattr(settings, "SETTINGS_MODULE", None)))
    file = getattr(module, "__file__", None)
    return file is not None and path.parent in Path(file).resolve().parents[:2]
