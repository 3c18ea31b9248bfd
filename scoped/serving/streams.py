"""
Streaming bodies: what they fail with, and those that go on for long and keep from others
what their request has set up.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextvars import Context, copy_context
from time import perf_counter
from typing import Any, ClassVar

from scoped.core.current import as_current
from scoped.core.inspect import picture
from scoped.core.request import RequestScope

__all__ = ["LongStream", "watch_without_loop"]

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

    def look_at_the_clock(self) -> None:
        """Where there is no event loop: to be called after each part."""
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


def watch_without_loop(response: Any, scope: RequestScope) -> None:
    """Have the scope see what the response's stream fails with, and whether it is a long one."""
    if getattr(response, "_iterator", None) is None:
        return  # a class of its own, which the server iterates in its own way
    watch = _parts_async if response.is_async else _parts
    # Not `streaming_content =`: of a file that the server sends in its own way, it would forget
    # that it is one.
    response._iterator = watch(response._iterator, response.make_bytes, scope)


_END = object()


def _parts(iterator: Iterator[Any], make_bytes: Any, scope: RequestScope) -> Iterator[bytes]:
    long_stream = LongStream(scope)
    parts = iter(iterator)
    try:
        while True:
            with as_current(scope):  # a server may take the parts of several in turn
                part = next(parts, _END)
            if part is _END:
                return
            yield make_bytes(part)
            long_stream.look_at_the_clock()
    except GeneratorExit:
        raise  # the server has had enough
    except BaseException as error:
        scope.note_failure(error)
        raise


async def _parts_async(
    iterator: AsyncIterator[Any], make_bytes: Any, scope: RequestScope
) -> AsyncIterator[bytes]:
    parts = aiter(iterator)
    try:
        while True:
            with as_current(scope):
                part = await anext(parts, _END)
            if part is _END:
                return
            yield make_bytes(part)
    except GeneratorExit:
        raise
    except BaseException as error:
        scope.note_failure(error)
        raise
