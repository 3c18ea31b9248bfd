"""
The work that every contender does: up to five objects, each of which needs the
one before it, and each torn down again.

What was done shows in ``log``. It is always kept, so that what is checked is
what is measured; it is bounded, and costs all of them the same.
"""

from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

__all__ = ["A", "B", "C", "D", "E", "Part", "chain_of", "log"]
__all__ += ["make_a", "make_b", "make_c", "make_d", "make_e"]

log: deque[str] = deque(maxlen=20)


class Part:
    __slots__ = ("needs",)

    def __init__(self, needs: "Part | None" = None) -> None:
        self.needs = needs


class A(Part):
    __slots__ = ()


class B(Part):
    __slots__ = ()


class C(Part):
    __slots__ = ()


class D(Part):
    __slots__ = ()


class E(Part):
    __slots__ = ()


# For libraries that look at types. (Not `a` to `e`: dishka generates code that has an `e`.)


async def make_a() -> AsyncIterator[A]:
    log.append("+a")
    try:
        yield A()
    finally:
        log.append("-a")


async def make_b(needs: A) -> AsyncIterator[B]:
    log.append("+b")
    try:
        yield B(needs)
    finally:
        log.append("-b")


async def make_c(needs: B) -> AsyncIterator[C]:
    log.append("+c")
    try:
        yield C(needs)
    finally:
        log.append("-c")


async def make_d(needs: C) -> AsyncIterator[D]:
    log.append("+d")
    try:
        yield D(needs)
    finally:
        log.append("-d")


async def make_e(needs: D) -> AsyncIterator[E]:
    log.append("+e")
    try:
        yield E(needs)
    finally:
        log.append("-e")


# For factories that ask for what they need


def chain_of(decorator: Callable[[Any], Any]) -> tuple[Any, Any, Any, Any, Any]:
    @decorator
    async def a() -> AsyncIterator[A]:
        log.append("+a")
        try:
            yield A()
        finally:
            log.append("-a")

    @decorator
    async def b() -> AsyncIterator[B]:
        needs = await a()
        log.append("+b")
        try:
            yield B(needs)
        finally:
            log.append("-b")

    @decorator
    async def c() -> AsyncIterator[C]:
        needs = await b()
        log.append("+c")
        try:
            yield C(needs)
        finally:
            log.append("-c")

    @decorator
    async def d() -> AsyncIterator[D]:
        needs = await c()
        log.append("+d")
        try:
            yield D(needs)
        finally:
            log.append("-d")

    @decorator
    async def e() -> AsyncIterator[E]:
        needs = await d()
        log.append("+e")
        try:
            yield E(needs)
        finally:
            log.append("-e")

    return a, b, c, d, e
