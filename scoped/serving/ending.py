"""
What ends a request and its response, each step bounded: whatever of the project's runs
there (a stream's ``finally``, a receiver of ``request_finished``, a response's closers)
may take as long as a teardown may, and holds nothing up for ever.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context, copy_context
from typing import Any, cast

from django.http.response import HttpResponseBase

from scoped.core.scope import Scope
from scoped.core.waits import hop, outlast
from scoped.serving.threads import LentThread

__all__ = [
    "close_resources",
    "close_response",
    "close_stream",
    "closes_itself",
    "drop_stream",
    "in_place_of",
    "in_thread",
    "in_time",
    "sync_code_ended",
]

logger = logging.getLogger("scoped")


async def in_time(step: Awaitable[None], what: str) -> None:
    """
    Await it. After ``TEARDOWN_TIMEOUT`` seconds it is cancelled, and cancelled again each
    time that it has taken as long once more; then TimeoutError is raised.
    """
    task = asyncio.current_task()
    assert task is not None
    loop, seconds = task.get_loop(), Scope.teardown_timeout
    before, overdue = task.cancelling(), 0

    def expire() -> None:
        nonlocal overdue, timer
        overdue += 1
        logger.error("%s still runs after %g seconds: cancelling it.", what, seconds * overdue)
        task.cancel()
        timer = loop.call_later(seconds, expire, context=Context())

    timer = loop.call_later(seconds, expire, context=Context())
    try:
        await step
    except asyncio.CancelledError:
        if not overdue or task.cancelling() > before + overdue:
            raise  # somebody else's
    finally:
        timer.cancel()
        for _ in range(overdue):
            task.uncancel()
    if overdue:
        raise TimeoutError(
            f"{what} took longer than {seconds:g} seconds. Make it faster, or raise "
            'SCOPED["TEARDOWN_TIMEOUT"].'
        )


async def in_thread(thread: LentThread | None, work: Callable[[], None], what: str) -> None:
    """
    Run it in the request's thread, in time. Where other work hangs there it is run when
    that ends, should it ever, and not waited for.
    """
    if thread is None or not thread.is_busy:
        await in_time(hop(work), what)
        return
    thread.submit(copy_context().run, _late, work, what)


def _late(work: Callable[[], None], what: str) -> None:
    try:
        work()
    except Exception as error:
        logger.error("%s, late: %r", what, error, exc_info=error)


async def sync_code_ended(thread: LentThread, whose: object) -> None:
    """
    Wait for sync code that runs on in its thread, as that of a view which was cancelled:
    what it uses is not to be torn down under it, unless it takes too long.
    """
    what, seconds = f"The sync code of {whose}, which was cancelled,", Scope.teardown_timeout
    ended = asyncio.wrap_future(thread.submit(_nothing))
    cancellation = await outlast(ended, seconds=seconds)
    if not ended.done():
        logger.error("%s still runs after %g seconds, and is waited for no more.", what, seconds)
    if cancellation is not None:
        raise cancellation


def _nothing() -> None: ...


# The response


async def close_stream(response: Any, whose: object) -> None:
    """
    Django leaves a stream that was not consumed to its end to the garbage
    collector: it would be closed late, in another task.
    """
    iterator: Any = getattr(response, "_iterator", None)
    if hasattr(iterator, "aclose"):
        await in_time(iterator.aclose(), f"The end of the streaming body of {whose}")


async def drop_stream(response: Any, whose: object) -> None:
    """Close that of a response which nobody is sent."""
    try:
        await close_stream(response, whose)
    except Exception as error:
        logger.error("While a stream was dropped: %r", error, exc_info=error)


def in_place_of(response: Any, page: Any) -> Any:
    """What Django answers to a view's error also closes what the response had to."""
    page._resource_closers.extend(response._resource_closers)
    response._resource_closers.clear()
    return page


def close_resources(response: Any) -> None:
    """What ``HttpResponseBase.close()`` does before it sends the signal."""
    for closer in response._resource_closers:
        with suppress(Exception):
            closer()
    response._resource_closers.clear()
    response.closed = True


def closes_itself(response: Any) -> bool:
    """
    Whether its ``close()`` is not Django's own. That must be called as it is, and
    at its end sends ``request_finished``, to sync and async receivers alike.
    """
    cls = cast("type[HttpResponseBase]", type(response))
    return cls.close is not HttpResponseBase.close or "close" in vars(response)


def close_response(response: Any) -> None:
    """
    Call its ``close()``; where that does not come to the end of Django's own, which sends
    ``request_finished``, do that too.
    """
    response.closed = False  # it may have been served before
    try:
        response.close()
    finally:
        if not response.closed:
            HttpResponseBase.close(response)
