"""What the page says of each view in endings.py, with scoped and with stock Django."""

from dataclasses import dataclass

import django


@dataclass(frozen=True)
class Ending:
    """A button of the page."""

    name: str
    label: str
    here: str  # what becomes of it with scoped
    has_counterpart: bool = True


ENDINGS = [
    Ending("fine", "Fine", "200"),
    Ending("sync", "Sync view", "200, in a thread"),
    Ending("children", "Ten children", "200, one set-up"),
    Ending("stream", "Stream", "200, held to its end"),
    Ending("missing", "Not found", "404"),
    Ending("raises", "View raises", "500"),
    Ending("broken-stream", "Stream raises", "breaks off"),
    Ending("leave", "Client leaves", "cancelled"),
    Ending("commit", "COMMIT fails", "500, no row", has_counterpart=False),
    Ending("background", "Background", "202, then works on", has_counterpart=False),
]

# Those after which stock.py's connection is lost, on the Django that runs.
LOST = {"children", "broken-stream"}
if django.VERSION < (6, 1):
    LOST |= {"fine", "sync", "raises", "missing", "stream", "leave"}

# How a request may end, and whether request_finished then sees what the view has set.
SEES, BLIND, NEVER = "sees it", "is called, but does not see it", "is never called"
SINCE_6_1 = SEES if django.VERSION >= (6, 1) else BLIND
LOSSES = [
    ("a view, sync or async, also one that raises", SINCE_6_1),
    ("a stream, to its end", SINCE_6_1),
    ("the client goes away", SINCE_6_1),
    ("child tasks that open the connection", BLIND),
    ("a stream that raises", NEVER),
    ("a client whose connection broke", NEVER),
    ("the server shuts down", NEVER),
]
