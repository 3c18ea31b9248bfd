"""
The project's settings, one dict::

    SCOPED = {
        "TEARDOWN_TIMEOUT": 10.0,  # seconds that one resource's teardown may take
        "SHUTDOWN_TIMEOUT": 10.0,  # seconds that shutdown waits for open requests
    }
"""

from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from scoped.scopes import Scope

__all__ = ["configure"]

_DEFAULTS = {
    "TEARDOWN_TIMEOUT": Scope.teardown_timeout,
    "SHUTDOWN_TIMEOUT": Scope.shutdown_timeout,
}


def configure() -> None:
    """
    Put the settings into force. Raises ImproperlyConfigured where a key is
    unknown or a value is not a positive number.
    """
    given: dict[str, Any] = getattr(settings, "SCOPED", {})
    if unknown := sorted(given.keys() - _DEFAULTS.keys()):
        raise ImproperlyConfigured(
            f"SCOPED has unknown keys: {', '.join(unknown)}. Known: {', '.join(_DEFAULTS)}."
        )
    values = {**_DEFAULTS, **given}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ImproperlyConfigured(
                f"SCOPED[{key!r}] is {value!r}. Set it to a number of seconds greater than 0."
            )
    Scope.teardown_timeout = values["TEARDOWN_TIMEOUT"]
    Scope.shutdown_timeout = values["SHUTDOWN_TIMEOUT"]


def _setting_changed(*, setting: str, **kwargs: Any) -> None:
    if setting == "SCOPED":
        configure()


setting_changed.connect(_setting_changed, dispatch_uid="scoped")
