"""What both fuzzers know: a clock, what was found, and the runs of factories."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

__all__ = ["DEADLINE", "Attempt", "PlannedError", "World"]

# Seconds after which one program, of some milliseconds, is taken to hang.
DEADLINE = 60.0


class PlannedError(Exception):
    """Raised by factories, views and middleware because the dice say so."""


@dataclass(eq=False)
class Attempt:
    """One run of a factory. Times are those of the world's clock."""

    name: str
    is_generator: bool
    scope: Any
    key: tuple[int, ...] = ()
    used: list["Attempt"] = field(default_factory=list)
    state: str = "setting up"
    up_at: int = 0
    going_at: int = 0
    down_at: int = 0
    teardowns: int = 0
    thread: int = 0

    def __repr__(self) -> str:
        times = f"{self.up_at}, {self.going_at}, {self.down_at}"
        return f"<{self.name}{self.key} of {self.scope}, {self.state}: {times}>"


class World:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.dice = random.Random(seed)  # noqa: S311 (to be had again, not to be secret)
        self.tick = count(1).__next__
        self.problems: list[str] = []
        self.attempts: list[Attempt] = []

    def problem(self, *words: object) -> None:
        self.problems.append(" ".join(map(str, words)))

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability

    async def pause(self, steps: int = 1) -> None:
        for _ in range(steps):
            await asyncio.sleep(self.dice.choice([0, 0, 0, 0.0005]))

    @contextmanager
    def running(self, attempt: Attempt) -> Iterator[None]:
        """Around all that a factory does."""
        self.attempts.append(attempt)
        try:
            yield
        finally:
            if attempt.state == "setting up":
                attempt.state = "failed"
            elif attempt.is_generator:
                attempt.state, attempt.down_at = "down", self.tick()

    def up(self, attempt: Attempt) -> None:
        attempt.state, attempt.up_at = "up", self.tick()

    def going(self, attempt: Attempt) -> None:
        attempt.state, attempt.going_at = "going", self.tick()
        attempt.teardowns += 1

    def check_attempts(self) -> None:
        """Each is torn down once, and before what it has used."""
        for attempt in self.attempts:
            if not attempt.is_generator:
                continue
            if attempt.state not in ("failed", "down"):
                self.problem("not torn down:", attempt)
            elif attempt.state == "down" and attempt.teardowns != 1:
                self.problem("torn down", attempt.teardowns, "times:", attempt)
            for used in attempt.used:
                # A thread that hangs in its set-up is not waited for: what it used goes meanwhile.
                if attempt.up_at < used.going_at < attempt.down_at:
                    self.problem("torn down before its user:", used, "used by", attempt)
