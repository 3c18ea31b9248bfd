"""
What becomes of each request: a row, with a bar for each thing that it holds.

``Recorder``, around the application, sees a request come, its bytes go, and how it ends. The
signals of scoped tell of its resources; stock Django's pool, in pools.py, of its connections.
reports.py tells the pages. A row is told as a whole, so who misses one catches up with the next.
"""

import logging
import os
import re
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from django.core.signals import got_request_exception
from django.dispatch import receiver

from scoped import OpenScope
from scoped.core.resource import Lifetime, Resource
from scoped.core.scope import Scope
from scoped.signals import resource_set_up, resource_torn_down, scope_closed, scope_opened

# With a word of its own: a container has its host's name and pid anew after each restart.
PROCESS = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
UNSEEN = ("/health", "/static/")
LONGEST = 200  # characters of what a client or an error says

_numbers = count(1)


@dataclass
class Bar:
    """A resource, from the moment in which it is asked for to the end of its teardown."""

    name: str
    asked_by: str | None
    began: float
    ready: float | None = None  # None: it waits, or its set-up has failed
    closing: float | None = None
    ended: float | None = None
    taken: float | None = None  # lost, and then taken back by a reset
    error: str = ""

    @property
    def is_open(self) -> bool:
        return self.ended is None and self.taken is None


@dataclass
class Row:
    """A request, or a background task."""

    kind: str  # "scoped", "stock" or "background"
    title: str
    pair: str = ""  # those of one click have it in common
    run: str = ""  # of many requests: it is counted there, and not shown
    id: str = field(default_factory=lambda: f"{PROCESS}/{next(_numbers)}")
    process: str = PROCESS
    began: float = field(default_factory=time.time)
    first_byte: float | None = None
    last_byte: float | None = None
    status: int | None = None
    ended: float | None = None
    ending: str | None = None
    error: str = ""
    found_none: bool = False  # no connection was left
    bars: list[Bar] = field(default_factory=list)
    has_scope: bool = False
    client_gone: bool = False

    def __post_init__(self) -> None:
        _unfinished[self.id] = self
        self.change()
        if self.run in _runs:
            _runs[self.run].append(self)

    def bar(self, name: str, asked_by: str | None = None, began: float | None = None) -> Bar:
        """The one that waits, or a new one."""
        for bar in self.bars:
            if bar.name == name and bar.ready is None and bar.is_open and began is None:
                return bar
        bar = Bar(name, asked_by, time.time() if began is None else began)
        self.bars.append(bar)
        self.change()
        return bar

    def end(self, ending: str) -> None:
        self.ended, self.ending = time.time(), ending
        if self.kind != "stock":  # whose child tasks may go on waiting
            # What was seen to wait, and got no word, was a moment's mistake.
            self.bars = [bar for bar in self.bars if bar.ready is not None or bar.ended is not None]
        self.change()

    @property
    def held(self) -> set[str]:
        """The names of what is set up."""
        return {bar.name for bar in self.bars if bar.ready is not None and bar.is_open}

    def change(self) -> None:
        if not self.run:
            _changed[self.id] = self

    @property
    def lost(self) -> int:
        """How much of it is still held, though its request is over."""
        if self.ended is None:
            return 0
        return sum(bar.is_open and bar.ready is not None for bar in self.bars)


_changed: dict[str, Row] = {}  # since the pages were last told
_unfinished: dict[str, Row] = {}
_leaky: "deque[Row]" = deque(maxlen=200)  # ended with something open: a pool has ten
_runs: dict[str, list[Row]] = {}
_of_scope: WeakKeyDictionary[Scope, Row] = WeakKeyDictionary()

# The row of the request at hand.
current: ContextVar[Row | None] = ContextVar("demo.timeline.current", default=None)


def changed() -> list[Row]:
    """What the pages have not been told yet, and what is not over: it grows."""
    shown = (row for row in _unfinished.values() if not row.run)
    rows = list(({row.id: row for row in shown} | _changed).values())
    _changed.clear()
    return rows


def is_news() -> bool:
    return bool(_changed)


def lost(kind: str) -> list[Row]:
    """The rows of that side that hold something and are over, the oldest first."""
    return [row for row in _leaky if row.kind == kind and row.lost]


@contextmanager
def counted(run: str) -> Iterator[list[Row]]:
    """The rows of a run of many requests, which come while the ``with`` lasts."""
    _runs[run] = rows = []
    try:
        yield rows
    finally:
        del _runs[run]


# What the server sees


class Recorder:
    """An ASGI application around another."""

    def __init__(self, application: Any) -> None:
        self.application = application

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"].startswith(UNSEEN):
            await self.application(scope, receive, send)
            return
        kind = "stock" if scope["path"].startswith("/stock/") else "scoped"
        title = cut(f"{scope['method']} {scope['path']}", 80)
        row = Row(kind, title, _word(scope, b"x-pair"), _word(scope, b"x-run"))

        async def heard() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect" and row.last_byte is None:
                row.client_gone = True
            return message

        async def sent(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                row.status, row.first_byte = message["status"], time.time()
                row.change()
            elif not message.get("more_body", False):
                row.last_byte = time.time()
                row.change()

        token = current.set(row)
        ending = "shut down"
        try:
            await self.application(scope, heard, sent)
            ending = _ending(row)
        except Exception as error:
            row.error = row.error or words(error)
            ending = _ending(row)
            raise
        finally:
            current.reset(token)
            row.end(ending)
            _unfinished.pop(row.id, None)
            if any(bar.is_open for bar in row.bars):
                _leaky.append(row)


def _ending(row: Row) -> str:
    if row.last_byte is None:
        return "client gone" if row.client_gone else "broke off"
    if row.status is not None and row.status >= 400:
        return "failed" if row.status >= 500 else "refused"
    return "fine"


def _word(scope: dict[str, Any], name: bytes) -> str:
    """A header that the page's script sends: letters and digits, and not many."""
    value = dict(scope["headers"]).get(name, b"").decode("latin-1")
    return value if re.fullmatch(r"[\w-]{1,40}", value, re.ASCII) else ""


@receiver(got_request_exception)
def _failed(sender: object, **kwargs: Any) -> None:
    error = sys.exception()
    if (row := current.get()) is not None and error is not None:
        row.error = words(error)
        row.found_none = found_none(error)
        row.change()


class LongStreams(logging.Handler):
    """What ``LONG_STREAM`` has scoped log of a stream is said in its row too."""

    def emit(self, record: logging.LogRecord) -> None:
        row = current.get()
        if row is not None and not row.error and "has been streaming" in str(record.msg):
            row.error = f"{', '.join(sorted(row.held))} held by a stream that does not need it"
            row.change()


def words(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    if isinstance(error, BaseExceptionGroup):
        return cut("; ".join(map(words, error.exceptions)))
    if found_none(error):
        return "no connection was left, after a second of waiting"
    text = re.sub(r" \(/[^)]*\)", "", str(error))  # without where a resource is declared
    return cut(" ".join(text.split()) or type(error).__name__)


def found_none(error: BaseException) -> bool:
    """Whether it is that of a pool that had no connection left: a timeout of few words."""
    return isinstance(error, TimeoutError) and not str(error)


def cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


# What scoped sees. The receivers are called at once, in the request's task or thread.


@receiver(scope_opened)
def _opened(scope: Scope, **kwargs: Any) -> None:
    if scope.lifetime is not Lifetime.REQUEST:
        return
    row = current.get()
    if row is None:
        return
    if row.has_scope:  # it has its request's Context, and is a scope of its own
        row = Row("background", cut(str(scope).removeprefix("the "), 80), row.pair, row.run)
    row.has_scope = True
    _of_scope[scope] = row


@receiver(scope_closed)
def _closed(scope: Scope, error: BaseException | None, **kwargs: Any) -> None:
    row = _of_scope.get(scope)
    if row is not None and row.kind == "background":
        row.end("fine" if error is None else "failed")
        _unfinished.pop(row.id, None)


@receiver(resource_set_up)
def _set_up(
    resource: Resource[Any],
    scope: Scope,
    seconds: float,
    error: BaseException | None,
    asked_by: Resource[Any] | None,
    **kwargs: Any,
) -> None:
    if (row := _of_scope.get(scope)) is None:
        return
    now = time.time()
    bar = row.bar(_name(resource), None if asked_by is None else _name(asked_by))
    bar.began, bar.asked_by = now - seconds, None if asked_by is None else _name(asked_by)
    if error is None:
        bar.ready = now
    else:
        bar.ended, bar.error = now, words(error)


@receiver(resource_torn_down)
def _torn_down(
    resource: Resource[Any],
    scope: Scope,
    seconds: float,
    error: BaseException | None,
    **kwargs: Any,
) -> None:
    if (row := _of_scope.get(scope)) is None:
        return
    name = _name(resource)
    bar = next(bar for bar in row.bars if bar.name == name and bar.is_open)
    bar.ended = time.time()
    bar.closing = bar.ended - seconds
    # A failure that was thrown in, and came out again, is the request's and not the teardown's.
    if error is not None and not row.error:
        bar.error = words(error)
    row.change()


def _name(resource: Resource[Any]) -> str:
    return resource.factory.name.rpartition(".")[2]


def note_waits(scopes: list[OpenScope]) -> None:
    """
    What waits for its set-up right now becomes a bar: the signal comes when it is over. A scope's
    row has its title, and holds what it holds.
    """
    rows = [row for row in _unfinished.values() if row.has_scope]
    for scope in scopes:
        held = {name.rpartition(".")[2] for name in scope.resources}
        for row in rows if scope.being_set_up else []:
            if scope.name.endswith(row.title) and row.held == held:
                rows.remove(row)
                for name in scope.being_set_up:
                    row.bar(name.rpartition(".")[2])
                break
