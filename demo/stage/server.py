"""
What the server and the page tell each other: an ending, that it is to shut down and to serve anew;
the server, that it shuts down, so that open pages do not hold it up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class NoRestartError(RuntimeError):
    def __init__(self) -> None:
        super().__init__("This server cannot be told to restart: start it as `python -m demo`.")


def _refuse() -> None:
    raise NoRestartError


_ways: list[Callable[[], None]] = [_refuse]


def restarts_by(way: Callable[[], None]) -> None:
    """Say how, while a server runs that can."""
    _ways[:] = [way]


def restart() -> None:
    """Shut it down as a SIGTERM does, and serve anew. Raises NoRestartError where it cannot."""
    _ways[0]()


_pages: set[Callable[[], None]] = set()


@contextmanager
def told_of_the_end(end: Callable[[], None]) -> Iterator[None]:
    """While the ``with`` lasts, ``end`` is called when the server begins to shut down."""
    _pages.add(end)
    try:
        yield
    finally:
        _pages.discard(end)


def begin_the_end() -> None:
    for end in list(_pages):
        end()
