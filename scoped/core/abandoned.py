"""
Scopes whose owner has gone without closing them: a fixture's, say, or a lifespan that nobody holds.
Their keepers would wait for ever when the event loop ends, so a guard closes them then.
"""

import asyncio
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING

from scoped.core.waits import set_done

if TYPE_CHECKING:
    from scoped.core.scope import Scope

__all__ = ["dismiss", "guards", "watch_over"]

# How each scope that is watched over is no more.
guards: "dict[Scope, Callable[[], object]]" = {}
_closing: "set[asyncio.Task[None]]" = set()


def watch_over(scope: "Scope") -> None:
    """To be called where a keeper begins to wait: from then on the event loop's end matters."""
    if scope in guards or not scope.is_open:
        return
    if (owner := scope.owner) is None or owner.done():
        _post(scope)
        return

    def gone(_: object) -> None:
        guards.pop(scope, None)
        watch_over(scope)

    owner.add_done_callback(gone, context=Context())
    # The owner may live for long, and see many scopes.
    guards[scope] = partial(owner.remove_done_callback, gone)


def dismiss(scope: "Scope") -> None:
    if (stop := guards.pop(scope, None)) is not None:
        stop()


def _post(scope: "Scope") -> None:
    over = asyncio.get_running_loop().create_future()
    guards[scope] = partial(_send_home, over)
    # Nobody knows of this task: so whoever cancels it cancels all, for the event loop ends.
    task = Context().run(asyncio.create_task, _guard(scope, over))
    task.add_done_callback(lambda task: _ended(scope, task), context=Context())


def _send_home(over: "asyncio.Future[None]") -> None:
    loop = over.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(set_done, over)


async def _guard(scope: "Scope", over: "asyncio.Future[None]") -> None:
    try:
        await over
    except asyncio.CancelledError as error:
        await scope.close_abandoned(error)


def _ended(scope: "Scope", task: "asyncio.Task[None]") -> None:
    if task.cancelled():  # before its first step
        closing = task.get_loop().create_task(scope.close_abandoned(asyncio.CancelledError()))
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)
        closing.add_done_callback(scope.log_late)  # nobody has cancelled this one
    elif (error := task.exception()) is not None:
        scope.log(error)
