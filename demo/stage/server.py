"""How an ending tells the server that serves it to shut down, and to serve anew."""

from collections.abc import Callable


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
