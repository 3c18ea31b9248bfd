"""Wires scoped into a project that lists it in ``INSTALLED_APPS``."""

import logging

from django.apps import AppConfig
from django.core.exceptions import ImproperlyConfigured

from scoped.discovery import import_resources

__all__ = ["ScopedConfig"]

logger = logging.getLogger("scoped")


class ScopedConfig(AppConfig):
    name = "scoped"

    def ready(self) -> None:
        from scoped import checks, conf  # noqa: PLC0415 (needs the settings)
        from scoped.serving import receivers  # noqa: PLC0415

        try:
            conf.configure()
        except ImproperlyConfigured as error:
            # Not raised, so that `manage.py check` can tell. Our handler does raise it.
            logger.error("%s", error)
        checks.register()
        receivers.connect()
        # So that what is declared eager is known when the server starts.
        import_resources()
