"""
Random programs against the core: scopes in scopes, lifespans, tasks that are cancelled, threads,
releases, stand-ins, tasks that outlive their request.

Promised, and looked for: each set-up that has succeeded is torn down once, before what it has
used; a scope has one value of each at a time; nothing is up, or kept, when its scope has closed;
a factory can reset what it has set in its Context; nothing hangs; no task, thread or lifespan is
left; nothing is raised but what was planned.
"""

import asyncio
import contextvars
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async

from scoped import (
    ScopedError,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
    spawn,
)
from scoped.core.current import scope_here
from scoped.core.lifespan import lifespans
from scoped.core.record import STARTING
from scoped.core.scope import Scope
from scoped.testing import override
from tests.fuzz.world import DEADLINE, Attempt, PlannedError, World

__all__ = ["run"]

MARK: contextvars.ContextVar[object] = contextvars.ContextVar("MARK", default=None)

EXPECTED = (PlannedError, ScopedError, asyncio.CancelledError, TimeoutError)
# What asgiref says to sync code whose caller, or whose thread, has gone.
ASGIREFS = ("CurrentThreadExecutor", "has exited", "after shutdown")

LIFETIMES = ["lifespan", *["request"] * 6, *["response"] * 2]
KINDS = [*["async generator"] * 5, *["generator"] * 2, "coroutine function", "function"]
ORDER = {"lifespan": 0, "request": 1, "response": 2}


def is_expected(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_expected, error.exceptions))
    if isinstance(error, RuntimeError) and any(word in str(error) for word in ASGIREFS):
        return True
    return isinstance(error, EXPECTED)


class Recipe:
    """A resource whose factory does what the dice have said."""

    def __init__(
        self,
        program: "Program",
        number: int,
        stands_in_for: "Recipe | None" = None,
    ) -> None:
        self.program, self.number, dice = program, number, program.dice
        if stands_in_for is None:
            self.lifetime = dice.choice(LIFETIMES)
            self.kind = dice.choice(KINDS)
            self.is_keyed = self.lifetime != "lifespan" and program.chance(0.2)
        else:
            self.lifetime, self.is_keyed = stands_in_for.lifetime, stands_in_for.is_keyed
            self.kind = dice.choice(KINDS if stands_in_for.is_async else ["generator", "function"])
        self.is_async = self.kind in ("async generator", "coroutine function")
        self.is_generator = "generator" in self.kind
        may_use = [
            one
            for one in program.recipes[:number]
            if ORDER[one.lifetime] <= ORDER[self.lifetime] and (self.is_async or not one.is_async)
        ]
        self.uses = dice.sample(may_use, min(len(may_use), dice.choice([0, 1, 1, 2, 3])))
        self.pauses, self.last_pauses = dice.randint(0, 2), dice.randint(0, 2)
        self.fails = program.chance(0.08)
        self.fails_once = program.chance(0.1)
        self.teardown_fails = program.chance(0.1)
        self.swallows = program.chance(0.15)
        self.asks_together = program.chance(0.4)
        self.sets_mark = program.chance(0.5)
        # Several that stand in for one, one after the other, are resources of their own.
        program.stand_ins += stands_in_for is not None
        which = "" if stands_in_for is None else f"*{program.stand_ins}"
        self.name = f"{self.lifetime} {self.kind} {number}{which}"
        self.factory = self._factory()
        if stands_in_for is None:
            self.access = self._declare()

    def _factory(self) -> Any:
        made: Any = partial(
            {
                "async generator": self.async_generator,
                "generator": self.generator,
                "coroutine function": self.coroutine_function,
                "function": self.function,
            }[self.kind]
        )
        made.__name__ = self.name
        return made

    def _declare(self) -> Any:
        if self.lifetime == "lifespan":
            return lifespan_scoped(self.factory)
        until: Any = "response" if self.lifetime == "response" else None
        return request_scoped(until=until, keyed=self.is_keyed)(self.factory)

    def key(self) -> tuple[int, ...]:
        return (self.program.dice.randint(0, 1),) * self.is_keyed

    def begin(self, key: tuple[int, ...]) -> Attempt:
        thread = threading.get_ident()
        return Attempt(self.name, self.is_generator, scope_here(), key, thread=thread)

    # What the factories do

    def fail(self) -> None:
        if self.fails or self.fails_once:
            self.fails_once = False
            raise PlannedError(self.name)

    async def set_up(self, attempt: Attempt) -> None:
        await self.program.pause(self.pauses)
        if self.asks_together:
            async with asyncio.TaskGroup() as group:
                for used in self.uses:
                    group.create_task(self.use(attempt, used))
        else:
            for used in self.uses:
                await self.use(attempt, used)
        self.fail()
        await self.program.pause(self.pauses)
        self.program.up(attempt)

    async def use(self, attempt: Attempt, used: "Recipe") -> None:
        key = used.key()
        if used.is_async:
            value = await used.access(*key)
        elif self.asks_together:
            value = await sync_to_async(used.access, thread_sensitive=False)(*key)
        else:
            value = used.access(*key)
        attempt.used.append(value)

    def set_up_sync(self, attempt: Attempt) -> None:
        for used in self.uses:
            attempt.used.append(used.access(*used.key()))
        self.fail()
        time.sleep(0.0002 * self.pauses)
        self.program.up(attempt)

    def end(self, failure: BaseException | None) -> None:
        if self.teardown_fails:
            raise PlannedError(f"teardown of {self.name}")
        if failure is not None and not self.swallows:
            raise failure

    def reset(self, token: "contextvars.Token[object]") -> None:
        try:
            MARK.reset(token)
        except ValueError as error:
            self.program.problem("another Context:", self.name, error)

    async def async_generator(self, *key: int) -> AsyncIterator[Attempt]:
        attempt = self.begin(key)
        token = MARK.set(attempt)
        failure = None
        with self.program.running(attempt):
            try:
                await self.set_up(attempt)
                try:
                    yield attempt
                except BaseException as error:
                    failure = error
                self.program.going(attempt)
                await self.program.pause(self.last_pauses)
                self.end(failure)
            finally:
                failure = None  # no cycle with this frame
                self.reset(token)

    def generator(self, *key: int) -> Iterator[Attempt]:
        attempt = self.begin(key)
        token = MARK.set(attempt)
        failure = None
        with self.program.running(attempt):
            try:
                self.set_up_sync(attempt)
                try:
                    yield attempt
                except BaseException as error:
                    failure = error
                self.program.going(attempt)
                self.check_thread(attempt)
                time.sleep(0.0002 * self.last_pauses)
                self.end(failure)
            finally:
                failure = None
                self.reset(token)

    def check_thread(self, attempt: Attempt) -> None:
        """
        Those of a lifespan, and those of the event loop, end where they began. To the thread of a
        pool there is no way back, nor to one of code without an event loop.
        """
        is_bound = self.lifetime == "lifespan" and not attempt.scope.sync_only
        if (is_bound or attempt.thread == self.program.loop_thread) and (
            attempt.thread != threading.get_ident()
        ):
            self.program.problem("torn down in another thread:", attempt)

    async def coroutine_function(self, *key: int) -> Attempt:
        attempt = self.begin(key)
        with self.program.running(attempt):
            await self.set_up(attempt)
            return attempt

    def function(self, *key: int) -> Attempt:
        attempt = self.begin(key)
        with self.program.running(attempt):
            self.set_up_sync(attempt)
            return attempt


class Program(World):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.stand_ins = 0
        self.recipes: list[Recipe] = []
        for number in range(self.dice.randint(3, 8)):
            self.recipes.append(Recipe(self, number))
        self.has_stand_ins = self.chance(0.3)
        self.has_released = False
        self.strays: list[asyncio.Task[Any]] = []
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="fuzz")
        self.in_pool: list[Future[None]] = []
        self.closed: list[Scope] = []
        self.loop_thread = threading.get_ident()
        self.operations: dict[str, tuple[float, Callable[..., Awaitable[None]]]] = {
            "ask": (12, self.ask_once),
            "release": (4, self.release),
            "pause": (2, self.pause_once),
            "stray": (3, self.stray),
            "cancelled child": (3, self.cancelled_child),
            "task group": (1, self.task_group),
            "threads": (1, self.threads),
            "sync code": (1, self.sync_code),
            "stand in": (1, self.stand_in),
            "nested": (1, self.nested),
            "lifespan": (0.5, self.lifespan),
            "end of the response": (0.5, self.end_response),
            "background": (0.7, self.background),
        }

    # Asking

    async def ask(self, recipe: Recipe, how: str) -> object:  # noqa: PLR0911 (one for each way)
        key = recipe.key()
        if how == "child":
            return await asyncio.create_task(self.ask(recipe, "here"))
        if how == "gather":
            ways = [self.dice.choice(["here", "child", "thread"]) for _ in range(3)]
            values = await asyncio.gather(
                *[self.ask(recipe, way) for way in ways], return_exceptions=True
            )
            for value in values:
                if isinstance(value, BaseException) and not is_expected(value):
                    raise value
            return values
        if how == "timeout":
            async with asyncio.timeout(self.dice.choice([0, 0.0003, 0.001])):
                return await self.ask(recipe, "here")
        if how == "thread":
            function = async_to_sync(recipe.access) if recipe.is_async else recipe.access
            return await sync_to_async(function)(*key)
        if recipe.is_async:
            return await recipe.access(*key)
        if how == "other thread":
            return await asyncio.to_thread(recipe.access, *key)
        return recipe.access(*key)

    def way(self) -> str:
        return self.dice.choice(
            ["here", "here", "here", "child", "thread", "other thread", "timeout", "gather"]
        )

    async def careful(self, work: Awaitable[Any], *, lets_fail: bool = False) -> None:
        """Await it, whatever planned failure it has; a cancellation of this task is raised."""
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        try:
            await work
        except BaseException as error:
            if not is_expected(error) or task.cancelling() > before:
                raise
            if lets_fail and isinstance(error, PlannedError):
                raise

    def careful_sync(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            if not is_expected(error):
                raise

    # What a program does

    async def steps(self, depth: int = 0) -> None:
        names = list(self.operations)
        weights = [self.operations[name][0] for name in names]
        for name in self.dice.choices(names, weights, k=self.dice.randint(1, 7)):
            await self.operations[name][1](depth)

    async def ask_once(self, depth: int) -> None:
        recipe = self.dice.choice(self.recipes)
        await self.careful(self.ask(recipe, self.way()), lets_fail=self.chance(0.1))

    async def pause_once(self, depth: int) -> None:
        await self.pause()

    async def release(self, depth: int) -> None:
        recipe = self.dice.choice(self.recipes)
        if recipe.lifetime == "lifespan":
            return
        self.has_released = True
        key = recipe.key()
        if not recipe.is_async:
            where = self.dice.choice(["here", "thread"])
            if where == "here":
                self.careful_sync(partial(recipe.access.release, *key))
            else:
                await self.careful(sync_to_async(recipe.access.release)(*key))
        elif self.chance(0.3):
            await self.careful(asyncio.create_task(recipe.access.release(*key)))
        else:
            await self.careful(recipe.access.release(*key))

    async def stray(self, depth: int) -> None:
        async def stray() -> None:
            for _ in range(self.dice.randint(1, 3)):
                await asyncio.sleep(self.dice.choice([0, 0.0003, 0.002]))
                recipe = self.dice.choice(self.recipes)
                way = self.dice.choice(["here", "thread", "timeout"])
                await self.careful(self.ask(recipe, way))

        self.strays.append(asyncio.create_task(stray()))

    async def cancelled_child(self, depth: int) -> None:
        recipe = self.dice.choice(self.recipes)
        child = asyncio.create_task(self.careful(self.ask(recipe, self.way())))
        await self.pause(self.dice.randint(0, 4))
        child.cancel()
        if self.chance(0.5):
            await self.careful(child)
        else:
            self.strays.append(child)

    async def task_group(self, depth: int) -> None:
        async def group() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.dice.randint(1, 3)):
                    asking = self.ask(self.dice.choice(self.recipes), self.way())
                    group.create_task(self.careful(asking, lets_fail=self.chance(0.3)))
                if self.chance(0.3):
                    raise PlannedError("the group")

        await self.careful(group())

    async def threads(self, depth: int) -> None:
        if not (sync := [one for one in self.recipes if not one.is_async]):
            return
        running = []
        for _ in range(3):
            recipe = self.dice.choice(sync)
            asking = partial(recipe.access, *recipe.key())
            context = contextvars.copy_context()
            running.append(self.pool.submit(context.run, self.careful_sync, asking))
        self.in_pool += running
        if self.chance(0.7):
            await asyncio.wait([asyncio.wrap_future(one) for one in running])

    async def sync_code(self, depth: int) -> None:
        """With scopes of its own, in a thread, and nothing there but what is sync."""
        work = partial(self.careful_sync, partial(self.sync_steps, 0))
        if self.chance(0.5):
            await asyncio.to_thread(work)
        else:
            await asyncio.to_thread(contextvars.Context().run, work)

    def sync_steps(self, depth: int) -> None:
        sync = [one for one in self.recipes if not one.is_async]
        for _ in range(self.dice.randint(1, 4)):
            what = self.dice.choice(["ask", "ask", "release", "scope", "call", "lifespan"])
            deeper = partial(self.sync_steps, depth + 1)
            if what in ("ask", "release") and sync:
                recipe = self.dice.choice(sync)
                if what == "ask":
                    self.careful_sync(partial(recipe.access, *recipe.key()))
                elif recipe.lifetime != "lifespan":
                    self.has_released = True
                    self.careful_sync(partial(recipe.access.release, *recipe.key()))
            elif what == "call" and depth < 2:
                self.careful_sync(request_scope()(deeper))
            elif what in ("scope", "lifespan") and depth < 2:
                scope: Any = request_scope() if what == "scope" else lifespan_scope()
                self.careful_sync(partial(self.sync_block, scope, deeper))

    def sync_block(self, scope: Any, work: Callable[[], None]) -> None:
        before = scope_here()
        try:
            with scope as opened:
                work()
                if self.chance(0.3):
                    raise PlannedError("the sync block")
        finally:
            self.check_current(before)
            if scope is opened:
                self.closed.append(scope)

    async def stand_in(self, depth: int) -> None:
        if depth or not self.has_stand_ins:
            return
        recipe = self.dice.choice(self.recipes)
        with override(recipe.access, Recipe(self, recipe.number, recipe).factory):
            await self.steps(depth + 1)

    async def nested(self, depth: int) -> None:
        if depth >= 2:
            return
        before = scope_here()
        if self.chance(0.5):
            await self.careful(self.block(depth + 1))
        else:
            await self.careful(request_scope()(self.steps)(depth + 1))
        self.check_current(before)

    async def block(self, depth: int) -> None:
        scope = request_scope()
        try:
            async with scope:
                await self.steps(depth)
                if self.chance(0.4):
                    raise PlannedError("the block")
        finally:
            self.closed.append(scope)
            if scope.is_open:
                self.problem("open after its block:", scope)

    def check_current(self, before: Scope | None) -> None:
        """It is that of before, unless that has closed meanwhile: under a thread, say."""
        if (now := scope_here()) is not before and (before is None or before.is_open):
            self.problem("current after a nested scope is", now, "and not", before)

    async def lifespan(self, depth: int) -> None:
        async def inside() -> None:
            async with lifespan_scope():
                for recipe in self.recipes:
                    if recipe.lifetime == "lifespan" and self.chance(0.5):
                        await self.careful(self.ask(recipe, self.way()))
                await self.pause()

        before = scope_here()
        await self.careful(inside())
        self.check_current(before)

    async def end_response(self, depth: int) -> None:
        if not depth and isinstance(scope := scope_here(), type(request_scope())):
            await self.careful(scope.end_response())

    async def background(self, depth: int) -> None:
        task = spawn(self.careful(self.steps(2)))
        self.strays.append(task)
        if self.chance(0.3):
            task.cancel()

    # A whole program

    async def request(self) -> None:
        async with ThreadSensitiveContext():
            await self.block(0)

    async def requests(self) -> None:
        tasks = [asyncio.create_task(self.request()) for _ in range(self.dice.randint(1, 3))]
        for task in tasks:
            if self.chance(0.35):
                await self.pause(self.dice.randint(0, 12))
                task.cancel()
                if self.chance(0.3):
                    await self.pause(self.dice.randint(0, 3))
                    task.cancel()
        await self.ended("a request", tasks)

    async def ended(self, what: str, tasks: list[asyncio.Task[Any]]) -> None:
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, BaseException) and not is_expected(outcome):
                self.problem(what, "raised", *traceback.format_exception(outcome))

    async def main(self) -> None:
        if self.chance(0.6):
            with suppress(ScopedError):  # a teardown of the lifespan's has failed
                async with lifespan_scope():
                    await self.requests()
        else:
            await self.requests()
        for stray in self.strays:
            if self.chance(0.5):
                stray.cancel()
        while any(not stray.done() for stray in self.strays):  # they may have strays, too
            await asyncio.wait(list(self.strays))
        await self.ended("a stray", self.strays)
        for future in self.in_pool:
            await asyncio.wrap_future(future)
        this = asyncio.current_task()
        while left := [task for task in asyncio.all_tasks() if task is not this]:
            await asyncio.wait(left, timeout=0.01)

    # What is looked for

    def check(self) -> None:
        rest = partial(_rests_in, DEADLINE)
        # In a thread whose caller has gone something may go on, for a moment.
        rest(lambda: all(map(_is_over, self.attempts)))
        self.check_attempts()
        self.check_values()
        for scope in self.closed:
            if not rest(lambda scope=scope: not _kept(scope)):
                self.problem("kept by", scope, _kept(scope))
        if lifespans:
            self.problem("lifespans are left:", list(lifespans.values()))
            lifespans.clear()
        if not rest(lambda: not _own_threads()):
            self.problem("threads are left:", _own_threads())

    def check_values(self) -> None:
        """One at a time, in each scope."""
        by_scope: dict[Any, list[Attempt]] = {}
        for attempt in self.attempts:
            if attempt.up_at and attempt.is_generator:
                key = attempt.scope, attempt.name, attempt.key
                by_scope.setdefault(key, []).append(attempt)
        for attempts in by_scope.values():
            attempts.sort(key=lambda attempt: attempt.up_at)
            for one, other in pairwise(attempts):
                # What is released goes from the books first, and then begins to be torn down.
                if other.up_at < one.going_at and not self.has_released:
                    self.problem("two at a time:", one, other)


def _is_over(attempt: Attempt) -> bool:
    return attempt.state in (("failed", "down") if attempt.is_generator else ("failed", "up"))


def _kept(scope: Scope) -> list[object]:
    return [one for one in list(scope.records.values()) if one.state != STARTING] + list(
        scope.ending or ()
    )


def _own_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "scoped-generator"]


def _rests_in(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def run(seed: int) -> Program:
    program = Program(seed)

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE):
            await program.main()

    try:
        with asyncio.Runner(debug=False) as runner:
            runner.run(bounded())
    except BaseException as error:
        program.problem("it raised", *traceback.format_exception(error))
    program.pool.shutdown()
    program.check()
    return program
