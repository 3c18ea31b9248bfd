"""
``python -m tests.why`` writes this Django's column into the table of ``docs/why.md``: what
becomes of a resource, ending by ending, under the page's rival and under scoped.
"""

import asyncio
import importlib
import logging
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import django

from tests import pages

PAGE = pages.DOCS / "why.md"
RIVAL = "The rival"
ROWS = {
    "async": "is answered by an async view",
    "sync": "is answered by a sync view, which uses it through `async_to_sync`",
    "stream": "streams to its end",
    "raises": "fails in its view",
    "404": "raises `Http404`",
    "stream raises": "fails in its streaming body",
    "gone": "loses its client while the view runs",
    "gone in stream": "loses its client while it streams",
    "cancelled": "is cancelled by the server in its view",
    "cancelled in stream": "is cancelled by the server while it streams",
    "gather": "first uses it in children of `gather()`",
    "child": "first uses it in a child task",
    "commit": "succeeds, and the COMMIT fails",
    "stray": "leaves a task behind that asks again",
}
FAILS = ["raises", "404", "stream raises", "gone", "gone in stream"]
FAILS += ["cancelled", "cancelled in stream"]
RIGHT = "right"


class Value:
    is_open = True


class Case:
    """One request. ``is_ours``: served by scoped, else by the rival around Django's handler."""

    def __init__(self, how: str, rival: ModuleType, *, is_ours: bool) -> None:
        from django.core.handlers.asgi import ASGIHandler

        from scoped import request_scoped
        from scoped.asgi import ScopedASGIHandler

        self.how, self.log = how, list[str]()
        self.application: Any
        self.use: Callable[[], Any]
        if is_ours:
            declare = request_scoped(until="response") if how == "commit" else request_scoped
            self.application, self.use = ScopedASGIHandler(), declare(self.factory)
        else:
            make = self.make

            async def use() -> Any:
                return await rival.get(make)

            self.application, self.use = rival.request_scopes(ASGIHandler()), use
        self.reached, self.go_on, self.over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.tasks: list[asyncio.Task[Any]] = []

    async def factory(self) -> AsyncGenerator[Value, None]:
        async with self.make() as value:
            yield value

    @asynccontextmanager
    async def make(self) -> AsyncGenerator[Value, None]:
        await asyncio.sleep(0)  # as to connect takes a moment
        self.log.append("set up")
        value, task = Value(), asyncio.current_task()
        try:
            yield value
        except BaseException:
            self.log.append("told of failure")
            raise
        else:
            self.log.append("told of success")
            if self.how == "commit":
                raise ValueError("the COMMIT")
        finally:
            value.is_open = False
            if asyncio.current_task() is not task:
                self.log.append("in another task")
            self.log.append("torn down")

    async def view(self, request: Any) -> Any:
        from django.http import Http404, HttpResponse, StreamingHttpResponse

        if self.how == "gather":
            await asyncio.gather(self.use(), self.use())
        elif self.how == "child":
            await asyncio.create_task(self.use())
        else:
            await self.use()
        if self.how == "raises":
            raise ValueError
        if self.how == "404":
            raise Http404
        if self.how == "stray":
            self.tasks.append(asyncio.create_task(self.ask_again()))
        if "stream" in self.how:
            return StreamingHttpResponse(self.body())
        if self.how in ("gone", "cancelled"):
            await self.hang()
        return HttpResponse()

    def sync_view(self, request: Any) -> Any:
        from asgiref.sync import async_to_sync
        from django.http import HttpResponse

        async_to_sync(self.use)()
        return HttpResponse()

    async def hang(self) -> None:
        self.reached.set()
        try:
            await self.go_on.wait()
        finally:
            self.log.append("view ends")

    async def body(self) -> AsyncGenerator[str, None]:
        yield "1"
        if self.how == "stream raises":
            raise ValueError
        if self.how != "stream":
            await self.hang()

    async def ask_again(self) -> None:
        from scoped import ScopeClosedError

        await self.over.wait()
        try:
            self.log.append("alive" if (await self.use()).is_open else "dead")
        except ScopeClosedError:
            self.log.append("refused")

    async def run(self) -> str:
        from tests.connection import Connection

        connection = Connection(self.application)
        task = connection.start()
        if self.how.startswith(("gone", "cancelled")):
            await self.reached.wait()
            if self.how.startswith("gone"):
                connection.disconnect()
            else:
                task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        self.over.set()
        self.go_on.set()
        await asyncio.gather(*self.tasks)
        async with asyncio.timeout(20):
            while self.reached.is_set() and "view ends" not in self.log:
                await asyncio.sleep(0)
        for _ in range(10):  # what Django has left behind ends by itself
            await asyncio.sleep(0)
        return self.verdict(connection.status if connection.sent else None)

    def verdict(self, status: int | None) -> str:
        log, found = self.log, []
        if log.count("set up") > 1:
            found.append("set up twice")
        if log.count("torn down") < log.count("set up"):
            found.append("never torn down")
        if self.how in FAILS and "told of success" in log:
            found.append("told of success")
        if "view ends" in log and log.index("torn down") < log.index("view ends"):
            found.append("torn down while the view runs on")
        if "in another task" in log:
            found.append("torn down in another task")
        if self.how == "commit" and status != 500:
            found.append(f"the client is told {status}")
        if self.how == "stray" and "refused" not in log:
            found.append("it gets a dead one")
        return ", ".join(found) or RIGHT


async def verdict(how: str, rival: ModuleType, *, is_ours: bool) -> str:
    from django.urls import path

    from tests.docs.project import its_leaks_ignored, urls

    with its_leaks_ignored():
        case = Case(how, rival, is_ours=is_ours)
        with urls(path("", case.sync_view if how == "sync" else case.view)):
            return await case.run()


# The page

COLUMN = 1 if django.VERSION < (6, 1) else 2


def table() -> dict[str, list[str]]:
    """The page's rows: cells by how the request ends."""
    texts = {text: how for how, text in ROWS.items()}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    ]
    return {texts[row[0]]: row for row in rows if row[0] in texts}


async def write(rival: ModuleType) -> None:
    before, lines = table(), []
    for how, text in ROWS.items():
        row = before.get(how, [text, "", "", ""])
        row[COLUMN] = await verdict(how, rival, is_ours=False)
        row[3] = await verdict(how, rival, is_ours=True)
        lines.append(f"| {' | '.join(row)} |\n")
    head, rest = PAGE.read_text().split("|---|---|---|---|\n", 1)
    after = rest.splitlines(keepends=True)
    while after and after[0].startswith("|"):
        del after[0]
    PAGE.write_text(f"{head}|---|---|---|---|\n{''.join(lines)}{''.join(after)}")


def main() -> None:
    from django.conf import settings

    settings.configure(SECRET_KEY="why", ALLOWED_HOSTS=["*"], INSTALLED_APPS=["scoped"])
    django.setup()
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rival.py").write_text(pages.files(PAGE, RIVAL)["rival.py"])
        sys.path.insert(0, folder)
        asyncio.run(write(importlib.import_module("rival")))


if __name__ == "__main__":
    sys.exit(main())
