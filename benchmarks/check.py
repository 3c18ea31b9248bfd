"""That a contender does the work: the same objects, torn down in the same order."""

import asyncio
from collections.abc import Awaitable, Callable

from benchmarks.contenders import Contender
from benchmarks.work import A, B, C, D, E, Part, log

__all__ = ["WORKS", "check"]


async def check(contender: Contender) -> dict[str, str]:
    """The kinds of work at which it must not be compared, and why not."""
    failures = {}
    for name, do in WORKS.items():
        log.clear()
        try:
            await do(contender)
        except Exception as error:
            failures[name] = str(error) or type(error).__name__
    return failures


async def _empty(contender: Contender) -> None:
    await contender.empty(2)
    _logged("")


async def _one(contender: Contender) -> None:
    _is_whole([await contender.one(2)])
    _logged("+a-a+a-a")


async def _chain(contender: Contender) -> None:
    for uses in (1, 10):
        _is_whole(await contender.chain(1, uses))
        _logged("+a+b+c+d+e-e-d-c-b-a")


async def _cached(contender: Contender) -> None:
    if contender.cached is None:
        raise ValueError("a local variable, nothing to look up")
    _is_whole([await contender.cached(5)])
    _logged("+a-a")


async def _hold(contender: Contender) -> None:
    held: list[Part] = []
    release = asyncio.Event()
    tasks = [asyncio.create_task(contender.hold(held, release)) for _ in range(2)]
    for _ in range(10):
        await asyncio.sleep(0)
    _logged("+a+a")
    _expect(held[0] is not held[1], "two scopes had one object")
    release.set()
    await asyncio.gather(*tasks)
    _logged("-a-a")


WORKS: dict[str, Callable[[Contender], Awaitable[None]]] = {
    "empty": _empty,
    "one": _one,
    "chain": _chain,
    "cached": _cached,
    "hold": _hold,
}


def _is_whole(values: "list[Part] | tuple[Part, ...]") -> None:
    needed = None
    for value, cls in zip(values, (A, B, C, D, E), strict=False):
        _expect(type(value) is cls, f"not a {cls.__name__}: {value!r}")
        _expect(value.needs is needed, f"{cls.__name__} has another object than was asked for")
        needed = value


def _logged(expected: str) -> None:
    found = "".join(log)
    log.clear()
    _expect(found == expected, f"did {found or 'nothing'} in place of {expected or 'nothing'}")


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
