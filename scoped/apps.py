"""Wires scoped into a project that lists it in ``INSTALLED_APPS``."""

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules

__all__ = ["ScopedConfig"]


class ScopedConfig(AppConfig):
    name = "scoped"

    def ready(self) -> None:
        from scoped import conf, receivers  # noqa: PLC0415 (needs the settings)

        conf.configure()
        receivers.connect()
        # So that what is declared eager is known when the server starts.
        autodiscover_modules("resources")
