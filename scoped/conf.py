"""
The project's settings, one dict::

    SCOPED = {
        "TEARDOWN_TIMEOUT": 10.0,  # seconds that one resource's teardown may take
        "SHUTDOWN_TIMEOUT": 10.0,  # seconds that shutdown waits for open requests
        "MAX_IDLE_THREADS": 6,  # kept for the sync code of requests to come; as Python's thread
                                # pools, by default: the number of CPUs and 4, 32 at most
    }
"""

from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from scoped.scopes import Scope
from scoped.threads import LentThread

__all__ = ["configure"]

_DEFAULTS = {
    "TEARDOWN_TIMEOUT": Scope.teardown_timeout,
    "SHUTDOWN_TIMEOUT": Scope.shutdown_timeout,
    "MAX_IDLE_THREADS": LentThread.max_idle,
}


def configure() -> None:
    """
    Put the settings into force. Raises ImproperlyConfigured where a key is
    unknown or a value makes no sense.
    """
    given: dict[str, Any] = getattr(settings, "SCOPED", {})
    if unknown := sorted(given.keys() - _DEFAULTS.keys()):
        raise ImproperlyConfigured(
            f"SCOPED has unknown keys: {', '.join(unknown)}. Known: {', '.join(_DEFAULTS)}."
        )
    values = {**_DEFAULTS, **given}
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key.endswith("_TIMEOUT") and not (is_number and value > 0):
            raise ImproperlyConfigured(
                f"SCOPED[{key!r}] is {value!r}. Set it to a number of seconds greater than 0."
            )
        if key == "MAX_IDLE_THREADS" and not (is_number and int(value) == value >= 0):
            raise ImproperlyConfigured(
                f"SCOPED[{key!r}] is {value!r}. Set it to a number of threads, 0 or more."
            )
    Scope.teardown_timeout = values["TEARDOWN_TIMEOUT"]
    Scope.shutdown_timeout = values["SHUTDOWN_TIMEOUT"]
    LentThread.max_idle = int(values["MAX_IDLE_THREADS"])


def _setting_changed(*, setting: str, **kwargs: Any) -> None:
    if setting == "SCOPED":
        configure()


setting_changed.connect(_setting_changed, dispatch_uid="scoped")
