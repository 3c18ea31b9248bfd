"""
The end of what a scope holds: one after the other, last complete first, whatever fails or is
cancelled on the way. Problems are collected, and raised once.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from operator import attrgetter
from threading import get_ident
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

from scoped.core import observer
from scoped.core.current import current
from scoped.core.errors import TeardownError, nobodys_cancellation, note
from scoped.core.place import Keeper, Thread, begin_finish
from scoped.core.record import GONE, HELD, STARTING, Latch, LoopLatch, Record
from scoped.core.resource import LIFESPAN
from scoped.core.waits import current_task, outlast

if TYPE_CHECKING:
    from scoped.core.resource import Lifetime
    from scoped.core.scope import Scope

__all__ = [
    "begin_end",
    "end_all",
    "others_ending",
    "raise_all",
    "stop_keepers",
    "wait_for_others",
    "wait_for_threads",
]


def begin_end(
    record: Record,
    failure: BaseException | None,
    problems: list[BaseException],
) -> Awaitable[None] | None:
    """
    Begin to tear down a record that has been taken. Returns what is to be awaited for the rest,
    if that was not all. What it raises is added to the problems, a cancellation too.
    """
    if record.generator is None:
        record.gone()
        return None
    scope = record.scope
    began = 0.0 if observer.observer is None else perf_counter()
    rest: Coroutine[Any, Any, None] | None
    outer = None
    try:
        if record.place is not None:
            rest = record.place.tear_down(record, failure)
        else:
            if scope.is_open:
                # So that what its code releases, in child tasks too, is known to be asked by it.
                outer = current.get()
                current.set(record)
            rest = begin_finish(record, failure)
    except BaseException as error:
        _over(record, began, outer, error, problems)
        return None
    if rest is not None:
        return _end(record, rest, began, outer, problems)
    if outer is None and not began:
        record.gone()  # as most do, so without a call more
    else:
        _over(record, began, outer, None, problems)
    return None


async def _end(
    record: Record,
    rest: Awaitable[None],
    began: float,
    outer: "Scope | Record | None",
    problems: list[BaseException],
) -> None:
    record.scope.table_of_ending()[record] = None  # others wait for it, but not its own code
    raised: BaseException | None = None
    try:
        await rest
    except BaseException as error:
        raised = error
    _over(record, began, outer, raised, problems)
    del raised


def _over(
    record: Record,
    began: float,
    outer: "Scope | Record | None",
    error: BaseException | None,
    problems: list[BaseException],
) -> None:
    if outer is not None and current.get() is record:
        current.set(outer)
    resource = record.resource
    record.gone()
    if error is not None:
        note(error, f"while {resource} was torn down")
        problems.append(error)
    if began and (told := observer.observer) is not None:
        told.resource_torn_down(resource, record.scope, perf_counter() - began, error)


def end_all(
    scope: "Scope",
    lifetime: "Lifetime",
    failure: BaseException | None,
    problems: list[BaseException],
) -> Iterator[Awaitable[None]]:
    """
    Tear down what the scope holds that lives no longer than that: what lives until the response
    before the rest, and last complete first. Gives what is to be awaited in between.
    """
    # Anew, as what a thread completes meanwhile may be there, before it finds the scope closed.
    has_waited = False
    while scope.records or scope.ending:
        try:
            held, is_busy = sorted(scope.records.values(), key=_number), False
        except AttributeError:  # what is being set up has no number yet
            held = [record for record in list(scope.records.values()) if record.state == HELD]
            held.sort(key=_number)
            is_busy = not has_waited
        if lifetime is not LIFESPAN:
            held = [record for record in held if record.resource.lifetime <= lifetime]
        if is_busy or scope.ending:
            yield scope.stop(lifetime, problems)
            if not has_waited:
                has_waited = True
                continue
        if not held:
            break
        while held:
            record = held.pop()
            if scope.take(record):
                rest = begin_end(record, failure, problems)
                if rest is not None:
                    yield rest
            else:  # another thread has it: what it uses goes after it
                yield scope.stop(lifetime, problems)
                break


_number = attrgetter("number")


# Who is at work meanwhile


async def stop_keepers(scope: "Scope", lifetime: "Lifetime") -> asyncio.CancelledError | None:
    """
    What is being set up in a keeper is cancelled; again only when its end has taken as long as a
    teardown may.
    """
    cancellation = None
    here = current.get()
    while keepers := [
        record.place
        for record in list(scope.records.values())
        if record.state == STARTING
        and isinstance(record.place, Keeper)
        and not record.place.is_over
        and record.resource.lifetime <= lifetime
        and not _leads_to(record, here)
    ]:
        for keeper in keepers:
            keeper.cancel()
        tasks = [keeper.task for keeper in keepers]
        cancellation = (
            await outlast(*filter(None, tasks), seconds=scope.teardown_timeout) or cancellation
        )
        for keeper in keepers:
            keeper.is_unwanted = False  # it has had its time: once more
    return cancellation


async def wait_for_threads(
    scope: "Scope", lifetime: "Lifetime", deadline: float, *, in_loop: bool
) -> None:
    """
    A thread that sets up finds out itself that the scope closes, and is waited for, where
    it uses what would else be torn down under it.
    """
    await _until_none(partial(_in_threads, scope, lifetime), deadline, in_loop=in_loop)


def _in_threads(scope: "Scope", lifetime: "Lifetime") -> list[Record]:
    """Sync set-ups under way in other threads that use what is to end, or may end thereafter."""
    here = current.get()
    return [
        record
        for record in list(scope.records.values())
        if record.state == STARTING
        and isinstance(place := record.place, Thread)
        and place.ident != get_ident()
        and record.resource.lifetime <= lifetime
        and not _leads_to(record, here)
        and any(
            used.state in (HELD, STARTING) and used.resource.lifetime <= lifetime
            for used in record.used
        )
    ]


def _leads_to(record: Record, here: object) -> bool:
    """Whether the code at hand is a part of it, or it waits for that."""
    return isinstance(here, Record) and record.way_to(here) is not None


def others_ending(scope: "Scope") -> list[Record]:
    """What is being torn down, but for what waits for the code at hand, or has it as a part."""
    if not (ending := scope.ending):
        return []
    here = current.get()
    # Not those alone which are ENDING: between the claim and that a thread may be interrupted.
    return [
        record for record in list(ending) if record.state != GONE and not _leads_to(record, here)
    ]


async def wait_for_others(scope: "Scope", *, in_loop: bool) -> None:
    """Until nothing else of it is being torn down; sync code waits as long as a teardown may."""
    deadline = math.inf if in_loop else monotonic() + scope.teardown_timeout
    await _until_none(partial(others_ending, scope), deadline, in_loop=in_loop)


async def _until_none(find: Callable[[], list[Record]], deadline: float, *, in_loop: bool) -> None:
    """Wait for one after the other that it finds; sync code does so without its event loop."""
    while found := find():
        latch = LoopLatch() if in_loop else Latch()
        found[0].wait(latch)
        try:
            # Looked for again now that it is told of: nobody is missed.
            if found[0] in find() and not await latch.opened(deadline - monotonic()):
                break
        finally:
            found[0].forget(latch)


# What is raised


def raise_all(scope: "Scope", problems: list[BaseException]) -> NoReturn:
    """
    A reason to stop bare, if there is one; else the errors, as a group, and a cancellation among
    them that nobody has asked for from outside. Empties the list.
    """
    errors: list[Exception] = []
    fatal: BaseException | None = None
    problem: BaseException | None = None
    is_cancelled = (task := current_task()) is None or task.cancelling() > 0
    for problem in problems:
        if isinstance(problem, Exception):
            errors.append(problem)
        elif isinstance(problem, asyncio.CancelledError) and not is_cancelled:
            what = (
                f"A teardown of {scope} was cancelled, and the task that closes it was not: it "
                "awaited something that had been cancelled, its own task was, or the time was up "
                "of a timeout that another factory holds across its `yield`"
            )
            errors.append(nobodys_cancellation(what, problem))
        # The later one counts, but no cancellation hides a KeyboardInterrupt.
        elif fatal is None or isinstance(fatal, asyncio.CancelledError):
            fatal = problem
    problems.clear()  # no cycle of what is raised and the frames that it leaves
    try:
        if fatal is None:
            raise TeardownError(scope, errors)
        if errors:
            scope.log(TeardownError(scope, errors))
        raise fatal
    finally:
        del fatal, errors, problem
