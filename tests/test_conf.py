"""The ``SCOPED`` setting: unknown keys and senseless values are refused in clear words."""

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from scoped.core.scope import Scope
from scoped.serving.streams import LongStream
from scoped.serving.threads import LentThread


@pytest.fixture(autouse=True)
def _defaults():
    def values():
        long_stream = LongStream.seconds
        return Scope.teardown_timeout, Scope.shutdown_timeout, LentThread.max_idle, long_stream

    before = values()
    yield
    assert values() == before


def test_settings_are_in_force_and_undone():
    with override_settings(
        SCOPED={
            "TEARDOWN_TIMEOUT": 1,
            "SHUTDOWN_TIMEOUT": 2.5,
            "SLOW_TEARDOWN": float("inf"),
            "MAX_IDLE_THREADS": 0,
            "LONG_STREAM": None,
        }
    ):
        assert LongStream.seconds is None
        assert (Scope.teardown_timeout, Scope.shutdown_timeout) == (1, 2.5)
        assert LentThread.max_idle == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"TEARDOWN_TIMOUT": 1}, "unknown keys: TEARDOWN_TIMOUT. Known: TEARDOWN_TIMEOUT, "),
        ({"TEARDOWN_TIMEOUT": 0}, "number of seconds greater than 0"),
        ({"SHUTDOWN_TIMEOUT": "10"}, "number of seconds greater than 0"),
        ({"SHUTDOWN_TIMEOUT": True}, "number of seconds greater than 0"),
        ({"TEARDOWN_TIMEOUT": float("inf")}, "and 1,000,000 at most"),
        ({"SHUTDOWN_TIMEOUT": 10**400}, "and 1,000,000 at most"),
        ({"MAX_IDLE_THREADS": 10**7}, "and 1,000,000 at most"),
        ({"SLOW_TEARDOWN": float("nan")}, "number of seconds greater than 0"),
        ({"LONG_STREAM": float("inf")}, "at most, or to None for never"),
        ({"LONG_STREAM": 0}, "number of seconds greater than 0, .* or to None for never"),
        ({"LONG_STREAM": "60"}, "number of seconds greater than 0, .* or to None for never"),
        ({"MAX_IDLE_THREADS": float("inf")}, "number of threads, 0 or more"),
        ({"MAX_IDLE_THREADS": -1}, "number of threads, 0 or more"),
        ({"MAX_IDLE_THREADS": 1.5}, "number of threads, 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(setting, message):
    with pytest.raises(ImproperlyConfigured, match=message):
        with override_settings(SCOPED=setting):
            pass
