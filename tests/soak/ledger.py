"""What the site holds, and what went wrong in it."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
from redis.exceptions import RedisError

from scoped import TeardownError


class PlannedError(Exception):
    """What a visitor has asked for."""


class ExhaustedError(Exception):
    """No connection became free in time."""


class Ledger:
    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.open: dict[int, str] = {}
        self.set_up: Counter[str] = Counter()
        self.torn_down: Counter[str] = Counter()
        self.violations: Counter[str] = Counter()

    @contextmanager
    def entry(self, name: str) -> Iterator[int]:
        """A resource's life, under a number that no other has."""
        number = next(self.numbers)
        self.open[number] = name
        self.set_up[name] += 1
        try:
            yield number
        finally:
            del self.open[number]
            self.torn_down[name] += 1

    def violate(self, promise: str) -> None:
        if len(self.violations) < 50 or promise in self.violations:  # else they would be a leak
            self.violations[promise] += 1

    def expect(self, kept: bool, promise: str) -> None:
        if not kept:
            self.violate(promise)


ledger = Ledger()


def is_fault(error: BaseException) -> bool:
    """Whether a fault that strikes a server, or the visitors' number, explains the error."""
    if isinstance(error, asyncpg.InterfaceError):
        # The pool takes back what is lost. The other messages tell of use by two at once.
        return "is closed" in str(error) or "released back to the pool" in str(error)
    if isinstance(error, asyncpg.InternalClientError):
        # asyncpg, between the server's FATAL error and the end of the connection; and where that
        # comes in the middle of a release.
        return "another operation (2)" in str(error) or "a free connection holder" in str(error)
    if isinstance(error, RuntimeError):
        return "the handler is closed" in str(error)  # uvloop's ConnectionResetError
    return isinstance(error, ExhaustedError | OSError | asyncpg.PostgresError | RedisError)


def is_expected(error: BaseException) -> bool:
    if isinstance(error, TeardownError):
        return all(is_expected(each) for each in error.exceptions)
    return isinstance(error, PlannedError) or is_fault(error)


class Watch(logging.Handler):
    """Takes what is logged for a violation, but for the failures of faulty or planned teardowns."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if record.name == "scoped" and error is not None and is_expected(error):
            return
        if record.name == "asyncio" and "unexpected connection_lost() call" in str(error):
            return  # asyncpg's, of a server that is killed in the midst of an authentication
        ledger.violate(f"logged by {record.name}: {record.getMessage()[:300]} {error!r}")
