"""
The page's buttons: what each is called, and the code that it runs, with the line that decides
what becomes of the connection. A button promises no outcome: that is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import django

from demo import endings, mishaps, resources, stock
from demo.stage.code import Listing

BLIND = django.VERSION < (6, 1)  # request_finished, then, never sees what a view has set


@dataclass(frozen=True, eq=False)
class Ending:
    """A way in which a request ends."""

    name: str
    label: str
    view: Callable[..., Any]
    scoped: Listing
    stock: Listing | None = None  # None: there is no counterpart
    leaves: bool = False  # whoever has asked goes away before the answer
    is_in_runs: bool = True

    @property
    def code(self) -> Listing:
        return Listing(self.view)


def _scoped(why: str = "given back after the last byte, whatever happens") -> Listing:
    return Listing(resources.db, marks={"@request_scoped": "", "yield connection": why})


def _stock(on_61: str = "") -> Listing:
    blind = "held is empty here: the view has set it in a Context of its own"
    why = blind if BLIND and on_61 != NEVER else on_61
    if why == NEVER:
        marks = {"request_finished.connect": NEVER}
    elif why:
        marks = {"(connection := held.get())": why}
    else:
        marks = {"release(connection)": "called, and held is set: given back"}
    return Listing(stock.db, stock.give_back, lines=[CONNECT], marks=marks)


NEVER = "request_finished is never sent when a request ends like this"
CONNECT = "request_finished.connect(give_back, sender=ASGIHandler)"
CHILDREN = "held is empty here: each task has set it in a Context of its own"

ENDINGS = [
    Ending("fine", "answers", endings.fine, _scoped(), _stock()),
    Ending("sync", "in a thread", endings.sync, _scoped(), _stock()),
    Ending("stream", "streams", endings.stream, _scoped(), _stock()),
    Ending("missing", "404", endings.missing, _scoped(), _stock()),
    Ending("raises", "raises", endings.raises, _scoped(), _stock()),
    Ending("leave", "client leaves", endings.leave, _scoped(), _stock(), leaves=True),
    Ending("broken-stream", "stream raises", endings.broken_stream, _scoped(), _stock(NEVER)),
    Ending(
        "children",
        "asks from 10 tasks",
        endings.children,
        _scoped("one for all ten, whichever asks first"),
        _stock(CHILDREN),
    ),
    Ending(
        "shutdown", "server restarts", endings.shutdown, _scoped(), _stock(NEVER), is_in_runs=False
    ),
    Ending(
        "commit",
        "COMMIT fails",
        endings.commit,
        Listing(
            resources.transaction,
            marks={'until="response"': "before the first byte: the client hears of it"},
        ),
    ),
    Ending(
        "background",
        "background task",
        endings.background,
        Listing(endings.count_likes, marks={"scoped_db()": "its own, until the task ends"}),
    ),
    Ending(
        "release",
        "gives back early",
        endings.release,
        Listing(resources.db, marks={"yield connection": "given back by release()"}),
    ),
    Ending(
        "long-stream",
        "streams for long",
        endings.long_stream,
        Listing(resources.db, marks={"yield connection": "held all the while: the log says so"}),
    ),
    Ending(
        "turns",
        "takes turns",
        endings.turns,
        Listing(resources.turn, marks={"lock(": "waits here: click twice"}),
    ),
    Ending(
        "setup-fails",
        "set-up raises",
        endings.setup_fails,
        Listing(mishaps.refused, marks={"raise ": "and what it has asked for is given back"}),
    ),
    Ending(
        "teardown-raises",
        "teardown raises",
        endings.teardown_raises,
        Listing(mishaps.careless, marks={"raise ": "is logged, and the rest is torn down"}),
    ),
    Ending(
        "teardown-hangs",
        "teardown hangs",
        endings.teardown_hangs,
        Listing(mishaps.stuck, marks={"sleep(3600)": "cancelled, and the rest is torn down"}),
    ),
]
PAIRS = [ending for ending in ENDINGS if ending.stock is not None]
ALONE = [ending for ending in ENDINGS if ending.stock is None]
