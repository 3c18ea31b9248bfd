"""
The project's settings, one dict::

    SCOPED = {
        "TEARDOWN_TIMEOUT": 10.0,  # seconds that one resource's teardown may take
        "SLOW_TEARDOWN": 1.0,  # seconds after which a teardown is logged as slow
        "SHUTDOWN_TIMEOUT": 10.0,  # seconds that shutdown waits for open requests
        "LONG_STREAM": 60.0,  # seconds after which a stream that holds resources is logged, once;
                              # None: never
        "MAX_IDLE_THREADS": 6,  # kept for the sync code of requests to come; as Python's thread
                                # pools, by default: the number of CPUs and 4, 32 at most
    }
"""

from difflib import get_close_matches
from typing import Any, cast

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from scoped.core.scope import Scope
from scoped.serving.streams import LongStream
from scoped.serving.threads import LentThread

__all__ = ["configure", "problems"]

_DEFAULTS: dict[str, Any] = {
    "TEARDOWN_TIMEOUT": Scope.teardown_timeout,
    "SLOW_TEARDOWN": Scope.slow_teardown,
    "SHUTDOWN_TIMEOUT": Scope.shutdown_timeout,
    "LONG_STREAM": LongStream.seconds,
    "MAX_IDLE_THREADS": LentThread.max_idle,
}


# More seconds than this are no bound, and far more than the platform's waits take.
_MOST = 1_000_000


def problems() -> list[tuple[str, str]]:
    """What is wrong with the setting, each with what to do."""
    given: Any = getattr(settings, "SCOPED", {})
    if not isinstance(given, dict):
        return [(f"SCOPED is {given!r}.", "Make it a dict.")]
    values = cast("dict[object, Any]", given)
    found: list[tuple[str, str]] = []
    if unknown := sorted(str(key) for key in values if key not in _DEFAULTS):
        hint = f"Known: {', '.join(_DEFAULTS)}."
        for key in unknown:
            for known in get_close_matches(key.upper(), _DEFAULTS, 1):
                hint += f" Did you mean {known} in place of {key}?"
        found.append((f"SCOPED has unknown keys: {', '.join(unknown)}.", hint))
    for key in _DEFAULTS:
        if key in values and (hint := _correction(key, values[key])):
            found.append((f"SCOPED[{key!r}] is {values[key]!r}.", hint))
    return found


def _correction(key: str, value: Any) -> str:
    number: float = value if isinstance(value, int | float) else -1
    is_number = number is value and not isinstance(value, bool)
    most = float("inf") if key == "SLOW_TEARDOWN" else _MOST  # that is no wait
    are_seconds = is_number and 0 < number <= most
    seconds = f"Set it to a number of seconds greater than 0, and {_MOST:,} at most"
    if key.endswith(("_TIMEOUT", "_TEARDOWN")) and not are_seconds:
        return f"{seconds}."
    if key == "LONG_STREAM" and value is not None and not are_seconds:
        return f"{seconds}, or to None for never."
    if key == "MAX_IDLE_THREADS" and not (is_number and 0 <= number <= _MOST and number % 1 == 0):
        return f"Set it to a number of threads, 0 or more, and {_MOST:,} at most."
    return ""


def configure() -> None:
    """
    Put the settings into force. Raises ImproperlyConfigured where a key is
    unknown or a value makes no sense; then none comes into force.
    """
    if found := problems():
        raise ImproperlyConfigured(" ".join(f"{problem} {hint}" for problem, hint in found))
    values: dict[str, Any] = {**_DEFAULTS, **getattr(settings, "SCOPED", {})}
    Scope.teardown_timeout = values["TEARDOWN_TIMEOUT"]
    Scope.slow_teardown = values["SLOW_TEARDOWN"]
    Scope.shutdown_timeout = values["SHUTDOWN_TIMEOUT"]
    LongStream.seconds = values["LONG_STREAM"]
    LentThread.max_idle = int(values["MAX_IDLE_THREADS"])


def _setting_changed(*, setting: str, **kwargs: Any) -> None:
    if setting == "SCOPED":
        configure()


setting_changed.connect(_setting_changed, dispatch_uid="scoped")
