"""
First use: a resource is set up once, by whoever comes first; the others wait, and are told.

The scope's *owner* task runs an async factory inline: no task, no hop. Asked for in any other
task, it runs in a keeper. A sync factory runs in the thread that asks.
"""

import asyncio
from contextlib import suppress
from contextvars import Context
from functools import partial
from threading import get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any

from scoped.core import observer
from scoped.core.current import asker_here, current, scope_here
from scoped.core.errors import (
    AsyncResourceError,
    CircularResourceError,
    ScopeClosedError,
    ScopedError,
    note,
)
from scoped.core.lookup import scope_for
from scoped.core.place import Keeper, OwnThread, Thread, begin_finish, thread_here
from scoped.core.record import ENDING, GONE, HELD, STARTING, Latch, Outcome, Record
from scoped.core.resource import LIFESPAN
from scoped.core.waits import running_loop, sync_parent

if TYPE_CHECKING:
    from scoped.core.resource import Resource

__all__ = ["get", "get_nowait", "get_sync", "set_up"]

# Seconds for which somebody waits whose thread the set-up may itself be waiting for: sync code in
# the event loop's thread for another thread, sync code in a thread for the event loop.
_PATIENCE = 10.0


async def get(resource: "Resource[Any]") -> Any:
    """The value of an async resource, set up now if need be."""
    scope, asker = scope_for(resource), asker_here()
    while True:
        scope.check_loop(resource)
        record, is_new = scope.begin(resource, asker)
        if not is_new:
            try:
                return record.value
            except AttributeError:
                scope.forget(record)
        if is_new and scope.owns_set_ups and scope.owner is asyncio.current_task():
            return await set_up(record, asker)
        outcome = await _wait(record, asker, is_new)
        if outcome is not None and _is_for(outcome, record, is_new):
            try:
                return outcome.result()
            finally:
                del outcome  # no cycle of its error and this frame


def _is_for(outcome: Outcome, record: Record, is_new: bool) -> bool:
    """Whether who waits has that outcome; else it tries again, which tells where a scope closes."""
    if outcome.error is None:
        return record.scope.is_open or record.state == HELD
    # Innocent of a cancellation are those who did not start the set-up.
    if not is_new and not isinstance(outcome.error, Exception):
        return False
    return record.scope.is_open or isinstance(outcome.error, ScopeClosedError)


async def _wait(record: Record, asker: Record | None, is_new: bool) -> Outcome | None:
    """Wait for its set-up, which is handed to a keeper where it is new. Returns its outcome."""
    waiter: asyncio.Future[Outcome | None] = asyncio.get_running_loop().create_future()
    blocked = asker or _set_up_around()
    if blocked is not None:
        try:
            blocked.need(record, waiter)
        except CircularResourceError:
            if not _is_of_another_task(blocked):
                raise
            asker = blocked = None  # it only shares the Context, and so is no part of that set-up
    timer: asyncio.TimerHandle | None = None
    record.wait(waiter)
    try:
        if is_new:
            record.place = keeper = Keeper(record)
            asked_by = _whose_factory(asker)
            keeper.start(partial(set_up, record, None, asked_by), record.scope.context())
        elif record.state != STARTING and not waiter.done():
            return None  # pragma: no cover (it has gone since begin(): a thread's doing)
        elif sync_parent() is not None:
            # Sync code waits for this task, in a thread that the set-up may need.
            loop = waiter.get_loop()
            timer = loop.call_later(_PATIENCE, _give_up, record, waiter, context=Context())
        return await waiter
    finally:
        record.forget(waiter)
        if blocked is not None:
            blocked.got(waiter)
        if timer is not None:
            timer.cancel()
        if not record.waiters and record.state == STARTING and isinstance(record.place, Keeper):
            record.place.cancel()  # nobody wants it any more


def _give_up(record: Record, waiter: "asyncio.Future[Any]") -> None:
    if not waiter.done():  # pragma: no branch (it came in the very turn in which time was up)
        error = AsyncResourceError(
            record.resource,
            record.scope,
            f"another task has been setting it up for {_PATIENCE:g} seconds, and may be "
            "waiting for the thread in which sync code waits for it here",
            "Await it in async code before, in the view or in a middleware, say; sync code "
            "then has it at once.",
        )
        waiter.set_result(Outcome(None, error))


def _set_up_around() -> Record | None:
    """
    The set-up that waits for the code at hand, though that is not asked by it: its factory has
    opened the scope that is current.
    """
    scope = scope_here()
    around = None if scope is None else scope.around
    while around is not None and not isinstance(around, Record):
        around = around.around
    if around is None or around.state != STARTING:
        return None
    # A task that it has started may have a scope of its own, for which it need not wait.
    assert scope is not None
    return around if scope.owner in (None, _task_of(around)) else None


def _task_of(record: Record) -> "asyncio.Task[Any] | None":
    """Which runs its factory."""
    place = record.place
    return place.task if isinstance(place, Keeper) else record.scope.owner


def _is_of_another_task(asker: Record) -> bool:
    """
    Two tasks may share one Context (``create_task(context=...)``). Then what one's factory
    has left in the ContextVar says nothing of the other.
    """
    task = asyncio.current_task()
    keeper = _task_of(asker)
    contexts = [getattr(one, "get_context", lambda: None)() for one in (task, keeper)]
    return task is not keeper and contexts[0] is not None and contexts[0] is contexts[1]


async def set_up(
    record: Record, asker: Record | None, asked_by: "Resource[Any] | None" = None
) -> Any:
    """
    An async factory, here: in a keeper's task; or in the owner's, where the asker, a factory that
    runs in this task, waits for it.
    """
    scope = record.scope
    began = 0.0 if observer.observer is None else perf_counter()
    outer = current.get()
    blocked = asker
    try:
        if asker is not None:
            if began:
                asked_by = _whose_factory(asker)
        elif scope.around is not None and record.place is None:
            blocked = _set_up_around()
        if blocked is not None:
            blocked.note_need(record, record)  # it is new, and so waits for nothing yet
        current.set(record)
        generator, coming = record.resource.start()
        value = await coming
        if not scope.complete(record, generator, value):
            await _refuse(record)
    except BaseException as raised:
        record.state = GONE  # first, and without a call: the stack may be at its end
        # Where the garbage collector has ended this, it is somebody else's Context.
        if current.get() is record:
            current.set(outer)
        error = _explained(record, raised)
        scope.fail(record, error)
        if began:
            _tell(record, began, error, asked_by)
        try:
            if error is raised:
                raise
            raise error from None
        finally:
            del error
    finally:
        if blocked is not None:
            blocked.got(record)
    current.set(outer)  # which its factory may have set: to a scope that it holds, say
    if began:
        _tell(record, began, None, asked_by)
    return value


async def _refuse(record: Record) -> None:
    """What is complete only after the scope has begun to close is torn down at once."""
    scope = record.scope
    try:
        if record.generator is not None:
            rest = begin_finish(record, scope.failure)
            if rest is not None:
                await rest
    except Exception as error:
        scope.log(error)  # perhaps nobody waits any more to be told
    raise scope.closed_error(record.resource)


def _explained(record: Record, error: BaseException) -> BaseException:
    """What a set-up failed with, for its user to read."""
    factory = record.resource.factory
    if isinstance(error, StopAsyncIteration) and factory.is_generator:
        return factory.never_yielded()
    if isinstance(error, Exception) and not isinstance(error, ScopedError):
        note(error, f"while {record.resource} was set up")
    return error


def _whose_factory(asker: Record | None) -> "Resource[Any] | None":
    """Asks for it; None if a teardown does."""
    return None if asker is None or asker.state == ENDING else asker.resource


def _tell(
    record: Record, began: float, error: BaseException | None, asked_by: "Resource[Any] | None"
) -> None:
    if (told := observer.observer) is not None:
        seconds = perf_counter() - began
        told.resource_set_up(record.resource, record.scope, seconds, error, asked_by)


# In sync code


def get_nowait(resource: "Resource[Any]") -> Any:
    """The value of an async resource, for sync code, where it is set up already."""
    scope = scope_for(resource)
    if scope.sync_only:
        scope.check_loop(resource)  # says that there is none
    if resource in scope.records:
        record, is_new = scope.begin(resource, asker_here())  # notes who asks
        if is_new:  # another thread has released it since the look
            scope.fail(record, asyncio.CancelledError())
        with suppress(AttributeError):
            return record.value
    if not scope.takes(resource):
        raise scope.closed_error(resource)
    raise AsyncResourceError(
        resource,
        scope,
        "it has not been set up yet, and sync code cannot wait for that",
        "Await it before, in a middleware, say; or use `async_to_sync(...)()`.",
    )


def get_sync(resource: "Resource[Any]") -> Any:
    """The value of a sync resource, set up now if need be, in this thread."""
    scope, asker = scope_for(resource), asker_here()
    while True:
        record, is_new = scope.begin(resource, asker)
        if is_new:
            if not scope.takes(resource):  # it closes: another thread's doing, since the look
                scope.fail(record, error := scope.closed_error(resource))
                raise error
            return _set_up_sync(record, asker)
        try:
            return record.value
        except AttributeError:
            scope.forget(record)
        if record.state == STARTING:
            outcome = _wait_for_thread(record, asker)
            if outcome is not None and _is_for(outcome, record, is_new=False):
                try:
                    return outcome.result()
                finally:
                    del outcome  # no cycle of its error and this frame


def _wait_for_thread(record: Record, asker: Record | None) -> Outcome | None:
    latch = Latch()
    blocked = asker or _set_up_around()
    if blocked is not None:
        blocked.need(record, latch)
    record.wait(latch)
    # Elsewhere a thread may wait for as long as it takes; not where the set-up may need this one.
    is_bound = running_loop() is not None or _is_in_this_thread(record)
    try:
        if record.state == STARTING and not latch.lock.acquire(
            timeout=_PATIENCE if is_bound else -1
        ):
            raise AsyncResourceError(
                record.resource,
                record.scope,
                f"it has been set up in this very thread for {_PATIENCE:g} seconds, and so may "
                "be waiting for itself"
                if _is_in_this_thread(record)
                else f"another thread has been setting it up for {_PATIENCE:g} seconds, and may be "
                "waiting for this event loop",
                "In async code use `await sync_to_async(...)()` for it.",
            )
        return latch.outcome
    finally:
        record.forget(latch)
        if blocked is not None:
            blocked.got(latch)


def _is_in_this_thread(record: Record) -> bool:
    """Called by its own factory, through the event loop; or by another greenlet of the thread."""
    place = record.place
    if place is None:
        return record.scope.thread == get_ident()
    return isinstance(place, Thread) and place.ident == get_ident()


def _set_up_sync(record: Record, asker: Record | None) -> Any:
    scope, resource = record.scope, record.resource
    context: Context | None = None
    began = 0.0 if observer.observer is None else perf_counter()
    asked_by = _whose_factory(asker)
    outer = current.get()
    blocked = asker
    try:
        if not scope.is_owner_here():
            context = scope.context()
            record.place = Thread(context)
        if asker is None and scope.around is not None:
            blocked = _set_up_around()
        if blocked is not None:
            blocked.note_need(record, record)
        if context is None:
            current.set(record)
            generator, value = resource.start()
        else:
            generator, value = _start_in(context, record)
        if not scope.complete(record, generator, value):
            _refuse_sync(record)
    except BaseException as raised:
        record.state = GONE  # as above
        error = _explained(record, raised)
        scope.fail(record, error)
        if began:
            _tell(record, began, error, asked_by)
        del error
        raise
    finally:
        if context is None:
            current.set(outer)
        if blocked is not None:
            blocked.got(record)
    if began:
        _tell(record, began, None, asked_by)
    return value


def _start_in(context: "Context", record: Record) -> tuple[Any, Any]:
    """In this thread, to which there is a way back, or in one of its own."""
    scope, resource, place = record.scope, record.resource, record.place
    assert isinstance(place, Thread)
    context.run(current.set, record)
    if not resource.factory.is_generator or resource.lifetime is not LIFESPAN:
        return _start(context, resource)
    if get_ident() == scope.thread:
        return _start(context, resource)
    # A lifespan's generator outlives the work that has brought its thread here.
    if (way := getattr(thread_here, "way", None)) is not None:
        started = _start(context, resource)
        place.way = way
        way.keep()
        return started
    place.way = way = OwnThread()
    in_own_thread: list[tuple[Any, Any]] = []

    def start() -> None:
        place.ident = get_ident()
        in_own_thread.append(_start(context, resource))

    try:
        way.submit(start).result()
    except BaseException:
        way.let_go()
        raise
    return in_own_thread.pop()


def _start(context: "Context", resource: "Resource[Any]") -> tuple[Any, Any]:
    started: tuple[Any, Any] = context.run(resource.start)
    return started


def _refuse_sync(record: Record) -> None:
    scope, generator = record.scope, record.generator
    try:
        if generator is not None and isinstance(record.place, Thread):
            record.place.tear_down_now(record, scope.failure)
        elif generator is not None:
            record.resource.factory.finish(generator, scope.failure)
    except Exception as error:
        scope.log(error)
    raise scope.closed_error(record.resource)
