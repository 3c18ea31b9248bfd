"""``asend`` and ``asend_robust``: signals that keep the caller's Context, on every Django."""

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext
from django.dispatch import Signal
from django.utils.functional import SimpleLazyObject

from scoped.dispatch import asend, asend_robust

Send = Callable[..., Coroutine[Any, Any, list[tuple[Any, Any]]]]

both = pytest.mark.parametrize("send", [asend, asend_robust])

number: ContextVar[int] = ContextVar("number", default=0)
thing: ContextVar[object] = ContextVar("thing")


class Sender: ...


def sync_adder(**kwargs: Any) -> int:
    number.set(number.get() + 1)
    return number.get()


async def async_adder(**kwargs: Any) -> int:
    await asyncio.sleep(0)
    number.set(number.get() + 1)
    return number.get()


class CountingExecutor(ThreadPoolExecutor):
    """One thread for sync code; counts the hops to it."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)
        self.hops = 0

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        self.hops += 1
        return super().submit(*args, **kwargs)


@both
class TestTheContextIsShared:
    """What ticket 36714 asks for."""

    @pytest.mark.parametrize("order", ["sync sync", "async async", "sync async", "async sync"])
    async def test_each_receiver_sees_what_was_set_before_and_the_caller_sees_it_all(
        self, send: Send, order: str
    ) -> None:
        signal = Signal()
        for index, kind in enumerate(order.split()):
            receiver = sync_adder if kind == "sync" else async_adder
            signal.connect(receiver, dispatch_uid=str(index))
        number.set(1)
        responses = await send(signal, Sender)
        assert [response for _, response in responses] == [2, 3]
        assert number.get() == 3

    async def test_what_a_receiver_set_before_it_raised_is_kept(self, send: Send) -> None:
        signal = Signal()

        def sync_fails(**kwargs: Any) -> None:
            sync_adder()
            raise ValueError

        async def async_fails(**kwargs: Any) -> None:
            await async_adder()
            raise ValueError

        signal.connect(sync_fails)
        signal.connect(async_fails)
        with pytest.raises(ValueError) if send is asend else nullcontext():
            await send(signal, Sender)
        assert number.get() == 2

    async def test_a_new_object_that_equals_the_old_one_is_kept(self, send: Send) -> None:
        signal = Signal()
        old, new = [1], [1]
        thing.set(old)

        async def replace(**kwargs: Any) -> None:
            thing.set(new)

        signal.connect(replace)
        await send(signal, Sender)
        assert thing.get() is new

    @pytest.mark.parametrize("receiver", [sync_adder, async_adder])
    async def test_a_value_that_cannot_be_compared_does_no_harm(
        self, send: Send, receiver: Any
    ) -> None:
        class Array:
            def __eq__(self, other: object) -> bool:
                raise ValueError("The truth value of an array is ambiguous")

            __ne__ = __eq__
            __hash__ = None  # type: ignore[assignment]

        array = Array()
        signal = Signal()
        signal.connect(receiver)

        async def replace(**kwargs: Any) -> None:
            thing.set(array)

        signal.connect(replace)
        thing.set(Array())
        await send(signal, Sender)
        assert thing.get() is array
        assert number.get() == 1

    async def test_a_lazy_object_is_not_evaluated_where_no_receiver_needs_a_thread(
        self, send: Send
    ) -> None:
        # With a sync receiver asgiref evaluates it: at a hop it asks for every value's class.
        evaluated: list[str] = []
        signal = Signal()
        signal.connect(async_adder)
        thing.set(SimpleLazyObject(lambda: evaluated.append("before") or "user"))

        async def replace(**kwargs: Any) -> None:
            thing.set(SimpleLazyObject(lambda: evaluated.append("after") or "user"))

        await send(signal, Sender)
        signal.connect(replace)
        await send(signal, Sender)
        assert evaluated == []

    async def test_tasks_that_send_at_once_do_not_see_each_other(self, send: Send) -> None:
        signal = Signal()
        signal.connect(sync_adder)
        signal.connect(async_adder)

        async def child(start: int) -> int:
            number.set(start)
            await send(signal, Sender)
            return number.get()

        assert await asyncio.gather(child(0), child(10), child(20)) == [2, 12, 22]
        assert number.get() == 0


@both
class TestWhoRunsWhere:
    async def test_sync_receivers_run_first_in_one_hop_then_async_ones_as_connected(
        self, send: Send
    ) -> None:
        log: list[str] = []
        threads: list[threading.Thread] = []
        signal = Signal()

        def connect_sync(name: str) -> Any:
            def receiver(**kwargs: Any) -> str:
                log.append(name)
                threads.append(threading.current_thread())
                return name

            signal.connect(receiver, weak=False)
            return receiver

        def connect_async(name: str) -> Any:
            async def receiver(**kwargs: Any) -> str:
                log.append(f"{name} begins")
                await asyncio.sleep(0)
                log.append(f"{name} ends")
                return name

            signal.connect(receiver, weak=False)
            return receiver

        third, first = connect_async("third"), connect_sync("first")
        fourth, second = connect_async("fourth"), connect_sync("second")
        with CountingExecutor() as executor:
            async with ThreadSensitiveContext(executor=executor):
                responses = await send(signal, Sender)
        assert log == [
            "first",
            "second",
            "third begins",
            "third ends",
            "fourth begins",
            "fourth ends",
        ]
        assert responses == [
            (first, "first"),
            (second, "second"),
            (third, "third"),
            (fourth, "fourth"),
        ]
        assert executor.hops == 1
        assert threads[0] is threads[1]
        assert threads[0] is not threading.current_thread()

    async def test_async_receivers_run_in_the_callers_task_without_a_hop(self, send: Send) -> None:
        signal = Signal()
        tasks: list[object] = []

        async def receiver(**kwargs: Any) -> None:
            await asyncio.sleep(0)
            tasks.append(asyncio.current_task())

        signal.connect(receiver)
        with CountingExecutor() as executor:
            async with ThreadSensitiveContext(executor=executor):
                await send(signal, Sender)
        assert tasks == [asyncio.current_task()]
        assert executor.hops == 0

    async def test_a_timeout_that_a_receiver_opens_is_the_callers_to_close(
        self, send: Send
    ) -> None:
        signal = Signal()
        timeouts: list[asyncio.Timeout] = []

        async def receiver(**kwargs: Any) -> None:
            timeouts.append(await asyncio.timeout(60).__aenter__())

        signal.connect(receiver)
        await send(signal, Sender)
        await timeouts[0].__aexit__(None, None, None)

    async def test_nobody_is_connected(self, send: Send) -> None:
        assert await send(Signal(), Sender) == []
        assert await send(Signal(), None) == []


class TestErrors:
    @pytest.fixture
    def log(self) -> list[str]:
        return []

    @pytest.fixture
    def signal(self, log: list[str]) -> Signal:
        """Receivers sync 1 to 3 and async 1 to 3, of which each second fails."""
        signal = Signal()

        def connect(number: int) -> None:
            def sync_receiver(**kwargs: Any) -> str:
                log.append(f"sync {number}")
                if number == 2:
                    raise ValueError(f"sync {number}")
                return f"sync {number}"

            async def async_receiver(**kwargs: Any) -> str:
                await asyncio.sleep(0.001)
                if number == 2:
                    log.append(f"async {number}")
                    raise KeyError(f"async {number}")
                await asyncio.sleep(0.001)
                log.append(f"async {number}")
                return f"async {number}"

            signal.connect(sync_receiver, weak=False)
            signal.connect(async_receiver, weak=False)

        for number in (1, 2, 3):
            connect(number)
        return signal

    ALL = ("sync 1", "sync 2", "sync 3", "async 1", "async 2", "async 3")

    async def test_all_receivers_run_then_the_first_error_is_raised_and_the_others_logged(
        self, signal: Signal, log: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(ValueError, match="sync 2") as raised:
            await asend(signal, Sender)
        assert type(raised.value) is ValueError, "no ExceptionGroup"
        assert log == list(self.ALL)
        [record] = caplog.records
        assert (record.name, record.levelno) == ("scoped", logging.ERROR)
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], KeyError)

    async def test_robust_returns_each_error_in_its_place_and_logs_it(
        self, signal: Signal, log: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        responses = await asend_robust(signal, Sender)
        assert log == list(self.ALL)
        assert [getattr(r, "args", [r])[0] for _, r in responses] == log
        assert [type(response) for _, response in responses] == [
            *(str, ValueError, str),
            *(str, KeyError, str),
        ]
        assert all(r.__traceback__ for _, r in responses if isinstance(r, Exception))
        assert [r.exc_info and r.exc_info[0] for r in caplog.records] == [ValueError, KeyError]

    async def test_an_error_that_cannot_be_shown_is_logged_all_the_same(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class ShyError(Exception):
            def __repr__(self) -> str:
                raise TypeError("nothing to be seen")

        async def receiver(**kwargs: Any) -> None:
            raise ShyError

        signal = Signal()
        signal.connect(receiver, weak=False)
        [(_, error)] = await asend_robust(signal, Sender)
        assert type(error) is ShyError
        assert "<ShyError object, whose repr() fails>" in caplog.text

    async def test_an_async_receiver_that_fails_does_not_cancel_its_siblings(
        self, signal: Signal, log: list[str]
    ) -> None:
        with pytest.raises(ValueError, match="sync 2"):
            await asend(signal, Sender)
        assert log[-3:] == ["async 1", "async 2", "async 3"]
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    @both
    async def test_a_cancellation_is_raised_at_once(self, send: Send) -> None:
        log: list[str] = []
        signal = Signal()

        async def first(**kwargs: Any) -> None:
            log.append("first")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                log.append("first is cancelled")
                raise

        async def second(**kwargs: Any) -> None:
            log.append("second")

        signal.connect(first)
        signal.connect(second)
        task = asyncio.create_task(send(signal, Sender))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["first", "first is cancelled"]

    @both
    async def test_a_cancellation_that_a_receiver_swallows_stops_nobody(self, send: Send) -> None:
        log: list[str] = []
        signal = Signal()

        async def first(**kwargs: Any) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                log.append("swallowed")

        async def second(**kwargs: Any) -> None:
            log.append("second")

        signal.connect(first)
        signal.connect(second)
        task = asyncio.create_task(send(signal, Sender))
        await asyncio.sleep(0.01)
        task.cancel()
        await task
        assert log == ["swallowed", "second"]


@both
@pytest.mark.parametrize("use_caching", [False, True])
class TestConnectionsAreDjangos:
    async def test_a_receiver_is_given_the_signal_the_sender_and_the_arguments(
        self, send: Send, use_caching: bool
    ) -> None:
        given: list[dict[str, Any]] = []
        signal = Signal(use_caching=use_caching)

        def sync_receiver(**kwargs: Any) -> None:
            given.append(kwargs)

        async def async_receiver(**kwargs: Any) -> None:
            given.append(kwargs)

        signal.connect(sync_receiver)
        signal.connect(async_receiver)
        await send(signal, Sender, scope={"type": "http"})
        assert given == [{"signal": signal, "sender": Sender, "scope": {"type": "http"}}] * 2

    async def test_a_receiver_gets_the_signals_of_its_sender_only(
        self, send: Send, use_caching: bool
    ) -> None:
        class Other: ...

        signal = Signal(use_caching=use_caching)
        signal.connect(sync_adder, sender=Sender)
        signal.connect(async_adder)
        for _ in range(2):  # the second time from the cache
            assert [r for r, _ in await send(signal, Sender)] == [sync_adder, async_adder]
            assert [r for r, _ in await send(signal, Other)] == [async_adder]

    async def test_connecting_and_disconnecting_show_at_the_next_send(
        self, send: Send, use_caching: bool
    ) -> None:
        signal = Signal(use_caching=use_caching)
        assert await send(signal, Sender) == []
        signal.connect(async_adder)
        assert [r for r, _ in await send(signal, Sender)] == [async_adder]
        signal.disconnect(async_adder)
        assert await send(signal, Sender) == []
        assert await send(signal, Sender) == []

    async def test_connected_twice_under_one_dispatch_uid_it_runs_once(
        self, send: Send, use_caching: bool
    ) -> None:
        signal = Signal(use_caching=use_caching)
        signal.connect(sync_adder, dispatch_uid="one")
        signal.connect(async_adder, dispatch_uid="one")
        assert [r for r, _ in await send(signal, Sender)] == [sync_adder]

    async def test_a_receiver_that_is_gone_is_left_out(self, send: Send, use_caching: bool) -> None:
        class Watcher:
            def sync_method(self, **kwargs: Any) -> None: ...

            async def async_method(self, **kwargs: Any) -> None: ...

        signal = Signal(use_caching=use_caching)
        watcher = Watcher()
        signal.connect(watcher.sync_method)
        signal.connect(watcher.async_method)
        signal.connect(async_adder)
        assert len(await send(signal, Sender)) == 3
        del watcher
        gc.collect()
        assert [r for r, _ in await send(signal, Sender)] == [async_adder]

    async def test_a_receiver_connected_strongly_stays(self, send: Send, use_caching: bool) -> None:
        signal = Signal(use_caching=use_caching)

        def connect() -> None:
            async def receiver(**kwargs: Any) -> str:
                return "here"

            signal.connect(receiver, weak=False)

        connect()
        gc.collect()
        assert [response for _, response in await send(signal, Sender)] == ["here"]

    async def test_a_receiver_that_disconnects_itself_does_not_hide_the_next(
        self, send: Send, use_caching: bool
    ) -> None:
        signal = Signal(use_caching=use_caching)

        async def once(**kwargs: Any) -> None:
            signal.disconnect(once)

        signal.connect(once)
        signal.connect(async_adder)
        assert [r for r, _ in await send(signal, Sender)] == [once, async_adder]
        assert [r for r, _ in await send(signal, Sender)] == [async_adder]

    async def test_the_answer_is_that_of_djangos_own_method(
        self, send: Send, use_caching: bool
    ) -> None:
        signal = Signal(use_caching=use_caching)

        def sync_echo(value: str, **kwargs: Any) -> str:
            return f"sync {value}"

        async def async_echo(value: str, **kwargs: Any) -> str:
            return f"async {value}"

        signal.connect(async_echo)
        signal.connect(sync_echo)
        theirs = await getattr(signal, send.__name__)(Sender, value="hello")
        assert await send(signal, Sender, value="hello") == theirs
        assert theirs == [(sync_echo, "sync hello"), (async_echo, "async hello")]


async def test_an_error_before_a_cancellation_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    signal = Signal()

    def fails(**kwargs: object) -> None:
        raise ValueError("before it")

    async def cancelled(**kwargs: object) -> None:
        raise asyncio.CancelledError

    signal.connect(fails)
    signal.connect(cancelled)
    with pytest.raises(asyncio.CancelledError):
        await asend(signal, None)
    assert "before it" in caplog.text


async def test_any_name_may_be_sent() -> None:
    signal = Signal()
    seen: list[dict[str, object]] = []

    async def receiver(**kwargs: object) -> None:
        seen.append(kwargs)

    signal.connect(receiver)
    await asend(signal, sender=None, receivers=1, outcomes=2, named=3)
    assert seen == [{"signal": signal, "sender": None, "receivers": 1, "outcomes": 2, "named": 3}]
