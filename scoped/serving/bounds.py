"""
Bounds for whatever of the project's runs at the end of a request (a stream's ``finally``, a
receiver of ``request_finished``, a response's closers): it may take as long as a teardown
may, and holds nothing up for ever.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from functools import partial

from scoped.core.deadline import Bound
from scoped.core.names import printable_repr
from scoped.core.scope import Scope
from scoped.core.waits import hop, outlast
from scoped.serving.threads import LentThread

__all__ = ["in_thread", "in_time", "sync_code_ended"]

logger = logging.getLogger("scoped")


async def in_time(step: Awaitable[None], what: str) -> None:
    """
    Await it. After ``TEARDOWN_TIMEOUT`` seconds it is cancelled, and cancelled again each
    time that it has taken as long once more; then TimeoutError is raised.
    """
    seconds = Scope.teardown_timeout
    text = "%s still runs after %g seconds: cancelling it."
    with Bound(seconds, partial(logger.error, text, what)) as bound:
        await step
    if bound.overdue:
        raise _too_long(what, seconds)


async def in_thread(thread: LentThread | None, work: Callable[[], None], what: str) -> None:
    """
    Run it in the request's thread. After ``TEARDOWN_TIMEOUT`` seconds it is no longer waited
    for, as nothing ends a thread that hangs, and TimeoutError is raised. Where other work hangs
    there, it is run when that ends, should it ever, and not waited for.
    """
    if thread is not None and thread.is_busy:
        thread.submit(copy_context().run, _late, work, what)
        return
    seconds = Scope.teardown_timeout
    try:
        await hop(work, seconds=seconds)
    except TimeoutError as error:
        if error.args:
            raise  # the work's own
        logger.error("%s still runs after %g seconds, and is waited for no more.", what, seconds)
        raise _too_long(what, seconds) from None


def _late(work: Callable[[], None], what: str) -> None:
    try:
        work()
    except Exception as error:
        logger.error("%s, late: %s", what, printable_repr(error), exc_info=error)


def _too_long(what: str, seconds: float) -> TimeoutError:
    return TimeoutError(
        f"{what} took longer than {seconds:g} seconds. Make it faster, or raise "
        'SCOPED["TEARDOWN_TIMEOUT"].'
    )


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
