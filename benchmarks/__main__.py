"""The command: checks, measures, prints the summary, writes the page."""

import argparse
import asyncio
import datetime
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import processes, project
from benchmarks.check import check
from benchmarks.contenders import Contender, async_exit_stack, by_hand, ours
from benchmarks.measure import Outcome, interleave, pin, ratios, timed
from benchmarks.memory import SCOPES, bytes_per_scope
from benchmarks.peers import CANNOT, PEERS
from benchmarks.questions import REQUESTS, WORKS, Work
from benchmarks.report import Machine, Question, summary, write
from benchmarks.steps import STEPS

METHOD = """\
All contenders of a question are measured in one run: repetitions of each in turn, in a new random
order each time, after one that does not count. A ratio is one of figures of the same repetition,
so that other work on the machine meets both; given are the median of these ratios and the middle
half of them (first to third quartile). Before anything is measured, each contender shows in a log
that it builds the same objects and tears them down in the same order; what it cannot do has a
dash.

The process that works is pinned to one CPU; the load generator, where there is one, to another.
Python's garbage collector is on for all: what was there before a repetition is collected and then
frozen, so that each pays for its own garbage only.

A scope is opened and closed by the library's own `async with`, without a web framework. The
objects are made by async generators that do nothing else; a chain's last object is asked for
first, and its factory for the one before. What is compared: `AsyncExitStack` with nothing around
it, the least that can tear anything down, to which a further use is a local variable;
*hand-written*, a ContextVar that holds a dict and an `AsyncExitStack`, filled on first use; and
each library in its own documented way, its fast one where it documents one ({notes}).

Bytes are those that `tracemalloc` sees of {scopes:,} tasks, each with a scope open in which one
object is used, less those of tasks that only wait.

Requests are `GET`s of "ok" from an async view, in a project without middleware, databases or
receivers other than those named: the more a project does itself, the nearer to 1 its ratio.
*stock* is Django's own ASGIHandler, or WSGIHandler; its one resource is entered with `async with`
in the view, which is the least it can cost. FastAPI's and Litestar's is a dependency that yields.
Each application has a process of its own. In process they are called as a server would, one after
the other; under uvicorn (asyncio, httptools) {load} keeps {connections} connections busy on the
loopback interface."""

STEPS_TEXT = """\
One object in one scope again, in code that is written for this page only: the least that holds
values and generators behind a ContextVar, then the same with what a promise needs besides, one
after the other. `scoped` has all of them, and lifespans, threads, `release()` and
signals too. The goals for scopes that are missed would need a step left out: most of all the
ContextVar that is set, and set back, around each factory, by which a circle is found though it
leads through child tasks, and the record by which other tasks wait for a set-up under way."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything."""

    scopes: int = 15  # repetitions
    per_repetition: float = 1.0  # a factor
    memory: int = 3
    requests: int = 20
    requests_each: int = 300
    uvicorn: int = 8
    uvicorn_seconds: int = 2


QUICK = Plan(
    scopes=5,
    per_repetition=0.2,
    memory=1,
    requests=3,
    requests_each=60,
    uvicorn=2,
    uvicorn_seconds=1,
)


class Run:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.contenders: dict[str, Contender] = {}
        self.failures: dict[str, dict[str, str]] = {}  # by contender, then kind of work
        self.absent = dict(CANNOT)
        self.questions: list[Question] = []

    async def prepare(self) -> None:
        for make in (async_exit_stack, by_hand, ours, *PEERS):
            try:
                contender = make()
            except ImportError:
                self.absent[make.__name__.replace("_", "-")] = "not installed"
                continue
            self.contenders[contender.name] = contender
            self.failures[contender.name] = await check(contender)
        for name in ("hand-written", "scoped"):
            if self.failures[name]:
                raise SystemExit(f"{name} does not do the work: {self.failures[name]}")

    async def ask(self, work: Work) -> None:
        n = max(1, round(work.n * self.plan.per_repetition))
        able = self.able(work.kind)
        figures = await interleave(
            {name: partial(timed, work.do(able[name]), n) for name in able}, self.plan.scopes
        )
        self.answer(
            work.key,
            work.title,
            figures,
            unit=work.unit,
            measure="time",
            goal=work.goal,
            text=work.text,
            absent=self.absent_from(work.kind),
        )

    async def ask_steps(self) -> None:
        n = max(1, round(2_000 * self.plan.per_repetition))
        figures = await interleave(
            {name: partial(timed, work, n) for name, work in STEPS.items()}, self.plan.scopes
        )
        self.answer(
            "steps",
            "What the promises cost",
            figures,
            unit="AsyncExitStack",
            measure="time",
            goal=None,
            text=STEPS_TEXT,
        )

    async def ask_memory(self) -> None:
        able = self.able("hold")
        figures = await interleave(
            {name: partial(bytes_per_scope, able[name]) for name in able}, self.plan.memory
        )
        self.answer(
            "memory",
            f"{SCOPES:,} scopes open at once",
            figures,
            unit="AsyncExitStack",
            measure="bytes",
            goal=0.75,
            text="Bytes per scope, in each of which one object is used.",
            absent=self.absent_from("hold"),
        )

    async def ask_requests(self) -> None:
        plan = self.plan
        answer = partial(self.answer, measure="rate")
        for request in REQUESTS:
            figures = await processes.in_process(
                request.applications,
                request.path,
                n=plan.requests_each,
                repetitions=plan.requests,
                kind=request.kind,
            )
            answer(
                request.key,
                f"A request, in process, {request.title}",
                figures,
                unit=request.unit,
                goal=request.goal,
                text=request.text,
            )
        figures = await processes.under_uvicorn(
            project.APPLICATIONS, "/one", plan.uvicorn_seconds, plan.uvicorn
        )
        title = "A request under uvicorn, one resource used"
        answer("uvicorn", title, figures, unit="FastAPI", goal=1.0)

    def able(self, kind: str) -> dict[str, Contender]:
        return {
            name: contender
            for name, contender in self.contenders.items()
            if kind not in self.failures[name]
        }

    def absent_from(self, kind: str) -> dict[str, str]:
        failed = {
            name: failures[kind] for name, failures in self.failures.items() if kind in failures
        }
        return failed | self.absent

    def answer(
        self,
        key: str,
        title: str,
        figures: dict[str, list[float]],
        *,
        unit: str,
        measure: str,
        goal: float | None,
        text: str = "",
        absent: dict[str, str] | None = None,
    ) -> None:
        if measure == "rate":
            figures = {name: [1 / one for one in each] for name, each in figures.items()}
        outcomes = {name: Outcome.of(each) for name, each in figures.items()}
        question = Question(
            key, title, unit, measure, outcomes, ratios(figures, unit), goal, text, absent or {}
        )
        self.questions.append(question)
        print(f"{title}: {question.ratios['scoped'].median:.2f} x {unit}", flush=True)


def _load() -> str:
    return " ".join(f"{load:.1f}" for load in os.getloadavg())


async def _main(plan: Plan, directory: Path | None, only: str) -> None:
    run = Run(plan)
    started, load = datetime.datetime.now(datetime.UTC), _load()
    await run.prepare()
    if only != "requests":
        pin(0)
        for work in WORKS:
            await run.ask(work)
        await run.ask_steps()
        await run.ask_memory()
    if only != "scopes":
        pin(1)
        await run.ask_requests()
    print("", summary(run.questions), sep="\n")
    if directory is None:
        return
    conditions = (
        f"Measured on {started:%Y-%m-%d}. The load of the machine (1, 5 and 15 minutes) was {load} "
        f"before the run and {_load()} after it, other work and this run together."
    )
    contenders = run.contenders.values()
    notes = "; ".join(f"{each.name}: {each.note}" for each in contenders if each.note)
    method = METHOD.format(
        notes=notes,
        scopes=SCOPES,
        load=processes.LOAD_GENERATOR,
        connections=processes.CONNECTIONS,
    )
    write(directory, run.questions, Machine.here(), method, conditions)
    print(f"\nWritten to {directory / 'benchmarks.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute; rough, so not written")
    parser.add_argument("--only", choices=["scopes", "requests"], default="", help="half of it")
    parser.add_argument("--output", type=Path, help="where to write; docs/ by default, if whole")
    arguments = parser.parse_args()
    directory = arguments.output
    if directory is None and not arguments.quick and not arguments.only:
        directory = Path(__file__).parent.parent / "docs"
    asyncio.run(_main(QUICK if arguments.quick else Plan(), directory, arguments.only))


if __name__ == "__main__":
    main()
