"""
Gives resources back before their scope closes: one, and before it what has used it, in reverse
order of completion. What nothing in it has to do with stays.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from scoped.core.current import asker_here, scope_here
from scoped.core.errors import AsyncResourceError
from scoped.core.record import HELD, STARTING, Record
from scoped.core.teardown import begin_end, others_ending, raise_all, wait_for_others
from scoped.core.waits import run_without_loop, set_done

if TYPE_CHECKING:
    from scoped.core.resource import Resource
    from scoped.core.scope import Scope

__all__ = ["release", "release_sync"]


async def release(resource: "Resource[Any]") -> None:
    """
    Tear it down now, and before it what has used it. Raises as ``close()`` does,
    and AsyncResourceError where this is not the place: then nothing has changed.
    """
    scope = scope_here()
    if scope is None or not scope.is_open or not (resource in scope.records or scope.ending):
        return
    scope.check_loop(resource)
    if asker_here() is not None:  # whom others may wait for: so it takes no turn
        await _release(scope, resource)
        return
    await _take_turn(scope)
    try:
        await _release(scope, resource)
    finally:
        _end_turn(scope)


async def _release(scope: "Scope", resource: "Resource[Any]") -> None:
    # One at a time: what two of them find they might tear down in any order.
    await wait_for_others(scope, in_loop=True)
    if (wanted := _held(scope, resource)) is not None:
        await _Release(wanted, in_loop=True).run()


def release_sync(resource: "Resource[Any]") -> None:
    """As ``release()``, from sync code, for what is sync and was set up in this thread."""
    scope = scope_here()
    if scope is None or (wanted := _held(scope, resource)) is None:
        return
    if others_ending(scope):
        raise AsyncResourceError(
            resource,
            scope,
            "something else of its scope is being torn down right now",
            "Wait for that in async code, and release it then.",
        )
    run_without_loop(_Release(wanted, in_loop=False).run())


# Who waits for a turn to release in a scope, the first first; there while it is somebody's. So each
# who waits is woken once: all of them at each end would be work without bound. (An asyncio.Lock
# looks through all who wait for each that is cancelled.)
_turns: "dict[Scope, OrderedDict[asyncio.Future[None], None]]" = {}


async def _take_turn(scope: "Scope") -> None:
    if scope not in _turns:
        _turns[scope] = OrderedDict()
        return
    turns = _turns[scope]
    turns[turn := asyncio.get_running_loop().create_future()] = None
    try:
        await turn
    except BaseException:
        if turn in turns:
            del turns[turn]
        else:  # it came in this moment
            _end_turn(scope)
        raise


def _end_turn(scope: "Scope") -> None:
    if turns := _turns[scope]:
        set_done(turns.popitem(last=False)[0])
    else:
        del _turns[scope]


def _held(scope: "Scope", resource: "Resource[Any]") -> Record | None:
    record = scope.records.get(resource)
    return record if record is not None and record.state == HELD and scope.is_open else None


class _Release:
    def __init__(self, wanted: Record, *, in_loop: bool) -> None:
        self.wanted = wanted
        self.scope = wanted.scope
        self.in_loop = in_loop
        self.asker = asker_here()

    async def run(self) -> None:
        problems: list[BaseException] = []
        self.scope.table_of_ending()  # from now on what other threads change changes the version
        version, users = self.scope.version, self.check()  # before anything changes
        for record in self.last_users_first(version, users, problems):
            if record is None:  # another thread has it: what it uses goes after it
                await wait_for_others(self.scope, in_loop=self.in_loop)
            elif (rest := begin_end(record, None, problems)) is not None:
                await rest
        if problems:
            raise_all(self.scope, problems)

    def last_users_first(
        self, version: int, users: list[Record], problems: list[BaseException]
    ) -> Iterator[Record | None]:
        """
        Takes them; None for one that somebody else has taken. Looks anew where anything has
        changed, for while one is torn down others may be set up with what is still there.
        """
        scope = self.scope
        while self.wanted.state == HELD and scope.is_open:
            if scope.version != version or not users:
                version = scope.version
                try:
                    users = self.check()
                except AsyncResourceError as error:
                    problems.append(error)
                    return
            if users and scope.take_and_tell(record := users.pop()):
                if self.asker is not None:  # its own end, if it is ending, waits for this one's
                    self.asker.note_need(record, record)
                yield record
                if self.asker is not None:
                    self.asker.got(record)
            elif scope.is_open:
                yield None

    def users(self) -> list[Record]:
        """What is to go when it goes, itself the first, in the order of completion."""
        wanted, records = self.wanted, list(self.scope.records.values())
        if not [one for one in records if wanted in (one.uses or ())]:  # as is usual
            return [wanted] if wanted.state == HELD else []
        records = [one for one in records if one.state == HELD]
        records.sort(key=lambda record: record.number)
        gone: set[Record] = {wanted}
        for record in records:  # a user is complete after what it uses
            if not gone.isdisjoint(record.used):
                gone.add(record)
        return [record for record in records if record in gone]

    def check(self) -> list[Record]:
        """The users, unless this is not the place, or not the time: AsyncResourceError."""
        doomed = self.users()
        for record in doomed:
            self.check_place(record)
        gone, asker = set(doomed), self.asker
        for record in list(self.scope.records.values()):
            if (
                record.state == STARTING
                and not gone.isdisjoint(record.used)
                # A factory may release what it has used, itself or in a child task.
                and not (asker is not None and record.way_to(asker) is not None)
            ):
                raise AsyncResourceError(
                    self.wanted.resource,
                    self.scope,
                    f"{record.resource} is being set up with it right now",
                    "Release it when that is done.",
                )
        return doomed

    def check_place(self, record: Record) -> None:
        if record.generator is None:
            return
        if not self.in_loop and record.resource.factory.is_async:
            raise AsyncResourceError(
                record.resource,
                self.scope,
                "it is async, and uses what sync code is about to release",
                "Release it first, with `await ....release()`.",
            )
        place = record.place
        if not (
            self.scope.is_owner_here() if place is None else place.is_here(in_loop=self.in_loop)
        ):
            raise AsyncResourceError(
                record.resource,
                self.scope,
                "what is torn down must be so where it was set up, and that is elsewhere",
                "Release it in the task or thread that used it first: for what a view has used, in "
                "the view itself.",
            )
