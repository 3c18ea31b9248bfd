"""``inspect()``: what is open, found without looking through all there is."""

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from weakref import ref

import pytest

from scoped import inspect, request_scope, request_scoped
from scoped.core import inspect as inspecting
from scoped.core import noted
from scoped.core.request import RequestScope
from tests.processes import ROOT


@pytest.fixture
def never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which ``inspect()`` was never called."""
    monkeypatch.setattr(noted, "scopes", None)
    monkeypatch.setattr(inspecting, "_all_are_noted", False)


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads change places as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def named(name: str) -> RequestScope:
    scope = request_scope()
    scope.name = name
    return scope


def names() -> list[str]:
    return [one.name for one in inspect()]


@pytest.mark.usefixtures("never_called")
def test_what_was_open_before_the_first_call_is_found_in_all_threads() -> None:
    opened, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with named("in a thread"):
            opened.set()
            go_on.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    assert opened.wait(30)
    with named("here"):
        assert noted.scopes is None
        assert names()[-2:] == ["in a thread", "here"]
    go_on.set()
    thread.join()
    assert not {"in a thread", "here"} & set(names())


@pytest.mark.usefixtures("never_called")
def test_the_second_call_does_not_look_through_all_objects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inspect()
    monkeypatch.setattr(gc, "get_objects", None)
    with named("opened since"):
        assert "opened since" in names()
    assert "opened since" not in names()


PROGRAM = """
import asyncio
from django.conf import settings
settings.configure(ROOT_URLCONF=__name__, INSTALLED_APPS=["scoped"], ALLOWED_HOSTS=["*"])
import django; django.setup()
from django.http import HttpResponse
from django.urls import path
from scoped import inspect, request_scoped
from scoped.core import noted
from scoped.testing import AsyncClient

@request_scoped
async def db():
    yield 1

async def view(request):
    return HttpResponse(str(await db()))

urlpatterns = [path("", view)]

async def main():
    client = AsyncClient()
    assert (await client.get("/")).content == b"1"
    assert noted.scopes is None
    inspect()
    assert (await client.get("/")).content == b"1"
    assert noted.scopes is not None

asyncio.run(main())
"""


def test_no_scope_is_noted_in_a_process_that_nobody_inspects() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=ROOT)


def test_a_scope_is_not_kept_because_it_is_noted() -> None:
    names()
    scope = named("of the past")
    with scope:
        assert "of the past" in names()
    seen = ref(scope)
    assert noted.scopes is not None
    assert any(one() is scope for one in noted.scopes)
    del scope
    gc.collect()
    assert seen() is None
    assert not any(one() is None for one in noted.scopes.copy())


@pytest.mark.usefixtures("never_called", "hurried")
def test_it_is_right_while_scopes_open_in_other_threads() -> None:
    stop = threading.Event()

    def open_and_close() -> None:
        while not stop.is_set():
            with named("beside it"):
                pass

    threads = [threading.Thread(target=open_and_close) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        with named("here"):
            for _ in range(300):
                found = inspect()
                assert [one.name for one in found].count("here") == 1
                # A scope in the middle of its opening would seem to be as old as the machine.
                assert all(one.seconds < 60 for one in found if one.name == "beside it")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.usefixtures("hurried")
def test_the_first_call_misses_none_that_opens_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(30):
        monkeypatch.setattr(noted, "scopes", None)
        monkeypatch.setattr(inspecting, "_all_are_noted", False)
        start, go_on = threading.Barrier(9), threading.Event()
        opened = threading.Semaphore(0)

        def work(start: threading.Barrier = start, go_on: threading.Event = go_on) -> None:
            start.wait(30)
            with named("meanwhile"):
                opened.release()  # noqa: B023 (joined before the next)
                go_on.wait(30)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        start.wait(30)
        inspect()
        for _ in threads:
            assert opened.acquire(timeout=30)
        found = names().count("meanwhile")
        go_on.set()
        for thread in threads:
            thread.join()
        assert found == 8


@pytest.mark.usefixtures("never_called")
def test_a_scope_that_another_thread_is_just_making_is_no_error() -> None:
    unfinished = RequestScope.__new__(RequestScope)  # its __init__ is yet to run
    assert "unfinished" not in names()
    unfinished.__init__("unfinished")  # type: ignore[misc]
    with unfinished:
        assert "unfinished" in names()


@pytest.mark.usefixtures("never_called")
def test_a_scope_is_found_whose_thread_looked_before_scopes_were_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scope = named("about to open")
    assert "about to open" not in names()
    with monkeypatch.context() as patch:
        patch.setattr(noted, "note", lambda scope: None)  # as if it had seen no set
        scope.__enter__()
    assert "about to open" in names()
    scope.__exit__(None, None, None)


@pytest.mark.usefixtures("never_called")
def test_a_scope_is_found_that_opens_after_all_objects_were_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = []
    look = gc.get_objects

    def get_objects() -> list[object]:
        everything = look()
        late.append(named("late").__enter__())
        return everything

    monkeypatch.setattr(gc, "get_objects", get_objects)
    assert "late" in names()
    late[0].__exit__(None, None, None)


async def test_what_closes_in_another_thread_while_it_is_looked_at_does_no_harm() -> None:
    @request_scoped
    def thing() -> Iterator[int]:
        yield 1

    @request_scoped(until="response")
    def before() -> Iterator[int]:
        yield 1

    stop = threading.Event()

    def use() -> None:
        while not stop.is_set():
            with named("short"):
                thing()
                before()

    using = asyncio.create_task(asyncio.to_thread(use))
    try:
        for _ in range(200):
            for one in inspect():
                assert isinstance(one.resources, tuple)
            await asyncio.sleep(0)
    finally:
        stop.set()
        await using
