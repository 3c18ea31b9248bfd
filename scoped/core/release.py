"""
Gives resources back before their scope closes: one, and what was set up with it.
"""

import asyncio
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any

from scoped.core.errors import AsyncResourceError
from scoped.core.scope import Scope, asker_here
from scoped.core.teardown import Elsewhere, Keeper
from scoped.core.waits import current_task, run_without_loop

if TYPE_CHECKING:
    from scoped.core.resource import Resource

__all__ = ["others_released", "release", "release_sync", "releasing"]


class Release:
    """Some of a scope is torn down while the scope stays open."""

    __slots__ = ("over", "tasks")

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self.over: asyncio.Future[None] = task.get_loop().create_future()
        self.tasks = [task]  # in which teardowns run


async def release(scope: Scope, resource: "Resource[Any]") -> None:
    """
    Tear it down now, and before it what has used it. Raises as ``close()`` does,
    and AsyncResourceError where this is not the place: then nothing has changed.
    """
    if not scope.is_open or not (resource in scope.values or scope.visible.releases):
        return
    scope.check_loop(resource)
    # One at a time: what two of them find they might tear down in any order.
    await others_released(scope)
    _check(scope, resource, in_loop=True)
    with releasing(scope):
        await _tear_down_users(scope, resource, in_loop=True)


def release_sync(scope: Scope, resource: "Resource[Any]") -> None:
    """As ``release()``, from sync code, for what is sync and was set up in this thread."""
    if not scope.is_open or resource not in scope.values:
        return
    if _others(scope):
        raise AsyncResourceError(
            resource,
            scope,
            "something else of its scope is being torn down right now",
            "Wait for that in async code, and release it then.",
        )
    _check(scope, resource, in_loop=False)
    run_without_loop(_tear_down_users(scope, resource, in_loop=False))


def _others(scope: Scope) -> list[Release]:
    """Those under way, but for one that has led here: its teardown asks for another."""
    releases = scope.visible.releases
    if not releases:
        return []
    task = current_task()
    return [release for release in releases if task is None or task not in release.tasks]


async def others_released(scope: Scope) -> None:
    while others := _others(scope):
        await asyncio.wait([release.over for release in others])


@contextmanager
def releasing(scope: Scope) -> Generator[None, None, None]:
    """While some of it is torn down: others wait for that."""
    holder, task = scope.visible, asyncio.current_task()
    assert task is not None
    release = Release(task)
    if holder.releases is None:
        holder.releases = []
    holder.releases.append(release)
    try:
        yield
    finally:
        holder.releases.remove(release)
        release.over.set_result(None)


async def _tear_down_users(scope: Scope, resource: "Resource[Any]", *, in_loop: bool) -> None:
    problems: list[BaseException] = []
    for holder, user, other in _users_last_first(scope, resource, problems, in_loop=in_loop):
        rest = holder.tear_down(user, other, None, problems)
        if rest is not None:
            await rest
    if problems:
        scope.raise_all(problems)


def _users_last_first(
    scope: Scope, resource: "Resource[Any]", problems: list[BaseException], *, in_loop: bool
) -> "Iterator[tuple[Scope, Resource[Any], Keeper | Elsewhere | None]]":
    """
    Takes them out. Looks anew each time, as while one is torn down others may be
    set up with what is still there.
    """
    while users := _users_of(scope, resource):
        try:
            _check(scope, resource, in_loop=in_loop)
        except AsyncResourceError as error:
            problems.append(error)
            return
        holder, user = users[-1]
        try:
            other = holder.take_out(user)
        except KeyError:  # another thread has released it, since the look
            continue
        if holder.uses is not None:
            holder.uses.pop(user, None)
        yield holder, user, other
        if user == resource:
            return  # what is there now has been set up since: it was the first of them


def _users_of(scope: Scope, resource: "Resource[Any]") -> "list[tuple[Scope, Resource[Any]]]":
    """What is to go when it goes, itself included, in the order in which it was set up."""
    if not scope.is_open:
        return []
    found: list[tuple[Scope, Resource[Any]]] = []
    gone: set[Resource[Any]] = set()
    for holder in scope.parts:
        uses = holder.uses or {}
        for one in list(holder.values):  # a user's set-up ends after that of what it uses
            if one == resource or not gone.isdisjoint(uses.get(one, ())):
                gone.add(one)
                found.append((holder, one))
    return found


def _check(scope: Scope, resource: "Resource[Any]", *, in_loop: bool) -> None:
    users = _users_of(scope, resource)
    for holder, user in users:
        _check_place(holder, user, in_loop=in_loop)
    doomed, asker = {user for _, user in users}, asker_here()
    for holder in scope.parts:
        for set_up in holder.set_ups():
            if doomed.isdisjoint(set_up.uses or ()) or set_up.waits_for(asker):
                continue
            raise AsyncResourceError(
                resource,
                scope,
                f"{set_up.resource} is being set up with it right now",
                "Release it when that is done.",
            )


def _check_place(scope: Scope, resource: "Resource[Any]", *, in_loop: bool) -> None:
    if not resource.factory.is_generator:
        return
    other = (scope.others or {}).get(resource)
    if not in_loop and resource.factory.is_async:
        raise AsyncResourceError(
            resource,
            scope,
            "it is async, and uses what sync code is about to release",
            "Release it first, with `await ....release()`.",
        )
    if isinstance(other, Elsewhere):
        here = in_loop or other.thread == get_ident()
    elif isinstance(other, Keeper):
        here = True
    else:
        here = scope.thread == get_ident() and scope.owner is current_task()
    if not here:
        raise AsyncResourceError(
            resource,
            scope,
            "what is torn down must be so where it was set up, and that is elsewhere",
            "Release it in the task or thread that used it first: for what a view has used, in "
            "the view itself.",
        )
