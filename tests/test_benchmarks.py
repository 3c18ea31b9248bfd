"""The benchmarks' own code: that contenders are checked, and what is written. Nothing is timed."""

import asyncio
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import work
from benchmarks.check import WORKS, check
from benchmarks.contenders import Contender, async_exit_stack, by_hand, ours
from benchmarks.measure import Outcome, interleave, ratios
from benchmarks.memory import bytes_per_scope
from benchmarks.project import APPLICATIONS, KINDS
from benchmarks.questions import REQUESTS, Request
from benchmarks.questions import WORKS as QUESTIONS
from benchmarks.report import Machine, Question, page_of_instructions, write

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("make", [by_hand, ours])
async def test_contenders_do_the_work(make):
    assert await check(make()) == {}


async def test_the_unit_does_all_but_look_up():
    assert list(await check(async_exit_stack())) == ["cached"]


async def test_a_contender_that_tears_down_in_another_order_is_found_out():
    async def chain(n, uses):
        values = await ours().chain(n, uses)
        work.log[-1], work.log[-2] = work.log[-2], work.log[-1]
        return values

    failures = await check(replace(ours(), chain=chain))
    assert failures == {"chain": "did +a+b+c+d+e-e-d-c-a-b in place of +a+b+c+d+e-e-d-c-b-a"}


async def test_a_contender_that_shares_an_object_between_scopes_is_found_out():
    shared = work.A()

    @asynccontextmanager
    async def scope():
        work.log.append("+a")
        yield shared
        work.log.append("-a")

    async def hold(held: list[work.Part], release: asyncio.Event) -> None:
        async with scope() as value:
            held.append(value)
            await release.wait()

    assert await check(replace(ours(), hold=hold)) == {"hold": "two scopes had one object"}


async def test_every_contender_meets_in_every_repetition():
    log = []

    def contender(name):
        async def figure():
            log.append(name)
            return float(len(log))

        return figure

    figures = await interleave({name: contender(name) for name in "xyz"}, repetitions=2)
    assert [sorted(log[at : at + 3]) for at in (0, 3, 6)] == [["x", "y", "z"]] * 3
    assert sorted(one for each in figures.values() for one in each) == [4, 5, 6, 7, 8, 9]


def test_ratios_are_of_figures_of_the_same_repetition():
    found = ratios({"scoped": [2, 40, 6], "stock": [1, 10, 2]}, "stock")
    assert found == {"scoped": Outcome(2.5, 3, 3.5), "stock": Outcome(1, 1, 1)}


async def test_memory_is_measured_of_scopes_that_are_open():
    async def hold(held: list[work.Part], release: asyncio.Event) -> None: ...

    with pytest.raises(RuntimeError, match=r"^lazy has opened 0 of 1000 scopes$"):
        await bytes_per_scope(replace(ours(), name="lazy", hold=hold))


def question(measure: str = "time", goal: float = 1.5, **kwargs) -> Question:
    figures = {"scoped": [2e-6, 4e-6], "AsyncExitStack": [2e-6, 2e-6], "a<b": [8e-6, 8e-6]}
    return Question(
        f"made-up-{measure}",
        "A made-up question",
        "AsyncExitStack",
        measure,
        {name: Outcome.of(each) for name, each in figures.items()},
        ratios(figures, "AsyncExitStack"),
        goal,
        absent={"lazy": "it cannot"},
        **kwargs,
    )


def test_the_page_says_what_was_measured(tmp_path):
    machine = Machine("an abacus, 1 CPU", "Linux", "CPython 3.13", {"Django": "6.1"})
    questions = [question(), question("rate"), question("bytes", goal=1.4)]
    write(tmp_path, questions, machine, "With care.", "Measured at night.")

    page = (tmp_path / "benchmarks.md").read_text()
    title, ours = "| A made-up question |", "| 4.00 (a<b) | 4.00 (a<b) | 1.50 |"
    assert f"{title} time, x AsyncExitStack {ours} at most 1.5 | met |" in page
    assert f"{title} requests/s, x AsyncExitStack {ours} at least 1.5 | met |" in page
    assert f"{title} bytes, x AsyncExitStack {ours} at most 1.4 | **missed** |" in page
    assert "| scoped | 3 us | 2.5 us to 3.5 us | 1.50 | 1.25 to 1.75 |" in page
    assert "| lazy | - |  | - |  |" in page
    assert "- lazy: it cannot.\n" in page
    assert "an abacus, 1 CPU; Linux; CPython 3.13. Measured at night." in page

    for name in ("time", "rate", "bytes"):
        chart = f"benchmarks-made-up-{name}.svg"
        assert f"]({chart})" in page
        root = ElementTree.fromstring((tmp_path / chart).read_text())  # noqa: S314 (ours)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in ElementTree.tostring(root, "unicode")


def test_the_best_peer_with_protection_is_one_that_has_it():
    figures = {"AsyncExitStack": [1], "scoped": [3], "dishka": [1], "dishka, with locks": [2]}
    made_up = replace(question(), ratios=ratios(figures, "AsyncExitStack"))
    assert made_up.best_peer(protected=False) == "1.00 (dishka)"
    assert made_up.best_peer(protected=True) == "2.00 (dishka, with locks)"


def test_the_page_of_instructions_has_a_figure_and_a_ratio_for_each():
    units = {work.key: 10_000.0 for work in QUESTIONS}
    figures = {
        "AsyncExitStack": {**units, "memory": 1_000.0},
        "hand-written": {**units, "memory": 2_000.0},
        "lazy": {"empty": 25_000.0},
    }
    machine = Machine("an abacus", "Linux", "CPython 3.13", {"Django": "6.1"})
    requests = {
        "request-one": {"stock": 3e6, "scoped": 1e6, "FastAPI": 5e5},
        "request-sync": {"stock": 2e6, "scoped": 1e6},
    }
    page = page_of_instructions(QUESTIONS, figures, REQUESTS, requests, machine)
    ten, none = "10,000 (1.00)", "-"
    assert f"| AsyncExitStack | {' | '.join([ten] * 5)} | 1,000 (1.00) |" in page
    assert f"| hand-written | {' | '.join([ten] * 5)} | 2,000 (2.00) |" in page
    assert f"| lazy | {' | '.join([none] * 4)} | 25,000 (2.50) | {none} |" in page
    assert "| at most 1.35 | at most 0.75 |" in page
    assert "| A request | scoped | stock (x scoped) | FastAPI (x scoped) |" in page
    assert "| one resource used | 1,000,000 | 3,000,000 (3.00) | 500,000 (0.50) |" in page
    assert "| a sync view | 1,000,000 | 2,000,000 (2.00) | - |" in page


def test_the_process_that_is_counted_does_the_work():
    plan = [f"{work.key}:2" for work in QUESTIONS]
    command = [sys.executable, "-m", "benchmarks.counted", "ours", *plan]
    subprocess.run(command, cwd=ROOT, check=True, timeout=50)


@pytest.mark.parametrize(
    ("question", "application"),
    [(one, name) for one in REQUESTS for name in one.applications if name != "Litestar"],
    ids=lambda part: part if isinstance(part, str) else part.key,
)
def test_the_process_that_is_asked_answers(question: Request, application: str):
    """It looks at the answers before it counts. (Litestar is not installed for tests.)"""
    options = ["--kind", question.kind, "--count", f"{question.path}:2"]
    command = [sys.executable, "-m", "benchmarks.worker", application, *options]
    subprocess.run(command, cwd=ROOT, check=True, timeout=50)


def test_the_process_that_is_asked_does_not_hide_a_failure():
    options = ["--count", "/no-such-page:1"]
    command = [sys.executable, "-m", "benchmarks.worker", "scoped", *options]
    ended = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=50
    )
    assert ended.returncode
    assert "'status': 404" in ended.stderr


def test_a_question_about_requests_has_its_unit_beside_scoped():
    for request in REQUESTS:
        assert {"scoped", request.unit} <= set(request.applications) <= set(APPLICATIONS)
        assert request.kind in KINDS
    assert len({request.key for request in REQUESTS}) == len(REQUESTS)


def test_a_contender_names_all_kinds_of_work():
    assert set(WORKS) <= set(Contender.__dataclass_fields__)
