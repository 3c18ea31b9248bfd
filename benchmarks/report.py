"""Writes what was measured: one page of Markdown, one chart for each question."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.measure import Outcome
from benchmarks.questions import Request, Work

__all__ = ["Machine", "Question", "page", "page_of_instructions", "write"]

_PACKAGES = [
    *("django-scoped", "Django", "asgiref", "uvicorn", "httptools"),
    *("dishka", "wireup", "diwire", "svcs", "aioinject", "anydi", "that-depends", "modern-di"),
    *("dependency-injector", "fastapi", "starlette", "litestar", "aiohttp"),
]

_FRAMEWORKS = ["stock", "FastAPI", "Litestar"]
_NO_PEERS = {
    *("scoped", "AsyncExitStack", "hand-written", *_FRAMEWORKS),
    "modern-di (sync)",  # awaits nothing while it sets up: no peer for an async generator
}
# Two tasks that ask at once, for what takes time to set up, get two objects.
_UNPROTECTED = {"dishka", "wireup", "diwire", "svcs", "aioinject"}


@dataclass(frozen=True, slots=True)
class Question:
    key: str
    title: str
    unit: str  # the contender that is 1
    measure: str  # "time", "rate" or "bytes"
    figures: Mapping[str, Outcome]
    ratios: Mapping[str, Outcome]
    goal: float | None = None
    text: str = ""
    # Who could not take part, and why.
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def more_is_better(self) -> bool:
        return self.measure == "rate"

    @property
    def best_first(self) -> list[str]:
        return sorted(
            self.ratios, key=lambda name: self.ratios[name].median, reverse=self.more_is_better
        )

    def best_peer(self, *, protected: bool) -> str:
        """
        The best of the other libraries; other frameworks (FastAPI, Litestar) are none.
        ``protected``: of those that set up once for all tasks of a scope.
        """
        if self.goal is None:
            return "-"
        but = _NO_PEERS | _UNPROTECTED if protected else _NO_PEERS
        peers = [name for name in self.best_first if name not in but]
        return f"{_ratio(self.ratios[peers[0]].median)} ({peers[0]})" if peers else "-"

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        ours = self.ratios["scoped"].median
        met = ours >= self.goal if self.more_is_better else ours <= self.goal
        return "met" if met else "**missed**"

    @property
    def goal_text(self) -> str:
        if self.goal is None:
            return ""
        return f"{'at least' if self.more_is_better else 'at most'} {self.goal:g}"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures hold for."""

    cpu: str
    system: str
    python: str
    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> "Machine":
        versions = {}
        for name in _PACKAGES:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                continue
        return cls(
            cpu=f"{_cpu_model()}, {os.cpu_count()} CPUs",
            system=f"{platform.system()} {platform.machine()}",
            python=f"{platform.python_implementation()} {platform.python_version()}",
            versions=versions,
        )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def write(
    directory: Path, questions: list[Question], machine: Machine, method: str, conditions: str
) -> None:
    for question in questions:
        (directory / _chart_name(question)).write_text(_chart(question))
    (directory / "benchmarks.md").write_text(page(questions, machine, method, conditions))


def page(questions: list[Question], machine: Machine, method: str, conditions: str) -> str:
    parts = [
        "# Benchmarks",
        "*Written by `python -m benchmarks` (dependency group `benchmarks`): do not edit.*",
        "Each figure is `scoped` beside the alternatives, in one run. What counts are the ratios: "
        "seconds depend on the machine. `python -m benchmarks.instructions` "
        "counts the same work in instructions. *Protected* are peers that set up once where "
        "several tasks of a scope ask at once.",
        summary(questions),
        *map(_section, questions),
        "## Method",
        method,
        "## Machine and versions",
        f"{machine.cpu}; {machine.system}; {machine.python}. {conditions}",
        _table(["Package", "Version"], [[*pair] for pair in machine.versions.items()]),
    ]
    return "\n\n".join(parts) + "\n"


_OF_INSTRUCTIONS = """\
How many instructions a scope costs, and a request in process, counted by callgrind, and how many bytes, by `tracemalloc`.
Beside each figure the ratio to `AsyncExitStack`'s or, for cached access, to that of hand-written
lazy code. Where seconds move by a tenth with what else the machine does, these do not; but an
instruction is no unit of time, least of all where threads wait for each other. What is compared,
and how it is set up: [Benchmarks](benchmarks.md#method).

*With locks* is a library with its own protection switched on: without it two tasks that ask at
once, in `gather()` say, get two objects. svcs and aioinject have none; anydi, that-depends and
scoped always have it. modern-di sets up by sync functions only, so nothing is awaited there. A
dash: it does not do that work; it tears down in another order, say, or has nothing to look up."""


def page_of_instructions(
    works: Sequence[Work],
    figures: Mapping[str, Mapping[str, float]],
    requests: Sequence[Request],
    of_requests: Mapping[str, Mapping[str, float]],
    machine: Machine,
) -> str:
    """Figures of scopes by contender and key, of requests by key and application."""
    columns = [(work.key, work.title, work.unit, work.goal) for work in works]
    columns.append(("memory", "Bytes while it is open", "AsyncExitStack", 0.75))
    rows = [
        [name, *(_with_ratio(mine.get(key), figures[unit][key]) for key, _, unit, _ in columns)]
        for name, mine in figures.items()
    ]
    goals = ["*goal*", *(f"at most {goal:.2f}" for *_, goal in columns)]
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    parts = [
        "# Benchmarks in instructions",
        "*Written by `python -m benchmarks.instructions` (dependency group `benchmarks`, and "
        "Debian's `valgrind`): do not edit.*",
        _table(["", *(title for _, title, *_ in columns)], [*rows, goals]),
        _requests_in_instructions(requests, of_requests),
        _OF_INSTRUCTIONS,
        f"{machine.system}; {machine.python}; {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def _requests_in_instructions(
    requests: Sequence[Request], figures: Mapping[str, Mapping[str, float]]
) -> str:
    others = [name for name in _FRAMEWORKS if any(name in mine for mine in figures.values())]
    rows = []
    for request in requests:
        if (mine := figures.get(request.key)) is not None:
            cells = (_with_ratio(mine.get(name), mine["scoped"]) for name in others)
            rows.append([request.title, f"{mine['scoped']:,.0f}", *cells])
    return _table(["A request", "scoped", *(f"{name} (x scoped)" for name in others)], rows)


def _with_ratio(figure: float | None, unit: float) -> str:
    return "-" if figure is None else f"{figure:,.0f} ({figure / unit:.2f})"


def summary(questions: list[Question]) -> str:
    rows = [
        [
            question.title,
            f"{_MEASURES[question.measure]}, x {question.unit}",
            question.best_peer(protected=False),
            question.best_peer(protected=True),
            _ratio(question.ratios["scoped"].median),
            question.goal_text,
            question.verdict,
        ]
        for question in questions
    ]
    return _table(["Work", "Unit", "Best peer", "Best, protected", "scoped", "Goal", ""], rows)


_MEASURES = {"time": "time", "rate": "requests/s", "bytes": "bytes"}


def _section(question: Question) -> str:
    rows = [
        [
            name,
            _figure(question.figures[name].median, question.measure),
            " to ".join(
                _figure(value, question.measure)
                for value in (question.figures[name].low, question.figures[name].high)
            ),
            _ratio(question.ratios[name].median),
            f"{_ratio(question.ratios[name].low)} to {_ratio(question.ratios[name].high)}",
        ]
        for name in question.best_first
    ]
    rows += [[name, "-", "", "-", ""] for name in question.absent]
    parts = [f"## {question.title}"]
    if question.text:
        parts.append(question.text)
    better = "more is better" if question.more_is_better else "less is better"
    what = f"{_MEASURES[question.measure]}, x {question.unit}, {better}"
    parts.append(f"![{question.title}: {what}]({_chart_name(question)})")
    header = ["", "Median", "Middle half", f"x {question.unit}", "Middle half"]
    parts.append(_table(header, rows))
    if question.absent:
        parts.append("\n".join(f"- {name}: {why}." for name, why in question.absent.items()))
    return "\n\n".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _figure(value: float, measure: str) -> str:
    if measure == "bytes":
        return f"{value:,.0f} B"
    if measure == "rate":
        return f"{value:,.0f}/s"
    return f"{value * 1e6:,.3g} us" if value >= 1e-6 else f"{value * 1e9:,.3g} ns"


# Charts. The colours are read on white and on black.

_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f; }
  .small { font-size: 12px; fill: #57606a; }
  .bar { fill: #8c959f; }
  .ours { fill: #1a7f37; }
  .spread { stroke: #24292f; stroke-width: 1.5; }
  .unit { stroke: #57606a; stroke-dasharray: 4 3; }
  .goal { stroke: #1a7f37; stroke-dasharray: 2 3; stroke-width: 1.5; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .small { fill: #9da7b3; }
    .bar { fill: #6e7681; }
    .ours { fill: #3fb950; }
    .spread { stroke: #e6edf3; }
    .unit { stroke: #9da7b3; }
    .goal { stroke: #3fb950; }
  }
"""
_LEFT, _WIDTH, _ROW, _TOP, _RIGHT = 130, 460, 26, 46, 70
_CUT = 4.0  # a bar that is longer is cut: the others would be too short to read


def _chart_name(question: Question) -> str:
    return f"benchmarks-{question.key}.svg"


def _chart(question: Question) -> str:
    outcomes = question.ratios
    longest = max(1.0, question.goal or 0, *(outcome.high for outcome in outcomes.values()))
    if not question.more_is_better:
        longest = min(longest, _CUT)

    def x(value: float) -> str:
        return f"{_LEFT + _WIDTH * min(value / longest, 1):.1f}"

    bottom = _TOP + _ROW * len(outcomes)
    better = "more is better" if question.more_is_better else "less is better"
    legend = f"{_MEASURES[question.measure]}, x {question.unit} (dashed), {better}"
    if longest == _CUT:
        legend += f"; cut at {_CUT:g}"
    if question.goal is not None:
        legend += f"; goal {question.goal:g} (dotted)"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + _RIGHT} '
        f'{bottom + 14}" role="img">',
        f"<title>{escape(question.title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<text x="8" y="18">{escape(question.title)}</text>',
        f'<text class="small" x="8" y="35">{escape(legend)}</text>',
    ]
    for row, name in enumerate(question.best_first):
        outcome, top = outcomes[name], _TOP + _ROW * row
        middle = top + 9
        kind = "bar ours" if name == "scoped" else "bar"
        width = _WIDTH * min(outcome.median / longest, 1)
        lines += [
            f'<text x="{_LEFT - 8}" y="{middle + 5}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{kind}" x="{_LEFT}" y="{top}" width="{width:.1f}" height="18" rx="2"/>',
            f'<line class="spread" x1="{x(outcome.low)}" x2="{x(outcome.high)}" y1="{middle}" '
            f'y2="{middle}"/>',
            f'<text class="small" x="{float(x(max(outcome.high, outcome.median))) + 6:.1f}" '
            f'y="{middle + 5}">{_ratio(outcome.median)}</text>',
        ]
    marks = [(1.0, "unit")] + ([] if question.goal is None else [(question.goal, "goal")])
    lines += [
        f'<line class="{kind}" x1="{x(value)}" x2="{x(value)}" y1="{_TOP - 4}" y2="{bottom}"/>'
        for value, kind in marks
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"
