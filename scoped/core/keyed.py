"""What ``await lock("invoice-7")`` runs: one value for each set of arguments."""

from typing import Any

from scoped.core import release as releases
from scoped.core.current import scope_here
from scoped.core.first_use import get, get_nowait, get_sync
from scoped.core.lookup import scope_for
from scoped.core.resource import KeyedResource, Resource

__all__ = ["keyed_async_access", "keyed_sync_access"]


def keyed_async_access(resource: Resource[Any]) -> Any:
    async def access(*key: Any) -> Any:
        one = KeyedResource(resource, key)
        return await get(scope_for(one), one)

    def nowait(*key: Any) -> Any:
        one = KeyedResource(resource, key)
        return get_nowait(scope_for(one), one)

    async def release(*key: Any) -> None:
        one = KeyedResource(resource, key)
        if (scope := scope_here()) is not None:
            await releases.release(scope, one)

    def stand_in(other: Resource[Any]) -> None:
        nonlocal resource
        resource = other

    function: Any = access
    function.get_nowait, function.release, function.stand_in = nowait, release, stand_in
    return function


def keyed_sync_access(resource: Resource[Any]) -> Any:
    def access(*key: Any) -> Any:
        one = KeyedResource(resource, key)
        return get_sync(scope_for(one), one)

    def release(*key: Any) -> None:
        one = KeyedResource(resource, key)
        if (scope := scope_here()) is not None:
            releases.release_sync(scope, one)

    def stand_in(other: Resource[Any]) -> None:
        nonlocal resource
        resource = other

    function: Any = access
    function.release, function.stand_in = release, stand_in
    return function
