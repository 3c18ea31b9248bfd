"""
``request_scoped(keyed=True)``: one value for each set of arguments. Promises 2, 7 and 25.
"""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Iterator

import pytest

from scoped import (
    AsyncResourceError,
    FactoryError,
    NoScopeError,
    ScopeClosedError,
    TeardownError,
    inspect,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.core.resource import KeyedResource
from scoped.testing import override

log: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    log.clear()


@request_scoped(keyed=True)
async def lock(name: str, *, of: str = "all") -> AsyncIterator[str]:
    await asyncio.sleep(0)
    log.append(f"+{name}")
    yield f"{name} of {of}"
    log.append(f"-{name}")


@request_scoped(keyed=True)
def price(of: str, currency: str = "EUR") -> Iterator[list[str]]:
    log.append(f"+{of}")
    yield [of, currency]
    log.append(f"-{of}")


@request_scoped(keyed=True)
async def both(first: str, second: str) -> AsyncIterator[None]:
    await lock(first)
    await lock(second)
    log.append(f"+{first}&{second}")
    yield
    log.append(f"-{first}&{second}")


async def test_each_set_of_arguments_has_a_value_of_its_own() -> None:
    async with request_scope():
        assert await lock("a") == await lock("a") == "a of all"
        assert await lock("b") == "b of all"
        assert price("bread") is price("bread")
        assert price("bread") is not price("bread", "EUR")
        assert price("bread", "CHF") == ["bread", "CHF"]
        assert log == ["+a", "+b", "+bread", "+bread", "+bread"]
    assert log[5:] == ["-bread", "-bread", "-bread", "-b", "-a"]
    async with request_scope():
        await lock("a")


def test_one_key_of_two_resources_is_two() -> None:
    @request_scoped(keyed=True)
    def one(key: int) -> int:
        return key

    @request_scoped(keyed=True)
    def other(key: int) -> int:
        return key

    assert KeyedResource(one.resource, (1,)) == KeyedResource(one.resource, (1,))
    assert KeyedResource(one.resource, (1,)) != KeyedResource(other.resource, (1,))
    assert KeyedResource(one.resource, (1,)) != KeyedResource(one.resource, (2,))


async def test_asked_for_by_many_at_once_each_is_set_up_once() -> None:
    async with request_scope():
        names = [name for name in "abc" for _ in range(5)]
        assert len(set(await asyncio.gather(*map(lock, names)))) == 3
        assert sorted(log) == ["+a", "+b", "+c"]
    assert len(log) == 6


async def test_one_may_be_asked_for_by_another_of_the_same_resource() -> None:
    @request_scoped(keyed=True)
    async def sum_to(number: int) -> int:
        return number + await sum_to(number - 1) if number else 0

    async with request_scope():
        assert await sum_to(10) == 55
        assert await asyncio.create_task(sum_to(12)) == 78


async def test_release_gives_back_the_one_and_what_uses_it() -> None:
    async with request_scope():
        await both("a", "b")
        await lock("c")
        price("bread")
        log.clear()
        await lock.release("d")
        assert log == []
        await lock.release("b")
        assert log == ["-a&b", "-b"]
        price.release("bread")
        assert log[2:] == ["-bread"]
        with pytest.raises(AsyncResourceError):
            lock.get_nowait("b")
        assert lock.get_nowait("a") == "a of all"
        await lock("b")
        log.clear()
    assert log == ["-b", "-c", "-a"]


async def test_a_stand_in_gets_the_arguments() -> None:
    async def fake(name: str) -> AsyncIterator[str]:
        log.append(f"+fake {name}")
        yield f"a fake {name}"
        log.append(f"-fake {name}")

    async with request_scope():
        assert await lock("a") == "a of all"
        with override(lock, fake):
            assert await lock("a") == await lock("a") == "a fake a"
            with override(lock, lambda name, *others: f"sync {name}"):
                assert await lock("b") == "sync b"
            with override(lock, "a value"):
                assert await lock("b", 1, 2) == "a value"  # type: ignore[call-arg, arg-type]
            with override(price, lambda of, currency="CHF": [currency]):
                assert price("bread") == ["CHF"]
        assert await lock("a") == "a of all"
    assert log == ["+a", "+fake a", "-fake a", "-a"]


def test_a_stand_in_that_takes_no_argument_is_refused() -> None:
    with pytest.raises(FactoryError, match="is keyed, and takes no positional argument"):
        override(lock, lambda: "value")


def test_what_cannot_be_called_with_a_key_is_refused_where_it_is_declared() -> None:
    with pytest.raises(FactoryError, match=r"no positional argument\. .*leave out keyed=True"):
        request_scoped(keyed=True)(lambda: 1)
    with pytest.raises(FactoryError, match=r"needs a keyword argument, 'of'.*before the `\*`"):

        @request_scoped(keyed=True)
        def keyword(name: str, *, of: str) -> None: ...

    with pytest.raises(FactoryError, match=r"'name'.*@request_scoped\(keyed=True\)"):

        @request_scoped  # type: ignore[call-overload]
        def forgotten(name: str) -> None: ...


async def test_arguments_that_do_not_fit_are_refused_as_any_function_does() -> None:
    async with request_scope():
        with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'name'"):
            await lock()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"lock\(\) got an unexpected keyword argument 'name'"):
            await lock(name="a")
        with pytest.raises(TypeError, match=r"lock .*cannot be part of a key: unhashable type"):
            await lock(["a"])  # type: ignore[arg-type]
        assert await lock("a") == "a of all"
    assert log == ["+a", "-a"]


async def test_no_message_and_no_picture_shows_an_argument() -> None:
    secret = "hunter2"

    @request_scoped(keyed=True)
    async def fails(name: str) -> AsyncIterator[None]:
        if name == secret:
            raise OSError("broken")
        yield
        raise ValueError("broken")

    shown: list[object] = []
    with pytest.raises(NoScopeError) as outside:
        await lock(secret)
    shown.append(outside.value)
    with pytest.raises(TeardownError) as caught:
        async with request_scope():
            with pytest.raises(OSError, match="broken") as failed:
                await fails(secret)
            shown += failed.value.__notes__
            await fails("public")
            await lock(secret)
            name = lock.resource.factory.name
            [picture] = [one for one in inspect() if name in one.resources]
            shown.append(picture)
            late = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(after(late, secret))
            await asyncio.sleep(0)
    shown += [caught.value, *caught.value.exceptions[0].__notes__]
    late.set_result(None)
    shown.append(await task)
    for thing in shown:
        assert "lock" in f"{thing!r} {thing}" or "fails" in f"{thing}" or thing is caught.value
        assert secret not in f"{thing!r} {thing}"
    assert secret not in repr(fails.resource) + repr(lock)


async def after(late: "asyncio.Future[None]", name: str) -> BaseException:
    await late
    with pytest.raises(ScopeClosedError) as caught:
        await lock(name)
    return caught.value


async def test_it_may_live_until_the_response() -> None:
    @request_scoped(keyed=True, until="response")
    async def transaction(of: str) -> AsyncIterator[str]:
        yield of
        log.append(f"-{of}")

    async with request_scope() as scope:
        assert [await transaction("a"), await transaction("b")] == ["a", "b"]
        await scope.end_response()
        assert log == ["-b", "-a"]
        with pytest.raises(ScopeClosedError):
            await transaction("c")


async def test_outside_any_scope_there_is_nothing_to_release() -> None:
    await lock.release("a")
    price.release("bread")
    assert log == []


class Equal:
    """Of one hash with all of its kind, and compared as long as it can be."""

    can_be = True

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        if not Equal.can_be:
            raise LookupError("the session has ended")
        return self is other


@pytest.fixture
def _can_be_compared() -> Iterator[None]:
    yield
    Equal.can_be = True


@request_scoped(keyed=True)
def of_sync(key: Equal) -> Iterator[int]:
    log.append("+sync")
    yield id(key)
    log.append("-sync")


@request_scoped(keyed=True)
async def of_async(key: Equal) -> AsyncIterator[int]:
    log.append("+async")
    yield id(key)
    log.append("-async")


@pytest.mark.usefixtures("_can_be_compared")
async def test_keys_that_cannot_be_compared_any_more_are_torn_down() -> None:
    """Promise 8."""
    keys = [Equal(), Equal(), Equal()]
    async with request_scope() as scope:
        for key in keys:
            assert of_sync(key) == await of_async(key) == id(key)
        Equal.can_be = False
        with pytest.raises(LookupError, match="session"):
            await of_async(Equal())
    assert log == ["+sync", "+async"] * 3 + ["-async", "-sync"] * 3
    assert scope.is_over
    assert not scope.records


@pytest.mark.usefixtures("_can_be_compared")
async def test_a_set_up_that_fails_with_keys_that_cannot_be_compared_leaves_nothing() -> None:
    @request_scoped(keyed=True)
    async def fails(key: Equal, *, which: list[Equal] = []) -> None:  # noqa: B006 (to tell them)
        which.append(key)
        if len(which) == 2:
            Equal.can_be = False
            raise ValueError("of the factory")

    async with request_scope() as scope:
        await fails(Equal())
        with pytest.raises(ValueError, match="of the factory"):
            await fails(Equal())
        assert len(scope.records) == 1


class Asker:
    """A request, say, that is part of a key."""


async def test_nobody_keeps_the_key_of_who_was_the_first_to_ask() -> None:
    """Promise 14: what lives as long as the server was asked for by a request's factory."""

    @lifespan_scoped
    async def pool() -> AsyncIterator[str]:
        yield "pool"

    @request_scoped(keyed=True)
    async def permissions(asker: Asker) -> str:
        return await pool()

    async with lifespan_scope():
        asker: Asker | None = Asker()
        kept = weakref.ref(asker)
        async with request_scope():
            assert await permissions(asker) == "pool"
        asker = None
        gc.collect()
        assert kept() is None


async def test_a_task_that_outlives_its_factory_keeps_no_key() -> None:
    """Promise 14."""
    goes_on = asyncio.Event()

    @request_scoped(keyed=True)
    async def starts(asker: Asker) -> "asyncio.Task[bool]":
        return asyncio.create_task(goes_on.wait())

    asker: Asker | None = Asker()
    kept = weakref.ref(asker)
    async with request_scope():
        task = await starts(asker)
    asker = None
    gc.collect()
    assert kept() is None
    goes_on.set()
    await task
