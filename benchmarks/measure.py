"""
Repetitions of every contender in turn, in a new random order each time, so that
whatever else the machine does meets all of them. What is compared are figures
of the same repetition.
"""

import gc
import os
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

__all__ = ["Outcome", "interleave", "pin", "ratios", "timed"]

# Of the first process, before it pins itself: those that it starts inherit what it pins.
_CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@dataclass(frozen=True, slots=True)
class Outcome:
    """A median and its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> "Outcome":
        figures = list(figures)
        if len(figures) == 1:
            return cls(figures[0], figures[0], figures[0])
        low, _, high = quantiles(figures, n=4, method="inclusive")
        return cls(low, median(figures), high)


def pin(core: int) -> None:
    """Keep this process, and the threads it is to start, on one CPU, where that can be said."""
    if _CPUS:
        os.sched_setaffinity(0, {_CPUS[core % len(_CPUS)]})


async def interleave(
    contenders: Mapping[str, Callable[[], Awaitable[float]]], repetitions: int
) -> dict[str, list[float]]:
    """Each contender's figure in each repetition; one more, not counted, comes first."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repetition in range(-1, repetitions):
        random.shuffle(names)
        for name in names:
            figure = await contenders[name]()
            if repetition >= 0:
                figures[name].append(figure)
    return figures


async def timed(work: Callable[[int], Awaitable[object]], n: int) -> float:
    """Seconds for one of n. The collector stays on: who makes cycles pays for them."""
    gc.collect()
    gc.freeze()  # what is there already is not to be looked through each time
    started = perf_counter()
    await work(n)
    took = perf_counter() - started
    gc.unfreeze()
    return took / n


def ratios(figures: Mapping[str, list[float]], unit: str) -> dict[str, Outcome]:
    """How many times the unit's figure each has, repetition by repetition."""
    return {
        name: Outcome.of(one / other for one, other in zip(mine, figures[unit], strict=True))
        for name, mine in figures.items()
    }
