"""Background tasks, each with a request scope of its own."""

import asyncio
import logging
from collections.abc import Coroutine
from contextvars import copy_context
from functools import partial
from typing import Any

from asgiref.sync import ThreadSensitiveContext

from scoped.core.current import scope_here
from scoped.core.errors import TeardownError
from scoped.core.names import printable, printable_repr
from scoped.core.request import RequestScope
from scoped.core.scope import Scope
from scoped.core.waits import hop, running_loop
from scoped.serving.threads import LentThread, tidy

__all__ = ["spawn"]

logger = logging.getLogger("scoped")

# Event loops hold tasks weakly.
_tasks: set[asyncio.Task[None]] = set()


class _BackgroundScope(RequestScope):
    __slots__ = ("served",)

    def open_beside(self, around: Scope | None) -> None:
        self.served = around is not None and around.served
        self.open()
        self._previous = None  # it is not to be current again, nor kept

    def give_up(self) -> "asyncio.Task[Any] | None":
        if self.owner is not None:
            self.owner.cancel()
        return self.owner


def _name_of(coroutine: Coroutine[Any, Any, object]) -> str:
    return getattr(coroutine, "__qualname__", None) or printable_repr(coroutine)


def spawn(
    coroutine: Coroutine[Any, Any, object], /, *, name: str | None = None
) -> asyncio.Task[None]:
    """
    Run a coroutine in a background task that may outlive the request, with a
    request scope of its own, closed at its end. ContextVars are those of the caller.

    Returns the task: cancel it, or await its end. Its result is dropped, and an
    exception is logged with ``name`` (by default the coroutine's), not raised. The
    lifespan's shutdown waits for it, for ``SCOPED["SHUTDOWN_TIMEOUT"]`` seconds with the
    open requests, and then cancels it.

    Raises RuntimeError where no event loop runs.
    """
    if running_loop() is None:
        coroutine.close()
        raise RuntimeError(
            f"spawn() was called for {_name_of(coroutine)} where no event loop runs. Call it from "
            "async code, or through `async_to_sync` from a sync view served over ASGI."
        )
    name = printable(_name_of(coroutine) if name is None else str(name))
    scope = _BackgroundScope(f"the background task {name}")
    context = copy_context()
    # Open from now on, so that a shutdown which begins before its first step waits for it.
    context.run(scope.open_beside, scope_here())
    task = context.run(asyncio.create_task, _run(scope, coroutine, name), name=name)
    _tasks.add(task)
    task.add_done_callback(partial(_ended, scope, coroutine))
    return task


def _ended(
    scope: RequestScope, coroutine: Coroutine[Any, Any, object], task: asyncio.Task[None]
) -> None:
    _tasks.discard(task)
    if scope.is_open:  # cancelled before its first step
        coroutine.close()
        closing = task.get_loop().create_task(scope.close())
        _tasks.add(closing)
        closing.add_done_callback(_tasks.discard)


async def _run(scope: _BackgroundScope, coroutine: Coroutine[Any, Any, object], name: str) -> None:
    scope.owner = asyncio.current_task()
    thread = LentThread(tidy)  # the request's own may be another request's by then
    failure: BaseException | None = None
    try:
        async with ThreadSensitiveContext(executor=thread):
            try:
                await coroutine
            except BaseException as error:
                failure = error
            try:
                await scope.close(failure)
            except TeardownError as error:
                logger.error("The background task %s: %s", name, error, exc_info=error)
            finally:
                if thread.is_taken:
                    await hop(tidy)
    finally:
        thread.give_back()
    try:
        if isinstance(failure, Exception):
            logger.error(
                "The background task %s failed: %s", name, printable_repr(failure), exc_info=failure
            )
        elif failure is not None:
            raise failure
    finally:
        del failure  # no cycle with this frame
