"""
Promise 23: nothing of ours is done to somebody else's exception that may fail, and nothing
piles up on it.
"""

import asyncio
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import pytest

from scoped import (
    ScopeClosedError,
    TeardownError,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.asgi import ScopedASGIHandler
from scoped.core.errors import note, notes_of, set_traceback


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int = 1


class NoNotesError(Exception):
    def add_note(self, text: str) -> NoReturn:
        raise ValueError("no notes")


class NoAttributesError(Exception):
    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise ValueError("no attributes")


class OddNotesError(Exception):
    __notes__ = ("odd",)


class NumberForNotesError(Exception):
    __notes__ = 5


class HidesNotesError(Exception):
    @property
    def __notes__(self) -> list[str]:
        raise ValueError("no notes")


class Anything:
    def __eq__(self, other: object) -> NoReturn:
        raise ValueError("not to be compared")

    __hash__ = None  # type: ignore[assignment]


class OddNoteError(Exception):
    def __init__(self) -> None:
        super().__init__()
        self.__notes__ = [Anything()]


class TracebackError(Exception):
    @property
    def __traceback__(self) -> TracebackType | None:  # type: ignore[override]
        return BaseException.__traceback__.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @__traceback__.setter
    def __traceback__(self, value: object) -> NoReturn:
        raise ValueError("no traceback")


class NoWordsError(Exception):
    def __str__(self) -> NoReturn:
        raise ValueError("no words")

    __repr__ = __str__


class NoComparisonError(Exception):
    def __eq__(self, other: object) -> NoReturn:
        raise ValueError("not to be compared")

    __hash__ = None  # type: ignore[assignment]


KINDS = [
    *(FrozenError, NoNotesError, NoAttributesError, OddNotesError, NumberForNotesError),
    *(OddNoteError, TracebackError, NoComparisonError),
    NoWordsError,
]
each_kind = pytest.mark.parametrize("kind", KINDS)


class TestNote:
    # The last one is one that Python's own traceback module cannot print.
    @pytest.mark.parametrize("kind", [*KINDS, HidesNotesError])
    def test_it_never_raises(self, kind: type[Exception]) -> None:
        error = kind()
        note(error, "where")
        assert len(notes_of(error)) <= 1
        set_traceback(error, None)

    @pytest.mark.parametrize("kind", [FrozenError, NoNotesError, NoAttributesError, OddNoteError])
    def test_it_is_there_where_it_can_be(self, kind: type[Exception]) -> None:
        error = kind()
        note(error, "where")
        assert notes_of(error) == ["where"]
        if kind is not OddNoteError:
            assert traceback.format_exception(error)[-1] == "where\n"

    def test_it_is_added_once_beside_those_of_others(self) -> None:
        error = ValueError()
        error.add_note("theirs")
        for _ in range(3):
            note(error, "ours")
            note(error, "another of ours")
        assert error.__notes__ == ["theirs", "ours", "another of ours"]


@each_kind
class TestWhateverIsRaised:
    async def test_a_set_up_that_fails_with_it_says_so_and_nothing_is_left(
        self, kind: type[Exception]
    ) -> None:
        error, log = kind(), []

        @request_scoped
        async def first() -> AsyncIterator[None]:
            yield
            log.append("-first")

        @request_scoped
        async def bad() -> AsyncIterator[None]:
            await first()
            log.append("bad")
            raise error
            yield

        @request_scoped
        def bad_sync() -> str:
            log.append("bad")
            raise error

        async with request_scope():
            for _ in range(2):
                for caught in await asyncio.gather(bad(), bad(), return_exceptions=True):
                    assert caught is error
                with pytest.raises(kind) as raised:
                    bad_sync()
                assert raised.value is error
            assert log[-1] == "bad"
        assert log[-1] == "-first"

    async def test_a_teardown_that_fails_with_it_does_not_stop_the_others(
        self, kind: type[Exception]
    ) -> None:
        errors, log = [kind(), kind()], []

        @request_scoped
        async def first() -> AsyncIterator[None]:
            yield
            log.append("-first")

        @request_scoped
        async def bad() -> AsyncIterator[None]:
            yield
            raise errors[0]

        @request_scoped
        def bad_sync() -> Iterator[None]:
            yield
            raise errors[1]

        with pytest.raises(TeardownError) as caught:
            async with request_scope():
                await first()
                await bad()
                bad_sync()
        assert [id(one) for one in caught.value.exceptions] == [id(errors[1]), id(errors[0])]
        assert log == ["-first"]

    async def test_what_nobody_else_can_be_told_of_is_logged(
        self, kind: type[Exception], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Promise 25: and none of its words makes a line of its own."""
        error, reached, cut_off = kind(), asyncio.Barrier(3), asyncio.Event()

        async def wait() -> None:
            await reached.wait()
            with suppress(asyncio.CancelledError):
                await cut_off.wait()

        @request_scoped
        async def refused() -> AsyncIterator[None]:
            await wait()
            yield
            raise error

        @request_scoped
        async def refused_too() -> AsyncIterator[None]:
            await wait()
            yield
            raise ValueError("one line\nanother")

        async with request_scope():
            tasks = [asyncio.create_task(ask()) for ask in (refused, refused_too)]
            await reached.wait()
            await asyncio.sleep(0)  # until all three have come through
        for task in tasks:
            with pytest.raises(ScopeClosedError):
                await task
        messages = [record.getMessage() for record in caplog.records if record.name == "scoped"]
        assert len(messages) == 2
        assert any(kind.__name__ in message for message in messages)
        assert "\n" not in "".join(messages)

    @pytest.mark.parametrize("elsewhere", [False, True])
    async def test_work_that_fails_with_it_is_seen_by_factories_and_comes_out(
        self, kind: type[Exception], elsewhere: bool
    ) -> None:
        error, seen = kind(), []

        @request_scoped
        async def plain() -> AsyncIterator[None]:
            try:
                yield
            except BaseException as failure:
                seen.append(failure)
                raise

        @request_scoped
        def plain_sync() -> Iterator[None]:
            try:
                yield
            except BaseException as failure:
                seen.append(failure)
                raise

        @request_scoped
        async def grouped() -> AsyncIterator[None]:
            async with asyncio.TaskGroup():
                yield

        async def use() -> None:
            await grouped()
            await plain()
            plain_sync()

        with pytest.raises(kind) as caught:
            async with request_scope():
                await (asyncio.create_task(use()) if elsewhere else use())
                raise error
        assert caught.value is error
        assert [one is error for one in seen] == [True, True]

    async def test_a_start_up_that_fails_with_it_is_told_to_the_server(
        self, kind: type[Exception]
    ) -> None:
        from scoped.core.lifespan import eager

        @lifespan_scoped(eager=True)
        async def pool() -> Any:
            raise kind()

        sent: list[Any] = []

        async def receive() -> dict[str, str]:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            sent.append(message)

        try:
            with pytest.raises(kind):
                async with lifespan_scope():
                    pass
            await ScopedASGIHandler()({"type": "lifespan"}, receive, send)
        finally:
            eager.remove(pool)
        [message] = sent
        assert message["type"] == "lifespan.startup.failed"
        assert kind.__name__ in message["message"]


async def test_what_fails_again_and_again_with_one_error_makes_it_no_longer() -> None:
    error = ConnectionError("no route to host")

    @request_scoped
    async def db() -> AsyncIterator[None]:
        raise error
        yield

    @request_scoped
    async def broken() -> AsyncIterator[None]:
        yield
        raise error

    async def once(resource: Any) -> None:
        with pytest.raises((ConnectionError, TeardownError)):
            async with request_scope():
                await resource()

    for _ in range(5):
        await once(db)
        await once(broken)
    assert error.__notes__ == [
        f"while {db.resource} was set up",
        f"while {broken.resource} was torn down",
    ]
