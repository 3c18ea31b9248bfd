"""An open page of the demo, without a browser: what its event stream says."""

import json
import re
import socket
import threading
import time
from contextlib import suppress
from functools import cached_property
from typing import Any, Self

import httpx

from tests.processes import Demo, Visitor, eventually
from tests.slowness import within

Row = dict[str, Any]

SILENT = 5  # seconds, as in the page's script


class Page(Visitor):
    """A visitor whose page is open while the ``with`` lasts."""

    def __init__(self, demo: Demo | str) -> None:
        super().__init__(demo)
        self.rows: dict[str, Row] = {}
        self.gauges: dict[str, dict[str, Any]] = {}
        self._heard: dict[str, float] = {}
        self.messages: list[str] = []
        self.score: dict[str, Any] = {}
        self.before = 0.0
        self._connection: socket.socket | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        super().__enter__()
        self._reader.start()
        eventually(lambda: self.gauges)
        self.start_anew()
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._connection is not None
        with suppress(OSError):  # the demo was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        super().__exit__(*exc_info)

    def start_anew(self) -> None:
        """Forget the rows that there are."""
        self.before = time.time()  # by the clock that the demo has, too

    def _read(self) -> None:
        with (
            suppress(httpx.TransportError),  # how it ends
            # Longer than the demo's heartbeat, or an idle page would be taken for a closed one.
            httpx.stream("GET", self.base_url.join("/events"), timeout=60) as response,
        ):
            stream = response.extensions["network_stream"]
            self._connection = stream.get_extra_info("socket")
            event = "message"
            for line in response.iter_lines():
                if name := re.match(r"event: (\w+)", line):
                    event = name[1]
                elif line.startswith("data: "):
                    self._hear(event, json.loads(line.removeprefix("data: ")))
                elif not line:
                    event = "message"

    def _hear(self, event: str, data: dict[str, Any]) -> None:
        if event == "message":
            self.messages.append(data["text"])
            return
        if data.get("gauges"):
            self._heard[data["process"]] = time.monotonic()
            before = self.gauges.get(data["process"], {})
            self.gauges[data["process"]] = before | data["gauges"]  # some come once a second only
        elif "process" in data:
            self.gauges.pop(data["process"], None)  # its last report
        self.score = data.get("score") or self.score
        for row in data["rows"]:
            self.rows[row["id"]] = row

    def new(self, title: str) -> list[Row]:
        """The rows of this title since the page is open, the oldest first."""
        rows = [row for row in list(self.rows.values()) if row["began"] > self.before]
        return sorted(
            (row for row in rows if title in row["title"]), key=lambda row: float(row["began"])
        )

    @cached_property
    def page_text(self) -> str:
        return self.page()

    def ended(self, title: str, number: int = 1, seconds: float = 10) -> list[Row]:
        """Those rows, once so many are there and all have ended."""

        def rows() -> list[Row] | None:
            found = [row for row in self.new(title) if row["title"].endswith(title)]
            done = len(found) == number and all(row["ended"] for row in found)
            return found if done else None

        found: list[Row] = eventually(rows, seconds)
        return found

    def gauge(self, *names: str) -> int:
        """The sum over all processes but those that are silent, and so gone."""
        total = 0
        for process, gauges in list(self.gauges.items()):
            if time.monotonic() - self._heard[process] > within(SILENT):
                continue
            value: Any = gauges
            for name in names:
                value = value[name]
            total += value
        return total

    def settled(self) -> bool:
        """Nothing of ours is open but pages."""
        open_ones = ("scopes",), ("scoped", "in_use"), ("scoped", "waiting")
        return not any(self.gauge(*names) for names in open_ones)


def bars(row: Row) -> dict[str, Row]:
    return {bar["name"]: bar for bar in row["bars"]}
