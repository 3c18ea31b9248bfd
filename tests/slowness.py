"""
How much slower than a developer's this machine is, by ``SCOPED_TEST_SLOWNESS``: 1,
unless the environment says otherwise. A test that must bound real time bounds it
by ``within(seconds)``; one that can wait for an event waits for that.
"""

import os

__all__ = ["FACTOR", "within"]

FACTOR = float(os.environ.get("SCOPED_TEST_SLOWNESS") or 1)
if not FACTOR >= 1:
    raise ValueError(f"SCOPED_TEST_SLOWNESS is {FACTOR}: set it to 1 or more.")


def within(seconds: float) -> float:
    """The seconds that it may take here what takes at most so many elsewhere."""
    return seconds * FACTOR
