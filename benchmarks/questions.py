"""The questions about scopes, and how to put them to a contender; and those about requests."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.contenders import Contender

__all__ = ["REQUESTS", "WORKS", "Request", "Work"]


@dataclass(frozen=True, slots=True)
class Work:
    """A question about scopes, and how to put it."""

    key: str
    title: str
    kind: str  # of work, as check() names it
    unit: str
    goal: float  # at most; of time as of instructions
    n: int  # for a figure in seconds
    counted: int  # for one in instructions
    do: Callable[[Contender], Callable[[int], Awaitable[object]]]
    text: str = ""


WORKS = [
    Work(
        *("cached", "Cached access", "cached", "hand-written", 1.12, 50_000, 20_000),
        lambda contender: contender.cached,  # type: ignore[arg-type,return-value]
        "`await db()`, for the second time and later in a scope.",
    ),
    Work(
        *("one", "A scope with one async generator", "one", "AsyncExitStack", 1.15, 2_000, 1_000),
        lambda contender: contender.one,
        "From opening the scope to having closed it.",
    ),
    Work(
        *("chain-10", "A chain of 5, each used 10 times", "chain", "AsyncExitStack", 1.6, 300, 200),
        lambda contender: lambda n: contender.chain(n, 10),
        "From opening the scope to having closed it, with 50 uses in between.",
    ),
    Work(
        *("chain-1", "A chain of 5, each used once", "chain", "AsyncExitStack", 1.15, 500, 200),
        lambda contender: lambda n: contender.chain(n, 1),
    ),
    Work(
        *("empty", "An empty scope", "empty", "AsyncExitStack", 1.35, 5_000, 1_000),
        lambda contender: contender.empty,
        "What a scope costs in which nothing is used.",
    ),
]


_ALL = ("stock", "scoped", "FastAPI", "Litestar")


@dataclass(frozen=True, slots=True)
class Request:
    """A question about requests, in process, and who answers it."""

    key: str
    title: str
    path: str
    unit: str
    goal: float  # at least: requests in the time, or the instructions, of one of the unit's
    kind: str = ""  # of Django project: see project.make()
    applications: tuple[str, ...] = ("stock", "scoped")
    counted: int = 300  # for a figure in instructions
    text: str = ""


_RECEIVER = "The project has a sync receiver of its own, which must run in the request's thread."

REQUESTS = [
    Request("request", "nothing used", "/", "stock", 7, applications=_ALL),
    Request("request-one", "one resource used", "/one", "FastAPI", 1.05, applications=_ALL),
    Request("request-sync", "a sync view", "/sync", "stock", 2.2),
    Request(
        *("request-middleware", "the usual middleware", "/", "stock", 1.4, "middleware"),
        text="The seven that `startproject` lists; sessions are in a cookie, and not used.",
    ),
    Request(
        *("request-started", "a sync receiver of request_started", "/one", "stock", 2.0),
        *("request_started",),
        text=f"{_RECEIVER} One resource is used.",
    ),
    Request(
        *("request-finished", "a sync receiver of request_finished", "/one", "stock", 2.3),
        *("request_finished",),
        text=f"{_RECEIVER} One resource is used.",
    ),
    Request("request-wsgi", "a sync view under WSGI", "/sync", "stock", 0.97, "wsgi"),
]
