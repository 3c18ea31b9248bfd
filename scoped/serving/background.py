"""Background tasks, each with a request scope of its own."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import nullcontext
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Literal, cast

from asgiref.sync import AsyncToSync

from scoped.core.current import current, scope_here
from scoped.core.errors import TeardownError, nobodys_cancellation
from scoped.core.names import printable, printable_repr
from scoped.core.request import RequestScope, ServedScope
from scoped.core.scope import Scope
from scoped.core.waits import is_cancelled, running_loop
from scoped.serving.bounds import in_thread, sync_code_ended
from scoped.serving.threads import LentThread, tidy

__all__ = ["begin_waiting", "drop_waiting", "spawn"]

logger = logging.getLogger("scoped")

# Event loops hold tasks weakly.
_tasks: set[asyncio.Task[None]] = set()

# Those that begin after the response of a request, whose end forgets them.
_waiting: dict[RequestScope, "list[_BackgroundScope]"] = {}


class _BackgroundScope(RequestScope):
    __slots__ = ("go", "is_brief", "served", "task")

    def open_beside(self, around: Scope | None) -> None:
        self.served = around is not None and around.served
        self.go: asyncio.Future[None] | None = None  # to wait for before it begins
        self.is_brief = _is_brief(asyncio.get_running_loop())
        self.task: asyncio.Task[None] | None = None
        # What is around it is not to be current again, nor kept; and where that is a factory of the
        # lifespan's, it is no part of its set-up.
        current.set(None)
        self.open()

    def give_up(self) -> "asyncio.Task[Any] | None":
        assert self.task is not None
        self.task.cancel()
        return self.task


def _is_brief(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether async_to_sync() has begun it, and ends it when it has what it was called for."""
    return loop in getattr(AsyncToSync, "loop_thread_executors", ())


def _name_of(coroutine: object) -> str:
    return getattr(coroutine, "__qualname__", None) or printable_repr(coroutine)


def spawn(
    coroutine: Coroutine[Any, Any, object],
    /,
    *,
    name: str | None = None,
    after: Literal["response"] | None = None,
) -> asyncio.Task[None]:
    """
    Run a coroutine in a background task that may outlive the request, with a
    request scope of its own, closed at its end. ContextVars are those of the caller.

    With ``after="response"`` it begins when the request's middleware is done and what is
    declared with ``until="response"`` has been torn down well, so after the COMMIT. If the
    request fails before, it never begins, and the task is cancelled.

    Returns the task: cancel it, or await its end. Its result is dropped, and an
    exception is logged with ``name`` (by default the coroutine's), not raised. The
    lifespan's shutdown waits for it, for ``SCOPED["SHUTDOWN_TIMEOUT"]`` seconds with the
    open requests, and then cancels it.

    Raises TypeError where it is given no coroutine, ValueError where ``after`` is something
    else, and RuntimeError where no event loop runs, or one that ends with the call of sync
    code (under WSGI, say), or no response is to come.
    """
    # asyncio's own question takes generators for coroutines on Python 3.11.
    if not isinstance(cast(object, coroutine), Coroutine):
        raise TypeError(
            f"spawn() takes a coroutine, and was given {_name_of(coroutine)}, of type "
            f"{type(coroutine).__name__}. Call the coroutine function: spawn(send_mail(user))."
        )
    name = printable(_name_of(coroutine) if name is None else str(name))
    around = scope_here()
    try:
        _check(_name_of(coroutine), around, after)
    except BaseException:
        _close_unused(coroutine)
        raise
    scope = _BackgroundScope(f"the background task {name}")
    context = copy_context()
    # Open from now on, so that a shutdown which begins before its first step waits for it.
    context.run(scope.open_beside, around)
    if after is not None:
        scope.go = asyncio.get_running_loop().create_future()
    task = context.run(asyncio.create_task, _run(scope, coroutine, name), name=name)
    scope.task = task
    _tasks.add(task)
    task.add_done_callback(partial(_ended, scope, coroutine, name, context))
    if isinstance(around, RequestScope) and scope.go is not None:
        _waiting.setdefault(around, []).append(scope)
        if around.has_responded:
            begin_waiting(around)
    return task


def _check(name: str, around: Scope | None, after: str | None) -> None:
    loop = running_loop()
    if loop is None:
        raise RuntimeError(
            f"spawn() was called for {name} where no event loop runs. Call it from "
            "async code, or through `async_to_sync` from a sync view served over ASGI."
        )
    if around is not None and around.sync_only and around.request is not None and _is_brief(loop):
        raise RuntimeError(
            f"spawn() was called for {name} in an event loop that ends with the view: {around} is "
            "served by WSGI. Serve the project over ASGI, `uvicorn project.asgi:application` say; "
            "or await it."
        )
    if after not in (None, "response"):
        raise ValueError(f'spawn() knows after="response" alone, and was given after={after!r}.')
    if after is not None and not (
        isinstance(around, ServedScope) and around.is_open and around.loop is loop
    ):
        raise RuntimeError(
            f'spawn(after="response") was called for {name} where no response is to come that '
            "it knows of. Call it in a request that is served by scoped.asgi or "
            "scoped.testing.AsyncClient; elsewhere leave `after` out."
        )


def begin_waiting(scope: RequestScope) -> None:
    """Its response is ended well, unless it has failed: begin what waits for that."""
    if scope.failure is not None:
        drop_waiting(scope)
        return
    for background in _waiting.pop(scope, ()):
        if background.go is not None and not background.go.done():
            background.go.set_result(None)


def drop_waiting(scope: RequestScope) -> None:
    """What waits for the response of a request that has failed never begins."""
    for background in _waiting.pop(scope, ()):
        _drop(background)


def _drop(background: _BackgroundScope) -> None:
    logger.info("%s never begins, for the request has failed.", background)
    background.give_up()


def _ended(
    scope: _BackgroundScope,
    coroutine: Coroutine[Any, Any, object],
    name: str,
    context: Context,
    task: asyncio.Task[None],
) -> None:
    _tasks.discard(task)
    if scope.is_open:  # cancelled before its first step
        _close_unused(coroutine)
        closing = context.run(task.get_loop().create_task, _close(scope, name, None))
        _tasks.add(closing)
        closing.add_done_callback(_tasks.discard)


async def _run(scope: _BackgroundScope, coroutine: Coroutine[Any, Any, object], name: str) -> None:
    scope.owner = asyncio.current_task()
    await _close(scope, name, _work(scope, coroutine))


async def _work(scope: _BackgroundScope, coroutine: Coroutine[Any, Any, object]) -> None:
    try:
        if scope.go is not None:
            await scope.go
        await coroutine
    finally:
        _close_unused(coroutine)


def _close_unused(coroutine: Coroutine[Any, Any, object]) -> None:
    """Where it has never begun. Where somebody else has it in hand, that one goes on."""
    if getattr(coroutine, "cr_await", None) is None:
        coroutine.close()


async def _close(
    scope: _BackgroundScope, name: str, work: Coroutine[Any, Any, None] | None
) -> None:
    """Do the work, if there is any, and close its scope, with a thread of its own for both."""
    failure: BaseException | None = None
    AsyncToSync.executors.current = None  # that of sync code which has started this task
    # The request's own may be another request's by then. In an event loop that sync code waits for,
    # a TestCase's say, it is the thread of that.
    thread = None if scope.is_brief else LentThread(tidy)
    with thread or nullcontext():
        try:
            if work is not None:
                await work
        except BaseException as error:
            failure = error
            if thread is not None:
                thread.lend_again = False
        try:
            if thread is not None and thread.is_busy:
                await sync_code_ended(thread, scope)
        except BaseException as error:  # cancelled once more: it is closed here all the same
            if failure is None:
                failure = error
        was_cancelled = is_cancelled()
        try:
            await scope.end(failure)
        except TeardownError as error:
            logger.error("The background task %s: %s", name, error, exc_info=error)
            if isinstance(failure, asyncio.CancelledError) and was_cancelled != is_cancelled():
                failure = None  # a factory's own, which has said why
        except RuntimeError as error:  # a factory's own, too
            failure = error
        finally:
            if thread is not None and thread.is_taken:
                await in_thread(thread, partial(_leave, thread), f"Tidying the thread of {scope}")
    if isinstance(failure, asyncio.CancelledError) and not is_cancelled():
        what = (
            "It was cancelled, though nobody has cancelled its task: it awaited something that had "
            "been"
        )
        failure = nobodys_cancellation(what, failure)
    try:
        if isinstance(failure, Exception):
            logger.error(
                "The background task %s failed: %s", name, printable_repr(failure), exc_info=failure
            )
        elif scope.is_brief and not _is_brief(asyncio.get_running_loop()):
            logger.error(
                "The background task %s was cut off, for its event loop has ended with the call of "
                "async_to_sync(), or the view under WSGI, in which it was begun. Await it there; "
                "hold `async with lifespan_scope():`, whose end waits for it; or serve over ASGI.",
                name,
            )
        if failure is not None and not isinstance(failure, Exception):
            raise failure
    finally:
        del failure  # no cycle with this frame


def _leave(thread: LentThread) -> None:
    tidy()
    thread.leave()
