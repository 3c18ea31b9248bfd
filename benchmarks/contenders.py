"""
What every contender must be able to do, and the three that need no other
library: ``AsyncExitStack`` alone, hand-written lazy code on top of it, and ours.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from benchmarks import work
from benchmarks.work import Part
from scoped import request_scope, request_scoped

__all__ = ["Contender", "Parts", "async_exit_stack", "by_hand", "ours"]

Parts = tuple[Part, Part, Part, Part, Part]


@dataclass(frozen=True, slots=True)
class Contender:
    """
    Each loops by itself, so that no call of ours is measured with it. ``note`` says
    what a reader must know to compare it.
    """

    name: str
    # Open and close n scopes, in which nothing is used.
    empty: Callable[[int], Awaitable[None]]
    # Open and close n scopes, in each of which one object is used once.
    one: Callable[[int], Awaitable[Part]]
    # Open and close n scopes, in each of which the last of a chain of five is used first, then the
    # others, all that `uses` times.
    chain: Callable[[int, int], Awaitable[Parts]]
    # Open one scope, in which one object is used n times.
    cached: Callable[[int], Awaitable[Part]] | None  # where a further use is no call
    # Open one scope, in which one object is used once, and keep it open.
    hold: Callable[[list[Part], asyncio.Event], Awaitable[None]]
    note: str = ""


def async_exit_stack() -> Contender:
    a, b, c, d, e = map(
        asynccontextmanager, (work.make_a, work.make_b, work.make_c, work.make_d, work.make_e)
    )

    async def empty(n: int) -> None:
        for _ in range(n):
            async with AsyncExitStack():
                pass

    async def one(n: int) -> Part:
        for _ in range(n):
            async with AsyncExitStack() as stack:
                value = await stack.enter_async_context(a())
        return value

    async def chain(n: int, uses: int) -> Parts:
        for _ in range(n):
            async with AsyncExitStack() as stack:
                enter = stack.enter_async_context
                first = await enter(a())
                second = await enter(b(first))
                third = await enter(c(second))
                fourth = await enter(d(third))
                fifth = await enter(e(fourth))
                for _ in range(uses):
                    values = first, second, third, fourth, fifth
        return values

    async def hold(held: list[Part], release: asyncio.Event) -> None:
        async with AsyncExitStack() as stack:
            held.append(await stack.enter_async_context(a()))
            await release.wait()

    return Contender("AsyncExitStack", empty, one, chain, None, hold)


def by_hand() -> Contender:
    current: ContextVar[tuple[dict[Any, Any], AsyncExitStack]] = ContextVar("current")

    @asynccontextmanager
    async def scope() -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            token = current.set(({}, stack))
            try:
                yield
            finally:
                current.reset(token)

    def resource(factory: Callable[[], AsyncIterator[Any]]) -> Callable[[], Awaitable[Any]]:
        enter = asynccontextmanager(factory)

        async def get() -> Any:
            values, stack = current.get()
            try:
                return values[factory]
            except KeyError:
                value = values[factory] = await stack.enter_async_context(enter())
                return value

        return get

    return _asked_by_call("hand-written", scope, work.chain_of(resource))


def ours() -> Contender:
    return _asked_by_call("scoped", request_scope, work.chain_of(request_scoped))


def _asked_by_call(name: str, scope: Callable[[], Any], resources: Any) -> Contender:
    a, b, c, d, e = resources

    async def empty(n: int) -> None:
        for _ in range(n):
            async with scope():
                pass

    async def one(n: int) -> Part:
        for _ in range(n):
            async with scope():
                value = await a()
        return value

    async def chain(n: int, uses: int) -> Parts:
        for _ in range(n):
            async with scope():
                for _ in range(uses):
                    fifth = await e()
                    fourth = await d()
                    third = await c()
                    second = await b()
                    first = await a()
        return first, second, third, fourth, fifth

    async def cached(n: int) -> Part:
        async with scope():
            for _ in range(n):
                value = await a()
        return value

    async def hold(held: list[Part], release: asyncio.Event) -> None:
        async with scope():
            held.append(await a())
            await release.wait()

    return Contender(name, empty, one, chain, cached, hold)
