"""
A soak: random requests, endings and faults against the handler under a real
uvicorn, from a printed seed::

    python -m tests.soak --minutes 10

Rounds of a few seconds. In each, visitors run programs that they make up (which
steps a view takes, how it answers, how the visit ends) while faults strike;
then all come to rest, and what is left in the site, PostgreSQL and Redis is
compared with what was there at the start.

The seed decides what is asked and struck, and not the moment at which a fault
hits a request: the same seed makes much the same run, not the very same.
"""

from random import Random


def dice(*words: object) -> Random:
    """Chances that are the same for the same words."""
    return Random(" ".join(map(str, words)))  # noqa: S311 (to be repeated)
