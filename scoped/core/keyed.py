"""What ``await lock("invoice-7")`` runs: one value for each set of arguments."""

from typing import Any

from scoped.core import release as releases
from scoped.core.request import scope_for, scope_holding
from scoped.core.resource import KeyedResource, Resource

__all__ = ["keyed_async_access", "keyed_sync_access"]


def keyed_async_access(resource: Resource[Any]) -> Any:
    async def access(*key: Any) -> Any:
        one = KeyedResource(resource, key)
        return await scope_for(one).get(one)

    def get_nowait(*key: Any) -> Any:
        one = KeyedResource(resource, key)
        return scope_for(one).get_nowait(one)

    async def release(*key: Any) -> None:
        one = KeyedResource(resource, key)
        if (scope := scope_holding(one)) is not None:
            await releases.release(scope, one)

    def stand_in(other: Resource[Any]) -> None:
        nonlocal resource
        resource = other

    function: Any = access
    function.get_nowait, function.release, function.stand_in = get_nowait, release, stand_in
    return function


def keyed_sync_access(resource: Resource[Any]) -> Any:
    def access(*key: Any) -> Any:
        one = KeyedResource(resource, key)
        return scope_for(one).get_sync(one)

    def release(*key: Any) -> None:
        one = KeyedResource(resource, key)
        if (scope := scope_holding(one)) is not None:
            releases.release_sync(scope, one)

    def stand_in(other: Resource[Any]) -> None:
        nonlocal resource
        resource = other

    function: Any = access
    function.release, function.stand_in = release, stand_in
    return function
