"""
Promises 2, 3, 4, 6 and 7 for sync resources that many threads ask for at once: in
a scope of sync code, in that of a request, and in the lifespan that requests
share. The interpreter switches threads as often as it can.
"""

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from scoped import (
    AsyncResourceError,
    CircularResourceError,
    ScopeClosedError,
    TeardownError,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.core import lifespan as lifespans
from scoped.core import release as releases
from scoped.core import waits as waiting
from scoped.core.record import Record
from scoped.core.request import RequestScope
from tests.slowness import within
from tests.tables import what_is_kept

THREADS = 8
ROUNDS = 60
# Seconds after which a thread is taken to hang.
DEADLINE = within(20)


@pytest.fixture(autouse=True)
def _busy_switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS) as pool:
        yield pool


Outcome = tuple[object, BaseException | None]


def at_once(threads: ThreadPoolExecutor, *work: Callable[[], object]) -> list[Outcome]:
    """Run each in a thread, in a copy of this Context, all from one moment on."""
    meeting = threading.Barrier(len(work))

    def attend(one: Callable[[], object]) -> Outcome:
        meeting.wait(DEADLINE)
        try:
            return one(), None
        except Exception as error:
            return None, error

    running = [
        threads.submit(contextvars.copy_context().run, attend, work_of_one) for work_of_one in work
    ]
    return [future.result(DEADLINE) for future in running]


def mixed(resources: list[Any], turn: int) -> list[Any]:
    """For all threads but one; another mixture at each turn."""
    return [resources[turn * step // 3 % len(resources)] for step in range(1, THREADS)]


class Ledger:
    """Makes resources, and knows of each whether it is being set up, up, or down."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.under_way: set[str] = set()

    def set_up(self, name: str, *needs: Callable[[], object]) -> "Iterator[Thing]":
        assert name not in self.under_way, f"two set-ups of {name} at once"
        self.under_way.add(name)
        try:
            for need in needs:
                need()
        finally:
            self.under_way.discard(name)
        thing = Thing(name)
        self.log.append(f"+{name}")
        try:
            yield thing
        finally:
            thing.is_down = True
            self.log.append(f"-{name}")

    def resource(self, name: str, *needs: Callable[[], object]) -> Any:
        @request_scoped
        def factory() -> Iterator[Thing]:
            yield from self.set_up(name, *needs)

        return factory


class Thing:
    def __init__(self, name: str) -> None:
        self.name = name
        self.is_down = False


def ask(resources: list[Any], number: int) -> object:
    return resources[number]()


def test_what_threads_use_and_release_at_once_is_torn_down_once_for_each_set_up(
    threads: ThreadPoolExecutor,
) -> None:
    set_up: list[Thing] = []
    torn_down: list[Thing] = []

    @request_scoped
    def tenant() -> Iterator[Thing]:
        thing = Thing("tenant")
        set_up.append(thing)
        yield thing
        torn_down.append(thing)

    def use_and_release() -> None:
        for _ in range(THREADS):
            assert isinstance(tenant(), Thing)
            with suppress(AsyncResourceError):  # another thread has set it up
                tenant.release()

    for _ in range(ROUNDS):
        with request_scope() as scope:
            outcomes = at_once(threads, *[use_and_release] * (THREADS - 1))
            assert [error for _, error in outcomes if error] == []
        assert len(set_up) == len(torn_down) == len(set(torn_down))
        assert what_is_kept(scope) == []


def test_what_another_thread_sets_up_after_the_look_of_a_release_is_not_torn_down_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    @request_scoped
    def base() -> Iterator[str]:
        yield "base"
        log.append("-base")

    @request_scoped
    def user() -> Iterator[str]:
        base()
        yield "user"
        log.append("-user")

    check = releases._Release.check

    def then_use_it(self: Any) -> Any:
        monkeypatch.undo()
        found = check(self)
        thread = threading.Thread(target=contextvars.copy_context().run, args=(user,))
        thread.start()
        thread.join()
        return found

    with request_scope():
        base()
        monkeypatch.setattr(releases._Release, "check", then_use_it)
        with pytest.raises(TeardownError) as caught:
            base.release()
        assert [type(error) for error in caught.value.exceptions] == [AsyncResourceError]
        assert log == []
    assert log == ["-user", "-base"]


def test_of_threads_that_take_a_record_in_the_same_moment_one_has_it() -> None:
    """Promise 24. No lock of theirs brings them together: each would keep them apart by as much."""

    @request_scoped
    def thing() -> str:
        return "thing"

    with request_scope() as scope:
        records = [Record(thing.resource, scope) for _ in range(100)]
        for record in records:
            scope.complete(record, None, "a value")
        reached, taken = [0, 0], [[False] * len(records), [False] * len(records)]

        def take_all(me: int) -> None:
            for number, record in enumerate(records, 1):
                reached[me] = number
                while reached[1 - me] < number:
                    pass
                taken[me][number - 1] = scope.take(record)

        pair = [threading.Thread(target=take_all, args=(me,)) for me in (0, 1)]
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join()
    assert [one + other for one, other in zip(*taken, strict=True)] == [1] * len(records)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_set_up_that_ends_while_its_scope_is_found_empty_is_taken_back(when: str) -> None:
    log: list[str] = []
    begun, go_on, done = (threading.Event() for _ in range(3))

    @request_scoped
    def tenant() -> Iterator[str]:
        begun.set()
        assert go_on.wait(DEADLINE)
        log.append("set up")
        yield "tenant"
        log.append("torn down")

    class Overtaken(RequestScope):
        """The other thread goes on in the moment in which this one lets go."""

        __slots__ = ()

        def _let_go(self, failure: BaseException | None = None) -> None:
            if when == "after":
                super()._let_go(failure)
            go_on.set()
            assert done.wait(DEADLINE)
            if when == "before":
                super()._let_go(failure)

    def ask() -> None:
        with pytest.raises(ScopeClosedError):
            tenant()
        done.set()

    async with Overtaken("the request scope") as scope:
        thread = threading.Thread(target=contextvars.copy_context().run, args=[ask])
        thread.start()
        assert begun.wait(DEADLINE)
    thread.join()
    assert log == ["set up", "torn down"]
    assert what_is_kept(scope) == []


def test_a_tree_asked_for_from_all_sides_is_set_up_once_and_torn_down_in_order(
    threads: ThreadPoolExecutor,
) -> None:
    for turn in range(ROUNDS):
        ledger = Ledger()
        base = ledger.resource("base")
        left, right = ledger.resource("left", base), ledger.resource("right", base)
        top = ledger.resource("top", left, right)
        asked = mixed([base, left, right, top], turn)
        with request_scope() as scope:
            outcomes = at_once(threads, top, *asked)
            assert [error for _, error in outcomes if error] == []
            for resource, (value, _) in zip([top, *asked], outcomes, strict=True):
                assert value is resource()
        set_up, torn_down = ledger.log[:4], ledger.log[4:]
        assert sorted(set_up) == ["+base", "+left", "+right", "+top"]
        assert sorted(torn_down) == ["-base", "-left", "-right", "-top"]
        assert (torn_down[0], torn_down[-1]) == ("-top", "-base")
        assert what_is_kept(scope) == []


def test_a_factory_that_fails_at_first_is_tried_again_by_one_thread_at_a_time(
    threads: ThreadPoolExecutor,
) -> None:
    for failing in [0, 1, 2, 3] * (ROUNDS // 4):
        ledger = Ledger()
        attempts: list[ValueError] = []

        def fail_at_first(attempts: list[ValueError] = attempts, times: int = failing) -> None:
            if len(attempts) < times:
                attempts.append(ValueError(len(attempts)))
                raise attempts[-1]

        resource = ledger.resource("one", fail_at_first)
        with request_scope():
            outcomes = at_once(threads, *[resource] * THREADS)
            errors = [error for _, error in outcomes if error is not None]
            assert all(error in attempts for error in errors)
            assert len(attempts) <= failing
            while len(attempts) < failing:  # all have waited for the first attempts, in vain
                with pytest.raises(ValueError, match=str(len(attempts))):
                    resource()
            value = resource()
            assert {found for found, error in outcomes if error is None} <= {value}
        assert ledger.log == ["+one", "-one"]


def test_a_circle_entered_at_all_its_points_is_an_error_for_all(
    threads: ThreadPoolExecutor,
) -> None:
    for _ in range(ROUNDS):
        ledger = Ledger()
        circle: list[Any] = []
        for number in range(4):
            circle.append(ledger.resource(str(number), partial(ask, circle, (number + 1) % 4)))
        outside = ledger.resource("outside", circle[0])
        with request_scope() as scope:
            outcomes = at_once(threads, *circle, outside, *circle[:3])
            assert {type(error) for _, error in outcomes} == {CircularResourceError}
            assert what_is_kept(scope) == []
        assert ledger.log == []


def test_a_scope_that_closes_meanwhile_tears_down_what_was_set_up_and_refuses_the_rest(
    threads: ThreadPoolExecutor,
) -> None:
    refused = 0
    for turn in range(ROUNDS * 2):
        ledger = Ledger()
        base = ledger.resource("base")
        resources = [ledger.resource(str(number), base) for number in range(3)]
        asked = mixed(resources, turn)

        with request_scope() as scope:
            closing = partial(waiting.run_without_loop, scope.close())
            outcomes = at_once(threads, closing, *asked)
        assert outcomes[0] == (None, None)
        for value, error in outcomes[1:]:
            assert isinstance(value, Thing) or isinstance(error, ScopeClosedError), error
            refused += error is not None
        set_up = sorted(entry[1:] for entry in ledger.log if entry[0] == "+")
        torn_down = sorted(entry[1:] for entry in ledger.log if entry[0] == "-")
        assert set_up == torn_down
        assert what_is_kept(scope) == []
    assert refused


async def test_threads_and_the_event_loop_ask_at_once(threads: ThreadPoolExecutor) -> None:
    for _ in range(ROUNDS):
        ledger = Ledger()
        base = ledger.resource("base")
        top = ledger.resource("top", base)
        hop = partial(sync_to_async, thread_sensitive=False, executor=threads)

        async with request_scope() as scope:
            meeting = threading.Barrier(3)

            def meet(meeting: threading.Barrier = meeting, top: Any = top) -> object:
                meeting.wait(DEADLINE)
                return top()

            asking = [asyncio.create_task(hop(meet)()) for _ in range(2)]
            while meeting.n_waiting < 2:
                await asyncio.sleep(0)
            meeting.wait(DEADLINE)
            here = top()
            assert set(await asyncio.gather(*asking)) == {here}
        assert ledger.log == ["+base", "+top", "-top", "-base"]
        assert what_is_kept(scope) == []


@pytest.mark.parametrize("is_held", [False, True], ids=["implied", "held by a loop"])
def test_requests_in_many_threads_share_a_lifespan_that_outlives_each_of_them(
    is_held: bool, threads: ThreadPoolExecutor
) -> None:
    ledger = Ledger()
    found: list[object] = []

    @lifespan_scoped
    def pool() -> Iterator[Thing]:
        yield from ledger.set_up("pool")

    def request() -> None:
        with request_scope():
            shared = pool()
            found.append(shared)
            assert pool() is shared
            assert not shared.is_down

    def requests() -> None:
        for _ in range(ROUNDS):
            outcomes = at_once(threads, *[request] * THREADS)
            assert [error for _, error in outcomes if error] == []

    async def server() -> None:
        async with lifespan_scope():
            found.append(pool())
            await sync_to_async(requests)()

    if is_held:
        asyncio.run(server())
        assert len(set(found)) == 1
    else:
        requests()
    # Where nobody holds it, it goes with the last open request, and comes with the next: which
    # may be while the last is still on its way out.
    times = len(set(found))
    assert ledger.log.count("+pool") == ledger.log.count("-pool") == times
    assert None not in lifespans.lifespans
