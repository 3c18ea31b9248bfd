"""What ``await lock("invoice-7")`` runs: one value for each set of arguments."""

from typing import Any

from scoped.core import release as releases
from scoped.core.first_use import get, get_nowait, get_sync
from scoped.core.resource import KeyedResource, Resource

__all__ = ["keyed_async_access", "keyed_sync_access"]


def keyed_async_access(resource: Resource[Any]) -> Any:
    async def access(*key: Any) -> Any:
        return await get(KeyedResource(resource, key))

    def nowait(*key: Any) -> Any:
        return get_nowait(KeyedResource(resource, key))

    async def release(*key: Any) -> None:
        await releases.release(KeyedResource(resource, key))

    def stand_in(other: Resource[Any]) -> None:
        nonlocal resource
        resource = other

    function: Any = access
    function.get_nowait, function.release, function.stand_in = nowait, release, stand_in
    return function


def keyed_sync_access(resource: Resource[Any]) -> Any:
    def access(*key: Any) -> Any:
        return get_sync(KeyedResource(resource, key))

    def release(*key: Any) -> None:
        releases.release_sync(KeyedResource(resource, key))

    def stand_in(other: Resource[Any]) -> None:
        nonlocal resource
        resource = other

    function: Any = access
    function.release, function.stand_in = release, stand_in
    return function
