"""
Other libraries, each in its own documented way, its fast one where it documents
one. What a library is given: five factories, each of which gets the object of
the one before.

Each is imported where it is used, so that one that is not installed is left out
and says so.
"""

# ruff: noqa: PLC0415 (a library that is not there is left out)

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from benchmarks import work
from benchmarks.contenders import Contender, Parts
from benchmarks.work import A, B, C, D, E, Part, log

__all__ = ["CANNOT", "PEERS"]

_FACTORIES = {A: work.make_a, B: work.make_b, C: work.make_c, D: work.make_d, E: work.make_e}

# Libraries that cannot do the work, and why.
CANNOT = {
    "dependency-injector": (
        "an async `Resource` is one for the whole process, shut down by whoever closes it first; "
        "a `ContextLocalSingleton` is one per Context, but is never torn down"
    ),
    "FastAPI": "resources only inside a request: see the requests below",
    "Litestar": "resources only inside a request: see the requests below",
}


def dishka() -> Contender:
    return _dishka("dishka", "a request's container takes no lock unless told to")


def dishka_with_locks() -> Contender:
    return _dishka("dishka, with locks", "`lock_factory=asyncio.Lock`", asyncio.Lock)


def _dishka(
    name: str, note: str, lock_factory: Callable[[], asyncio.Lock] | None = None
) -> Contender:
    from dishka import Provider, Scope, make_async_container

    provider = Provider(scope=Scope.REQUEST)
    for factory in _FACTORIES.values():
        provider.provide(factory)
    container = make_async_container(provider)

    async def empty(n: int) -> None:
        for _ in range(n):
            async with container(lock_factory=lock_factory):
                pass

    async def one(n: int) -> Part:
        for _ in range(n):
            async with container(lock_factory=lock_factory) as scope:
                value = await scope.get(A)
        return value

    async def chain(n: int, uses: int) -> Parts:
        for _ in range(n):
            async with container(lock_factory=lock_factory) as scope:
                for _ in range(uses):
                    fifth = await scope.get(E)
                    fourth = await scope.get(D)
                    third = await scope.get(C)
                    second = await scope.get(B)
                    first = await scope.get(A)
        return first, second, third, fourth, fifth

    async def cached(n: int) -> Part:
        async with container(lock_factory=lock_factory) as scope:
            for _ in range(n):
                value = await scope.get(A)
        return value

    async def hold(held: list[Part], release: asyncio.Event) -> None:
        async with container(lock_factory=lock_factory) as scope:
            held.append(await scope.get(A))
            await release.wait()

    return Contender(name, empty, one, chain, cached, hold, note)


def wireup() -> Contender:
    return _wireup("wireup", "a scope takes no lock unless told to", locks=False)


def wireup_with_locks() -> Contender:
    return _wireup("wireup, with locks", "`concurrent_scoped_access=True`", locks=True)


def _wireup(name: str, note: str, *, locks: bool) -> Contender:
    from wireup import create_async_container, injectable

    container = create_async_container(
        injectables=[injectable(lifetime="scoped")(factory) for factory in _FACTORIES.values()],
        concurrent_scoped_access=locks,
    )

    async def empty(n: int) -> None:
        for _ in range(n):
            async with container.enter_scope():
                pass

    async def one(n: int) -> Part:
        for _ in range(n):
            async with container.enter_scope() as scope:
                value = await scope.get(A)
        return value

    async def chain(n: int, uses: int) -> Parts:
        for _ in range(n):
            async with container.enter_scope() as scope:
                for _ in range(uses):
                    fifth = await scope.get(E)
                    fourth = await scope.get(D)
                    third = await scope.get(C)
                    second = await scope.get(B)
                    first = await scope.get(A)
        return first, second, third, fourth, fifth

    async def cached(n: int) -> Part:
        async with container.enter_scope() as scope:
            for _ in range(n):
                value = await scope.get(A)
        return value

    async def hold(held: list[Part], release: asyncio.Event) -> None:
        async with container.enter_scope() as scope:
            held.append(await scope.get(A))
            await release.wait()

    return Contender(name, empty, one, chain, cached, hold, note)


def diwire() -> Contender:
    return _diwire(
        "diwire", "strict mode, compiled, without its locks and its resolver context", locks=False
    )


def diwire_with_locks() -> Contender:
    return _diwire("diwire, with locks", "the same with the locks that are its default", locks=True)


def _diwire(name: str, note: str, *, locks: bool) -> Contender:
    from diwire import (
        Container,
        DependencyRegistrationPolicy,
        Lifetime,
        LockMode,
        MissingPolicy,
        Scope,
    )

    container = Container(
        missing_policy=MissingPolicy.ERROR,
        dependency_registration_policy=DependencyRegistrationPolicy.IGNORE,
        lock_mode="auto" if locks else LockMode.NONE,
        use_resolver_context=False,
    )
    for cls, factory in _FACTORIES.items():
        container.add_generator(
            factory, provides=cls, scope=Scope.REQUEST, lifetime=Lifetime.SCOPED
        )
    container.compile()

    async def empty(n: int) -> None:
        for _ in range(n):
            async with container.enter_scope(Scope.REQUEST):
                pass

    async def one(n: int) -> Part:
        for _ in range(n):
            async with container.enter_scope(Scope.REQUEST) as scope:
                value = await scope.aresolve(A)
        return value

    async def chain(n: int, uses: int) -> Parts:
        for _ in range(n):
            async with container.enter_scope(Scope.REQUEST) as scope:
                for _ in range(uses):
                    fifth = await scope.aresolve(E)
                    fourth = await scope.aresolve(D)
                    third = await scope.aresolve(C)
                    second = await scope.aresolve(B)
                    first = await scope.aresolve(A)
        return first, second, third, fourth, fifth

    async def cached(n: int) -> Part:
        async with container.enter_scope(Scope.REQUEST) as scope:
            for _ in range(n):
                value = await scope.aresolve(A)
        return value

    async def hold(held: list[Part], release: asyncio.Event) -> None:
        async with container.enter_scope(Scope.REQUEST) as scope:
            held.append(await scope.aresolve(A))
            await release.wait()

    return Contender(name, empty, one, chain, cached, hold, note)


def svcs() -> Contender:
    from svcs import Container, Registry

    registry = Registry()
    for cls, needed in zip(_FACTORIES, [None, *_FACTORIES], strict=False):
        registry.register_factory(cls, _asking_a_container(Container, cls, needed))

    async def empty(n: int) -> None:
        for _ in range(n):
            async with Container(registry):
                pass

    async def one(n: int) -> Part:
        for _ in range(n):
            async with Container(registry) as scope:
                value = await scope.aget(A)
        return value

    async def chain(n: int, uses: int) -> Parts:
        for _ in range(n):
            async with Container(registry) as scope:
                for _ in range(uses):
                    fifth = await scope.aget(E)
                    fourth = await scope.aget(D)
                    third = await scope.aget(C)
                    second = await scope.aget(B)
                    first = await scope.aget(A)
        return first, second, third, fourth, fifth

    async def cached(n: int) -> Part:
        async with Container(registry) as scope:
            for _ in range(n):
                value = await scope.aget(A)
        return value

    async def hold(held: list[Part], release: asyncio.Event) -> None:
        async with Container(registry) as scope:
            held.append(await scope.aget(A))
            await release.wait()

    return Contender("svcs", empty, one, chain, cached, hold)


def _asking_a_container(container: Any, cls: Any, needed: Any) -> Callable[..., Any]:
    opened, closed = f"+{cls.__name__.lower()}", f"-{cls.__name__.lower()}"

    if needed is None:

        async def first() -> AsyncIterator[Any]:
            log.append(opened)
            try:
                yield cls()
            finally:
                log.append(closed)

        return first

    async def factory(svcs_container: Any) -> AsyncIterator[Any]:
        needs = await svcs_container.aget(needed)
        log.append(opened)
        try:
            yield cls(needs)
        finally:
            log.append(closed)

    factory.__annotations__["svcs_container"] = container
    return factory


def aioinject() -> Contender:
    from aioinject import Container, Scoped

    container = Container()
    for cls, factory in _FACTORIES.items():
        container.register(Scoped(asynccontextmanager(factory), cls))

    async def empty(n: int) -> None:
        for _ in range(n):
            async with container.context():
                pass

    async def one(n: int) -> Part:
        for _ in range(n):
            async with container.context() as scope:
                value = await scope.resolve(A)
        return value

    async def chain(n: int, uses: int) -> Parts:
        for _ in range(n):
            async with container.context() as scope:
                for _ in range(uses):
                    fifth = await scope.resolve(E)
                    fourth = await scope.resolve(D)
                    third = await scope.resolve(C)
                    second = await scope.resolve(B)
                    first = await scope.resolve(A)
        return first, second, third, fourth, fifth

    async def cached(n: int) -> Part:
        async with container.context() as scope:
            for _ in range(n):
                value = await scope.resolve(A)
        return value

    async def hold(held: list[Part], release: asyncio.Event) -> None:
        async with container.context() as scope:
            held.append(await scope.resolve(A))
            await release.wait()

    return Contender("aioinject", empty, one, chain, cached, hold)


def anydi() -> Contender:
    from anydi import Container

    container = Container()
    for factory in _FACTORIES.values():
        container.provider(scope="request")(factory)

    async def empty(n: int) -> None:
        for _ in range(n):
            async with container.arequest_context():
                pass

    async def one(n: int) -> Part:
        for _ in range(n):
            async with container.arequest_context():
                value = await container.aresolve(A)
        return value

    async def chain(n: int, uses: int) -> Parts:
        for _ in range(n):
            async with container.arequest_context():
                for _ in range(uses):
                    fifth = await container.aresolve(E)
                    fourth = await container.aresolve(D)
                    third = await container.aresolve(C)
                    second = await container.aresolve(B)
                    first = await container.aresolve(A)
        return first, second, third, fourth, fifth

    async def cached(n: int) -> Part:
        async with container.arequest_context():
            for _ in range(n):
                value = await container.aresolve(A)
        return value

    async def hold(held: list[Part], release: asyncio.Event) -> None:
        async with container.arequest_context():
            held.append(await container.aresolve(A))
            await release.wait()

    return Contender("anydi", empty, one, chain, cached, hold)


def that_depends() -> Contender:
    from that_depends import BaseContainer, ContextScopes, container_context
    from that_depends.providers import ContextResource

    class Resources(BaseContainer):
        default_scope = ContextScopes.REQUEST
        a = ContextResource(work.make_a)
        b = ContextResource(work.make_b, a.cast)
        c = ContextResource(work.make_c, b.cast)
        d = ContextResource(work.make_d, c.cast)
        e = ContextResource(work.make_e, d.cast)

    request = ContextScopes.REQUEST

    async def empty(n: int) -> None:
        for _ in range(n):
            async with container_context(Resources, scope=request):
                pass

    async def one(n: int) -> Part:
        for _ in range(n):
            async with container_context(Resources, scope=request):
                value = await Resources.a.resolve()
        return value

    async def chain(n: int, uses: int) -> Parts:
        for _ in range(n):
            async with container_context(Resources, scope=request):
                for _ in range(uses):
                    fifth = await Resources.e.resolve()
                    fourth = await Resources.d.resolve()
                    third = await Resources.c.resolve()
                    second = await Resources.b.resolve()
                    first = await Resources.a.resolve()
        return first, second, third, fourth, fifth

    async def cached(n: int) -> Part:
        async with container_context(Resources, scope=request):
            for _ in range(n):
                value = await Resources.a.resolve()
        return value

    async def hold(held: list[Part], release: asyncio.Event) -> None:
        async with container_context(Resources, scope=request):
            held.append(await Resources.a.resolve())
            await release.wait()

    return Contender("that-depends", empty, one, chain, cached, hold)


def modern_di() -> Contender:
    from modern_di import Container, Group, Scope
    from modern_di.providers import CacheSettings, Factory

    def cached_factory(cls: Any, needed: Any) -> Factory[Any]:
        opened, closed = f"+{cls.__name__.lower()}", f"-{cls.__name__.lower()}"

        def make(needs: Any = None) -> Any:
            log.append(opened)
            return cls(needs)

        async def finalize(_: Any) -> None:
            log.append(closed)

        make.__annotations__ = {"return": cls} | ({"needs": needed} if needed else {})
        return Factory(make, scope=Scope.REQUEST, cache=CacheSettings(finalizer=finalize))

    class Resources(Group):
        a = cached_factory(A, None)
        b = cached_factory(B, A)
        c = cached_factory(C, B)
        d = cached_factory(D, C)
        e = cached_factory(E, D)

    container = Container(groups=[Resources])
    container.open()

    async def empty(n: int) -> None:
        for _ in range(n):
            async with container.build_child_container(scope=Scope.REQUEST):
                pass

    async def one(n: int) -> Part:
        for _ in range(n):
            async with container.build_child_container(scope=Scope.REQUEST) as scope:
                value = scope.resolve(A)
        return value

    async def chain(n: int, uses: int) -> Parts:
        for _ in range(n):
            async with container.build_child_container(scope=Scope.REQUEST) as scope:
                for _ in range(uses):
                    fifth = scope.resolve(E)
                    fourth = scope.resolve(D)
                    third = scope.resolve(C)
                    second = scope.resolve(B)
                    first = scope.resolve(A)
        return first, second, third, fourth, fifth

    async def cached(n: int) -> Part:
        async with container.build_child_container(scope=Scope.REQUEST) as scope:
            for _ in range(n):
                value = scope.resolve(A)
        return value

    async def hold(held: list[Part], release: asyncio.Event) -> None:
        async with container.build_child_container(scope=Scope.REQUEST) as scope:
            held.append(scope.resolve(A))
            await release.wait()

    return Contender(
        "modern-di (sync)",
        empty,
        one,
        chain,
        cached,
        hold,
        "sets up by sync functions only, so nothing is awaited there; an async finalizer ends it",
    )


PEERS: list[Callable[[], Contender]] = [
    dishka,
    dishka_with_locks,
    wireup,
    wireup_with_locks,
    diwire,
    diwire_with_locks,
    svcs,
    aioinject,
    anydi,
    that_depends,
    modern_di,
]
