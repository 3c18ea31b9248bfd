"""A stream that goes on for long, and keeps from others what its request has set up."""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from contextvars import Context, copy_context
from time import perf_counter
from typing import ClassVar, TypeVar

from scoped.core.inspect import picture
from scoped.core.request import RequestScope

__all__ = ["LongStream"]

T = TypeVar("T")

logger = logging.getLogger("scoped")


class LongStream:
    """Says so, once, when a request that streams has held resources for ``seconds``."""

    seconds: ClassVar[float | None] = 60.0  # None: never

    def __init__(self, scope: RequestScope) -> None:
        self.scope = scope
        self.began = perf_counter()
        self.timer: asyncio.TimerHandle | None = None
        self.due = None if self.seconds is None else self.began + self.seconds

    def watch(self) -> None:
        """In an event loop, which ``unwatch()`` is to end."""
        if self.seconds is not None:
            loop = asyncio.get_running_loop()
            # The Context is an argument, so that a timer which is cancelled lets go of it.
            look = copy_context().run
            self.timer = loop.call_later(self.seconds, look, self._expire, context=Context())

    def unwatch(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _expire(self) -> None:
        self.timer = None
        self._look()
        if self.due is not None:
            self.watch()

    def of(self, parts: Iterable[T]) -> Iterator[T]:
        """Where there is none: the parts of the stream, looking at the clock after each."""
        for part in parts:
            yield part
            if self.due is not None and perf_counter() >= self.due:
                self._look()

    def _look(self) -> None:
        """Where it holds nothing now, it may later."""
        assert self.due is not None
        now = perf_counter()
        if not (held := picture(self.scope, now).resources):
            self.due = now + (self.seconds or 0)
            return
        self.due = None
        logger.warning(
            "%s has been streaming for %.0f seconds, and holds %s all the while. Give back with "
            "release() what the stream does not need, or set it up in the stream for as long as "
            'it is needed; SCOPED["LONG_STREAM"] = None stops this warning.',
            self.scope,
            now - self.began,
            ", ".join(held),
        )
