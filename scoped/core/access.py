"""What ``await db()`` and ``tenant()`` run: one closure for each resource."""

import sys
from asyncio import current_task, get_running_loop
from collections.abc import Callable, Coroutine
from threading import get_ident
from typing import Any, cast

from scoped.core import release as releases
from scoped.core.current import current
from scoped.core.first_use import get, get_nowait, get_sync, set_up
from scoped.core.record import STARTING, Record
from scoped.core.resource import LIFESPAN, REQUEST, Resource

__all__ = ["async_access", "sync_access"]

_get_current = cast("Callable[[], Any]", current.get)

# An async value is for its own event loop only. Which one runs is cheaper to learn from the thread
# before Python 3.12.
_BY_LOOP = sys.version_info >= (3, 12)

# Each has a short way, for a value that is there, which pays for nothing else. One more is for what
# a request's owner is the first to ask for, be it in a factory. All else goes the long way.
# A factory runs outside the `except`: it would find a KeyError there.


def _first_use(resource: Resource[Any], here: Any) -> Coroutine[Any, Any, Any]:
    """``here``: what is current."""
    scope, asker = here, None
    if type(here) is Record:
        scope = here.scope
        asker = here
    if (
        scope is not None
        and resource.lifetime is REQUEST
        and scope.owns_set_ups
        and scope.owner is current_task()
        and resource not in scope.records
        and (asker is None or asker.state == STARTING)
    ):
        return set_up(scope.begin_alone(resource, asker), asker)
    return get(resource)


def async_access(resource: Resource[Any]) -> Any:
    get_current = _get_current

    async def of_request() -> Any:
        here = get_current()
        try:
            if here.loop is get_running_loop():
                return here.records[resource].value
        except KeyError:
            pass  # the usual reason, so it is looked for alone
        except AttributeError:
            pass
        return await _first_use(resource, here)

    async def of_request_by_thread() -> Any:
        here = get_current()
        try:
            if here.thread == get_ident():
                return here.records[resource].value
        except KeyError:
            pass  # the usual reason, so it is looked for alone
        except AttributeError:
            pass
        return await _first_use(resource, here)

    async def of_lifespan() -> Any:
        try:
            lifespan = get_current().lifespan
            if lifespan.loop is get_running_loop():
                return lifespan.records[resource].value
        except (KeyError, AttributeError):
            pass
        return await get(resource)

    async def of_lifespan_by_thread() -> Any:
        try:
            lifespan = get_current().lifespan
            if lifespan.thread == get_ident():
                return lifespan.records[resource].value
        except (KeyError, AttributeError):
            pass
        return await get(resource)

    def nowait() -> Any:
        return get_nowait(resource)

    async def release() -> None:
        await releases.release(resource)

    def stand_in(other: Resource[Any]) -> None:
        nonlocal resource
        resource = other

    if resource.lifetime is LIFESPAN:
        access: Any = of_lifespan if _BY_LOOP else of_lifespan_by_thread
    else:
        access = of_request if _BY_LOOP else of_request_by_thread
    access.get_nowait, access.stand_in = nowait, stand_in
    if resource.lifetime is not LIFESPAN:
        access.release = release
    return access


def sync_access(resource: Resource[Any]) -> Any:
    get_current = _get_current

    def of_request() -> Any:
        try:
            return get_current().records[resource].value
        except (KeyError, AttributeError):
            pass
        return get_sync(resource)

    def of_lifespan() -> Any:
        try:
            return get_current().lifespan.records[resource].value
        except (KeyError, AttributeError):
            pass
        return get_sync(resource)

    def release() -> None:
        releases.release_sync(resource)

    def stand_in(other: Resource[Any]) -> None:
        nonlocal resource
        resource = other

    access: Any = of_lifespan if resource.lifetime is LIFESPAN else of_request
    access.stand_in = stand_in
    if resource.lifetime is not LIFESPAN:
        access.release = release
    return access
