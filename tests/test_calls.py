"""Promises 6, 11 and 15: ``@request_scope()``, a new scope for each call of a function."""

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from scoped import (
    AsyncResourceError,
    NoScopeError,
    TeardownError,
    current_scope,
    request_scope,
    request_scoped,
)

log: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    log.clear()


@request_scoped
async def db() -> AsyncIterator[object]:
    log.append("+db")
    try:
        yield object()
    except BaseException as error:
        log.append(f"db saw {type(error).__name__}")
        raise
    finally:
        log.append("-db")


@request_scoped
def tenant() -> Iterator[object]:
    log.append("+tenant")
    try:
        yield object()
    except BaseException as error:
        log.append(f"tenant saw {type(error).__name__}")
        raise
    finally:
        log.append("-tenant")


@request_scope()
async def nightly(number: int, *, fails: bool = False) -> tuple[int, object, str]:
    """Made each night."""
    value = await db()
    assert await db() is value
    if fails:
        raise ValueError(number)
    return number, value, str(current_scope())


@request_scope()
def weekly(number: int, *, fails: bool = False) -> tuple[int, object, str]:
    value = tenant()
    if fails:
        raise ValueError(number)
    return number, value, str(current_scope())


async def test_each_call_of_a_coroutine_function_has_a_new_scope() -> None:
    one, two = await asyncio.gather(nightly(1), nightly(2))
    assert (one[0], two[0]) == (1, 2)
    assert one[1] is not two[1]
    assert one[2] == "the call of nightly"
    assert sorted(log) == ["+db", "+db", "-db", "-db"]
    with pytest.raises(NoScopeError):
        await db()


def test_each_call_of_a_function_has_a_new_scope() -> None:
    one, two = weekly(1), weekly(2)
    assert one[1] is not two[1]
    assert one[2] == "the call of weekly"
    assert log == ["+tenant", "-tenant", "+tenant", "-tenant"]
    with pytest.raises(NoScopeError):
        tenant()


async def test_what_a_call_fails_with_is_seen_by_factories() -> None:
    with pytest.raises(ValueError, match="3"):
        await nightly(3, fails=True)
    with pytest.raises(ValueError, match="4"):
        weekly(4, fails=True)
    assert [line for line in log if "saw" in line] == ["db saw ValueError", "tenant saw ValueError"]


async def test_a_teardown_that_fails_makes_the_call_fail() -> None:
    @request_scoped
    async def fragile() -> AsyncIterator[None]:
        yield
        raise OSError("broken")

    @request_scope()
    async def work() -> None:
        await fragile()

    with pytest.raises(TeardownError, match="the call of "):
        await work()


async def test_a_call_in_a_scope_has_its_own_and_that_one_is_current_again() -> None:
    async with request_scope() as outer:
        value = await db()
        assert (await nightly(1))[1] is not value
        assert current_scope() is outer
        assert await db() is value


def test_a_call_in_itself_has_another_scope() -> None:
    @request_scope()
    def down(number: int) -> list[object]:
        return [tenant(), *(down(number - 1) if number else [])]

    assert len(set(map(id, down(3)))) == 4
    assert log == ["+tenant"] * 4 + ["-tenant"] * 4


async def test_a_method_a_partial_and_what_asgiref_makes_async_are_functions_too() -> None:
    class Job:
        @request_scope()
        async def run(self) -> object:
            return self, await db()

    job = Job()
    me, _ = await job.run()  # type: ignore[misc]
    assert me is job
    assert await request_scope()(functools.partial(nightly, 1))()
    ask = request_scope()(sync_to_async(tenant))
    assert await ask() is not None
    assert log.count("-db") == 2
    assert log[-1] == "-tenant"


def test_the_function_looks_as_before() -> None:
    assert nightly.__name__ == "nightly"
    assert nightly.__doc__ == "Made each night."
    assert list(inspect.signature(nightly).parameters) == ["number", "fails"]
    assert inspect.iscoroutinefunction(nightly)
    assert not inspect.iscoroutinefunction(weekly)


def test_a_sync_call_has_no_event_loop_for_async_resources() -> None:
    @request_scope()
    def ask() -> object:
        return asyncio.run(db())  # type: ignore[arg-type]

    with pytest.raises(AsyncResourceError, match="opened by sync code"):
        ask()


async def test_what_would_run_after_the_end_of_its_scope_is_refused_and_ended() -> None:
    tasks: list[asyncio.Task[None]] = []

    async def later() -> None:
        log.append("never")

    def start() -> Any:
        tasks.append(asyncio.create_task(later()))
        return tasks[-1]

    async def generate() -> AsyncIterator[int]:
        yield 1

    for function, kind in (
        (lambda *_: later(), "coroutine"),
        (start, "Task"),
        (lambda: (number for number in range(3)), "generator"),
        (lambda *_: generate(), "async_generator"),
    ):
        with pytest.raises(TypeError, match=f"returned '{kind}', which was yet to run"):
            request_scope()(function)()
    await asyncio.wait(tasks)
    assert tasks[0].cancelled()
    assert log == []


def test_what_is_no_function_or_a_generator_function_is_refused() -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def async_generator() -> AsyncIterator[int]:
        yield 1

    for thing in (generator, async_generator, type(log), "text", classmethod(len)):
        with pytest.raises(TypeError, match=r"@request_scope\(\) was put on .*It decorates"):
            request_scope()(thing)  # type: ignore[arg-type]


def test_a_static_method_is_one_still() -> None:
    class Commands:
        @request_scope()
        @staticmethod
        def weekly() -> object:
            return tenant() is tenant()

    assert Commands.weekly() is True
    assert Commands().weekly() is True
