"""Promise 25: what a client sends stands in no log line or message but escaped, and cut."""

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory, override_settings
from django.urls import re_path

from scoped import current_scope, request_scope, request_scoped, spawn
from scoped.asgi import ScopedASGIHandler
from scoped.core.names import few, printable, printable_repr
from scoped.wsgi import ScopedWSGIHandler
from tests.connection import Connection

FORGED = "/x\r\nCRITICAL auth root has logged in\x1b[2J\x9b2J\u202e\u2028\udc80/"
ESCAPED = r"/x\r\nCRITICAL auth root has logged in\x1b[2J\x9b2J\u202e\u2028\udc80/"


@request_scoped
async def fragile() -> AsyncIterator[None]:
    yield
    raise OSError("broken")


@request_scoped
def fragile_sync() -> Iterator[None]:
    yield
    raise OSError("broken")


async def view(request: HttpRequest) -> HttpResponse:
    await fragile()
    return HttpResponse(str(current_scope()))


def sync_view(request: HttpRequest) -> HttpResponse:
    fragile_sync()
    return HttpResponse(str(current_scope()))


urlpatterns = [re_path("sync", sync_view), re_path("", view)]


@pytest.fixture(autouse=True)
def _urls() -> Iterator[None]:
    with override_settings(ROOT_URLCONF=__name__):
        yield


class TestPrintable:
    def test_what_can_be_printed_is_left_as_it_is(self) -> None:
        for text in ("", "/café/%20?", "C:\\new", "/日本語/😀"):
            assert printable(text) == text

    def test_no_character_is_left_that_cannot_be_printed_or_encoded(self) -> None:
        numbers = [*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10000), 0xE0001]
        shown = printable("".join(map(chr, numbers)), limit=1_000_000)
        assert shown.isprintable()
        assert "é" in shown.encode().decode()
        assert r"\n" in shown

    def test_what_is_shown_once_may_be_shown_again(self) -> None:
        assert printable(printable(FORGED)) == printable(FORGED) == ESCAPED

    @pytest.mark.parametrize("character", ["x", "\n", "\U000e0001"])
    def test_what_is_long_is_cut_and_said_to_be(self, character: str) -> None:
        shown = printable(60_000 * character, limit=25)
        begin, _, end = shown.partition("... ")
        assert 0 < len(begin) <= 25
        assert end == "(60000 characters)"
        assert len(begin) % len(printable(character)) == 0  # no half of an escape

    def test_what_becomes_long_by_its_escapes_is_cut_too(self) -> None:
        assert printable(10 * "\n", limit=10) == 5 * r"\n" + "... (10 characters)"
        assert printable(5 * "\n", limit=10) == 5 * r"\n"

    def test_a_repr_that_fails_is_done_without(self) -> None:
        class OddError(Exception):
            def __repr__(self) -> str:
                raise self

        assert printable_repr(OddError()) == "<OddError object, whose repr() fails>"
        assert printable_repr(["a\n"]) == r"['a\n']"


def test_of_many_names_ten_are_shown_and_the_others_counted() -> None:
    assert few([]) == ""
    assert few(list(range(10))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert few(dict.fromkeys(range(1000))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 990 more"


def the_record(caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    [record] = [record for record in caplog.records if record.name == "scoped"]
    return record


async def test_a_path_forges_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    connection = Connection(ScopedASGIHandler(), FORGED)
    await connection.run()
    assert connection.body.decode() == f"the request GET {ESCAPED}"
    assert f"resource(s) of the request GET {ESCAPED} failed" in the_record(caplog).getMessage()
    # Nor does the traceback, which has the message too: each of its lines is Python's own.
    for line in logging.Formatter().format(the_record(caplog)).splitlines():
        assert not line.startswith("CRITICAL")


async def test_nor_does_a_method(caplog: pytest.LogCaptureFixture) -> None:
    connection = Connection(ScopedASGIHandler(), method="GET\n\x1b[2J")
    await connection.run()
    assert r"the request GET\n\x1b[2J / failed" in the_record(caplog).getMessage()


@pytest.mark.parametrize("handler", [ScopedWSGIHandler, WSGIHandler])
def test_nor_under_wsgi(caplog: pytest.LogCaptureFixture, handler: type[WSGIHandler]) -> None:
    environ = RequestFactory().get("/").environ
    environ |= {"REQUEST_METHOD": "GET\n", "PATH_INFO": "/sync\nCRITICAL \xc3\xa9 \xff"}
    response = handler()(environ, lambda *_: None)
    body = b"".join(response)
    response.close()
    name = r"the request GET\n /sync\nCRITICAL é \xff"
    assert body.decode() == name
    assert f"resource(s) of {name} failed" in the_record(caplog).getMessage()


async def test_a_long_path_makes_no_long_message(caplog: pytest.LogCaptureFixture) -> None:
    await Connection(ScopedASGIHandler(), "/" + 60_000 * "\n").run()
    message = the_record(caplog).getMessage()
    assert "... (60017 characters) failed" in message
    assert len(message) < 500


async def test_nor_does_the_name_of_a_background_task_forge_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    names: list[str] = []

    async def work() -> None:
        names.append(str(current_scope()))
        raise OSError("broken")

    async with request_scope():
        task = spawn(work(), name=f"mail to {FORGED}")
        await task
        named_like_a_path = spawn(work(), name=60_000 * "x")
        await named_like_a_path
    assert names[0] == f"the background task mail to {ESCAPED}"
    assert task.get_name() == f"mail to {ESCAPED}"
    first, second = [record for record in caplog.records if record.name == "scoped"]
    assert first.getMessage() == f"The background task mail to {ESCAPED} failed: OSError('broken')"
    assert len(second.getMessage()) < 500


async def test_an_error_that_cannot_say_what_it_is_is_logged_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class SilentError(Exception):
        def __repr__(self) -> str:
            raise ValueError

    async def work() -> None:
        raise SilentError

    await spawn(work(), name="the mail")
    message = "The background task the mail failed: <SilentError object, whose repr() fails>"
    assert the_record(caplog).getMessage() == message
