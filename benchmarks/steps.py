"""
What the promises cost: one object in one scope, first with the least that can
hold and tear it down, then with what each promise needs besides.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from benchmarks import work
from benchmarks.contenders import async_exit_stack, ours

__all__ = ["STEPS"]

_current: ContextVar[Any] = ContextVar("current", default=None)


async def _make() -> AsyncGenerator[work.A, None]:
    work.log.append("+a")
    try:
        yield work.A()
    finally:
        work.log.append("-a")


class _Least:
    """A dict of values, one of generators, and a ContextVar that holds both."""

    __slots__ = ("around", "generators", "owner", "pending", "values")

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}
        self.generators: dict[Any, AsyncGenerator[Any, None]] = {}
        self.pending: dict[Any, _Attempt] = {}
        self.around: Any = None

    async def __aenter__(self) -> None:
        self.owner = asyncio.current_task()
        self.around = _current.get()
        _current.set(self)

    async def __aexit__(self, *failure: object) -> None:
        while self.values:
            generator = self.generators.pop(self.values.popitem()[0])
            try:
                generator.__anext__().send(None)
            except StopAsyncIteration:
                continue
        _current.set(self.around)

    async def set_up(self, factory: Callable[[], AsyncGenerator[Any, None]]) -> Any:
        generator = factory()
        value = await generator.__anext__()
        self.generators[factory] = generator
        self.values[factory] = value
        return value


class _Bounded(_Least):
    """Teardown goes on where one fails or suspends, and sees the failure: a coroutine for each."""

    __slots__ = ()

    async def __aexit__(self, *failure: object) -> None:
        await self.close()
        _current.set(self.around)

    async def close(self) -> None:
        errors: list[Exception] = []
        while self.values:
            generator = self.generators.pop(self.values.popitem()[0])
            teardown = _finish(generator)
            try:
                teardown.send(None)
            except StopIteration:
                continue
            except Exception as error:
                errors.append(error)


async def _finish(generator: AsyncGenerator[Any, None]) -> None:
    try:
        await generator.__anext__()
    except StopAsyncIteration:
        return


class _Attempt:
    __slots__ = ("done", "keeper", "needs", "resource", "scope", "waiters")

    def __init__(self, resource: Any, scope: Any) -> None:
        self.resource = resource
        self.scope = scope
        self.done = False
        self.keeper = self.needs = self.waiters = None


class _Shared(_Bounded):
    """A set-up under way is written down, so that others wait for it."""

    __slots__ = ()

    async def set_up(self, factory: Callable[[], AsyncGenerator[Any, None]]) -> Any:
        attempt = self.pending[factory] = _Attempt(factory, self)
        try:
            generator = factory()
            value = await generator.__anext__()
            self.generators[factory] = generator
            self.values[factory] = value
        finally:
            del self.pending[factory]
            attempt.done = True
        return value


class _Asked(_Shared):
    """It is in the ContextVar while its factory runs: circles are found, across tasks too."""

    __slots__ = ()

    async def set_up(self, factory: Callable[[], AsyncGenerator[Any, None]]) -> Any:
        attempt = self.pending[factory] = _Attempt(factory, self)
        outer = _current.get()
        _current.set(attempt)
        try:
            generator = factory()
            value = await generator.__anext__()
            self.generators[factory] = generator
            self.values[factory] = value
        finally:
            _current.set(outer)
            del self.pending[factory]
            attempt.done = True
        return value


def _one(scope: type[_Least]) -> Callable[[int], Awaitable[work.Part]]:
    async def access() -> Any:
        here = _current.get()
        try:
            return here.values[_make]
        except (KeyError, AttributeError):
            pass
        return await here.set_up(_make)

    async def one(n: int) -> work.Part:
        for _ in range(n):
            async with scope():
                value = await access()
        return value  # type: ignore[no-any-return]

    return one


STEPS: dict[str, Callable[[int], Awaitable[object]]] = {
    "AsyncExitStack": async_exit_stack().one,
    "values and generators": _one(_Least),
    "+ every teardown, bounded": _one(_Bounded),
    "+ one set-up for all": _one(_Shared),
    "+ circles": _one(_Asked),
    "scoped": ours().one,
}
