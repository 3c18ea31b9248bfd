"""docs/guarantees.md: the table is measured, and the page is what the tests say."""

import asyncio
import contextvars

import django
import pytest
from asgiref.sync import async_to_sync
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

from scoped import request_scoped
from scoped.asgi import ScopedASGIHandler
from tests import guarantees
from tests.connection import Connection
from tests.docs.project import its_leaks_ignored, urls

marker = contextvars.ContextVar("marker", default="unset")
log: list[str] = []


@request_scoped
async def db():
    log.append("set up")
    try:
        yield "set"
    finally:
        log.append("torn down")


class Case:
    """One way in which a request ends, under one handler."""

    def __init__(self, how, handler):
        self.how, self.handler = how, handler
        self.is_ours = handler is ScopedASGIHandler
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()
        self.seen: list[str] = []
        self.markers: list[str] = []
        self.ran_on = False

    async def use(self):
        marker.set("set")
        if self.is_ours:
            await db()

    async def hang(self):
        self.reached.set()
        await self.go_on.wait()
        self.ran_on = True

    async def body(self):
        yield "1"
        if self.how == "stream raises":
            raise KeyError
        if self.how != "stream":
            await self.hang()

    async def view(self, request):
        if self.how == "gather":
            await asyncio.gather(self.use(), asyncio.sleep(0))
        else:
            await self.use()
        if self.how == "raises":
            raise ValueError
        if "stream" in self.how:
            return StreamingHttpResponse(self.body())
        if self.how in ("gone", "cancelled"):
            await self.hang()
        return HttpResponse()

    def sync_view(self, request):
        marker.set("set")
        if self.is_ours:
            async_to_sync(db)()
        return HttpResponse()

    async def finished(self, **kwargs):
        self.markers.append(marker.get())
        self.seen.append(db.get_nowait() if self.is_ours else marker.get())

    async def send(self, number, message):
        if self.how == "send raises":
            raise OSError

    async def run(self):
        view = self.sync_view if self.how == "sync" else self.view
        request_finished.connect(self.finished)
        try:
            with urls(path("", view)):
                connection = Connection(self.handler(), "/", before_send=self.send)
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
                self.go_on.set()
                for _ in range(10):
                    await asyncio.sleep(0)
        finally:
            request_finished.disconnect(self.finished)

    @property
    def verdict(self):
        if not self.seen:
            return "never, and it runs on" if self.ran_on else "never"
        return "yes" if self.seen == ["set"] else "blind"


@pytest.mark.parametrize("how", guarantees.ENDINGS)
async def test_a_row_under_djangos_handler(how):
    with its_leaks_ignored():
        case = Case(how, ASGIHandler)
        await case.run()
        row = guarantees.ENDINGS[how]
        assert case.verdict == (row.django_6_1 if django.VERSION >= (6, 1) else row.before_6_1)


@pytest.mark.parametrize("how", guarantees.ENDINGS)
async def test_a_row_under_ours(how):
    log.clear()
    case = Case(how, ScopedASGIHandler)
    await case.run()
    assert case.verdict == "yes"
    assert case.markers == ["unset" if how == "gather" else "set"]
    assert log.count("set up") == log.count("torn down") == 1


def test_the_page_is_up_to_date():
    written = guarantees.PAGE.read_text()
    assert written == guarantees.page(), "run `python -m tests.guarantees`"


def test_every_promise_is_held_and_every_number_is_one():
    assert set(guarantees.holders()) == set(guarantees.PROMISES)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Promise 3.", {3}),
        ("Promises 1 to 5 and 17: what happens", {1, 2, 3, 4, 5, 17}),
        ("Promises 2, 3, 4, 6\nand 7 for sync resources", {2, 3, 4, 6, 7}),
        ("Promise 2, traps 10 and 12.", {2}),
        ("Trap 26, promise 16: lifespan", {16}),
        ("Nothing", set()),
        (None, set()),
    ],
)
def test_what_a_docstring_declares(text, numbers):
    assert guarantees.declared(text) == numbers


def test_which_declaration_counts(tmp_path):
    file = tmp_path / "test_x.py"
    file.write_text(
        '"""Promise 1."""\n\n\n'
        "def test_by_module(): ...\n\n\n"
        'class TestX:\n    """Promise 2."""\n\n    def test_by_class(self): ...\n\n'
        '    def test_by_itself(self):\n        """Promise 3."""\n\n\n'
        "# Promise 4: a section\n\n\n"
        "# no section\ndef test_by_section(): ...\n\n\n"
        "# Another\n\n\n"
        "if True:\n\n    async def test_by_module_again(): ...\n"
    )
    assert list(guarantees.tests_in(file)) == [
        ("test_by_module", {1}),
        ("test_by_class", {2}),
        ("test_by_itself", {3}),
        ("test_by_section", {4}),
        ("test_by_module_again", {1}),
    ]
