"""
``python -m tests.guarantees`` writes ``docs/guarantees.md``: what is promised, and the
tests that hold each promise.

A test says which promises it holds in a docstring ("Promise 3", "Promises 2 to 4
and 6"): its own, or else its class's, or else in the comment over its section, or
else in its module's.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "guarantees.md"


class Ending(NamedTuple):
    """What becomes of ``request_finished``, and whether it sees what the view has set."""

    request: str
    before_6_1: str
    django_6_1: str


# Of each: tests/docs/test_guarantees.py has it happen under Django's handler and under ours.
ENDINGS = {
    "async": Ending("is answered by an async view", "blind", "yes"),
    "sync": Ending("is answered by a sync view", "blind", "yes"),
    "raises": Ending("fails in its view", "blind", "yes"),
    "stream": Ending("streams to its end", "blind", "yes"),
    "gather": Ending("first uses it in children of `gather()`", "blind", "blind"),
    "gone": Ending("loses its client while the view runs", "blind", "yes"),
    "gone in stream": Ending("loses its client while it streams", "blind", "yes"),
    "stream raises": Ending("fails in its streaming body", "never", "never"),
    "send raises": Ending("meets a `send()` that raises `OSError`", "never", "never"),
    "cancelled": Ending("is cancelled by the server in its view", "never, and it runs on", "never"),
    "cancelled in stream": Ending(
        "is cancelled by the server while it streams", "never, and it runs on", "never"
    ),
}

PROMISES = {
    1: (
        "Lazy",
        "A resource is set up when it is first asked for. A request that asks for none pays for "
        "none: no task, no lock, no thread.",
    ),
    2: (
        "One",
        "Every caller in a scope gets the same object: the view, what it calls, child tasks, sync "
        "code in threads, a streaming body. Asked for by many at once, it is set up once. "
        "Unrelated resources are set up in parallel.",
    ),
    3: (
        "Waiters are innocent",
        "If the task that sets it up is cancelled, a waiting task takes over. If the factory "
        "fails, those who wait get that error, nothing half-open stays behind, and the next call "
        "tries again.",
    ),
    4: (
        "Circles are errors",
        "A resource that needs itself, straight or through others, also across tasks and threads, "
        "raises `CircularResourceError`, which names the circle. It never hangs.",
    ),
    5: (
        "Lifetimes nest",
        "A resource that asks for one that does not live as long raises `LifetimeError`, which "
        "names both, on first use.",
    ),
    6: (
        "Exactly once",
        "What was set up is torn down exactly once, however the request ends: every row of the "
        "table, a request that fails before its view, HEAD, 204 and 304, files, a stream that "
        "nobody reads.",
    ),
    7: (
        "Reverse order",
        "Resources are torn down in the reverse order in which their set-up was complete, so each "
        "before anything that its factory used, sync and async mixed.",
    ),
    8: (
        "All of it",
        "A teardown that fails, is cancelled or hangs does not stop the others, nor does a second "
        "cancellation. The errors come in one group; a cancellation comes bare, after the rest.",
    ),
    9: (
        "Nobody else can stop it",
        "Another receiver of `request_finished` that raises, before ours or after it, changes "
        "nothing.",
    ),
    10: (
        "Same task, same Context",
        "A factory is set up and torn down in one task and one Context, whoever asked first: so "
        "`asyncio.timeout()`, task groups and `ContextVar.reset()` work across its `yield`.",
    ),
    11: (
        "The factory sees the failure",
        "The exception of the view or the stream, or the cancellation, is raised at the `yield`. A "
        "factory that swallows it does not hide it from the others.",
    ),
    12: (
        "Alive to the last byte",
        'A resource lives to the last byte of the response or, with `until="response"`, is torn '
        "down before the first one: after the view and its middleware; a teardown that fails then "
        "turns the response into a 500.",
    ),
    13: (
        "After the end it says so",
        "A task that outlives its request and asks again gets `ScopeClosedError`, which names "
        "resource and request: never a dead object, never a silent second one.",
    ),
    14: (
        "Nothing is kept",
        "A closed scope references no value, request or exception, however many tasks still hold "
        "its Context.",
    ),
    15: (
        "Isolated",
        "A request never sees another's resources: on a connection that is kept alive, in a "
        "request made inside a request, with two handlers in one process.",
    ),
    16: (
        "Lifespan",
        "A lifespan resource is one per event loop, set up in a Context of its own. Shutdown first "
        "lets open requests finish, for a bounded time, and then tears down. A start-up that fails "
        "tells the server so, and closes what was opened.",
    ),
    17: (
        "Sync code",
        "Factories may be sync. A sync generator that is set up in the event loop or in the "
        "request's thread is torn down there. Under WSGI everything sync works; an async resource "
        "raises `AsyncResourceError` there, which says what to do.",
    ),
    18: (
        "A good neighbour",
        "What hooks into Django's handlers works as under Django's own: patches of their methods, "
        "wrapped receivers, monitoring, error pages in the request's thread. The scope knows the "
        "request under every handler that opens one, and a test client serves as the handler that "
        "it stands for.",
    ),
    19: (
        "Who cancels is known",
        "A cancellation by the client or the server ends the request. One that a factory's own "
        "timeout or task group causes is that factory's failure, and so the request's: Django's "
        "500, and `got_request_exception`; in a stream, the failure of the stream. A view that "
        "middleware cancels and answers for has failed, and so has a request whose middleware "
        "raises, whatever page Django makes of that. What middleware returns is success.",
    ),
    20: (
        "One cancellation, then patience",
        "What is ending already is not cancelled again before `TEARDOWN_TIMEOUT` is over.",
    ),
    21: (
        "Every wait has a bound",
        "Nothing between the last byte and the end of the request waits for ever, nor does sync "
        "code for a set-up that needs its thread, nor the end of a server for its requests.",
    ),
    22: (
        "A thread is lent clean",
        "In the thread for its sync code a request finds no transaction, no Context of another "
        "request, and nothing at all of one that was cut off. A thread that ends closes its "
        "database connections.",
    ),
    23: (
        "Nothing of ours is done to another's object that may fail",
        "An exception may refuse a note, an attribute, a traceback: it is raised all the same, and "
        "nothing piles up on one that is raised again and again.",
    ),
    24: (
        "Nobody takes over what another holds",
        "Joining a lifespan, releasing, closing, at any interleaving of tasks and threads: each "
        "value has one taker, by one atomic step; a set-up that succeeds is handed to those who "
        "wait for it; nothing is tried again without bound.",
    ),
    25: (
        "What a client sends is escaped and cut",
        "Path, method and the words in a task's name reach no log line, message or page "
        "otherwise, and no work grows faster than what was sent.",
    ),
    26: (
        "Never silence",
        "What has been declared is kept, or it is said that it cannot be: an `eager` resource that "
        "comes too late, a `release()` in the wrong place, a resource declared upon a resource.",
    ),
}

NUMBERS = re.compile(r"\b[Pp]romises? (\d+(?:(?:, | and | to )\d+)*)")


def declared(text: str | None) -> set[int]:
    """The numbers of the promises that a docstring or comment names."""
    found: set[int] = set()
    for match in NUMBERS.finditer(" ".join((text or "").split())):
        for part in re.split(", | and ", match[1]):
            first, _, last = part.partition(" to ")
            found.update(range(int(first), int(last or first) + 1))
    return found


def comments(source: str) -> list[tuple[int, str]]:
    """The comments that stand over a section: alone between empty lines."""
    lines = ["", *source.splitlines(), ""]
    return [
        (number, line)
        for number, line in enumerate(lines[:-1])
        if line.startswith("# ") and not lines[number - 1] and not lines[number + 1]
    ]


def tests_in(file: Path) -> Iterator[tuple[str, set[int]]]:
    source = file.read_text()
    module = ast.parse(source)
    of_module, over = declared(ast.get_docstring(module)), comments(source)

    def walk(nodes: list[ast.stmt], outer: set[int]) -> Iterator[tuple[str, set[int]]]:
        for node in nodes:
            if isinstance(node, ast.If):  # what a version of Django alone can do
                yield from walk([*node.body, *node.orelse], outer)
            elif isinstance(node, ast.ClassDef):
                yield from walk(node.body, declared(ast.get_docstring(node)) or around(node, outer))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
                node.name.startswith("test_")
            ):
                yield node.name, declared(ast.get_docstring(node)) or around(node, outer)

    def around(node: ast.stmt, outer: set[int]) -> set[int]:
        if node.col_offset:
            return outer
        above = [text for line, text in over if line < node.lineno]
        return (declared(above[-1]) if above else set()) or outer

    yield from walk(module.body, of_module)


@cache
def holders() -> dict[int, dict[str, list[str]]]:
    """By promise, the files with tests that hold it, and those tests."""
    found: dict[int, dict[str, list[str]]] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        name = file.relative_to(ROOT).as_posix()
        for test, promises in tests_in(file):
            for promise in promises:
                found.setdefault(promise, {}).setdefault(name, []).append(test)
    return found


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def page() -> str:
    parts = [
        "# Guarantees",
        "*Written by `python -m tests.guarantees`: do not edit.*",
        "## However the request ends",
        wrapped(
            "Whether an async receiver of `request_finished` is called, and sees what the view has "
            "set up: in a ContextVar under Django's own ASGI handler, as a resource under ours. "
            "*Blind*: it is called, and does not see it. *Never*: it is not called. Under "
            "`scoped.asgi` it is called exactly once in every row, the resource is torn down "
            "exactly once, and ContextVars are seen too, but for those that a child of `gather()` "
            "has set. `tests/docs/test_guarantees.py` has each row happen under both handlers."
        ),
        "\n".join(
            [
                "| The request | Django 5.2, 6.0 | Django 6.1 | `scoped.asgi`, on all three |",
                "|---|---|---|---|",
                *(
                    f"| {row.request} | {row.before_6_1} | {row.django_6_1} | yes |"
                    for row in ENDINGS.values()
                ),
            ]
        ),
        wrapped(
            "The promises follow, each with the tests that hold it. A scope is a request's, unless "
            "it is said otherwise. What servers make of them is in [Under real servers]"
            "(servers.md), what they do not cover in [Limits](limits.md)."
        ),
    ]
    for number, files in sorted(holders().items()):
        name, text = PROMISES[number]
        count = sum(map(len, files.values()))
        parts += [
            f"## {number}. {name}",
            wrapped(text),
            f"<details><summary>{count} {'test' if count == 1 else 'tests'}</summary>",
        ]
        for file, tests in files.items():
            sentences = "; ".join(test.removeprefix("test_").replace("_", " ") for test in tests)
            parts.append(wrapped(f"[{file}](../{file}): {sentences}."))
        parts.append("</details>")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
