"""
The cases. Each is a function of a running site that asserts what must be so;
what it returns, if anything, is a remark for the table. After each nothing may
be left: see ``Site.leftovers``.
"""

import json
import signal
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

from tests.servers.client import Client, request
from tests.servers.running import LIFESPAN_SCOPED, Site, eventually

BODY = bytes(range(250)) * 2000  # 500 kB
FLOOD = 256 * 65_536
POOL_SIZE = 5
TAKEN = "the server takes it all at once"


class Case(NamedTuple):
    title: str
    run: Callable[[Site], str | None]
    ends_the_site: bool


CASES: list[Case] = []


def case(
    *variants: tuple[Any, ...], ends_the_site: bool = False
) -> Callable[[Callable[..., str | None]], Callable[..., str | None]]:
    """A case, or several: of each its title, and what is passed to the function."""

    def add(function: Callable[..., str | None]) -> Callable[..., str | None]:
        for title, *arguments in variants:
            run = partial(_run, function, arguments)
            CASES.append(Case(title, run, ends_the_site))
        return function

    return add


def _run(function: Callable[..., str | None], arguments: list[Any], site: Site) -> str | None:
    return function(site, *arguments)


def answered(site: Site, client: Client, name: str) -> dict[str, Any]:
    answer = client.answer()
    assert answer.status == 200, f"status {answer.status}"
    given: dict[str, Any] = json.loads(answer.body.split(b"\n")[0])
    site.has_its_own(name, given)
    return given


# Requests that end by themselves


@case(
    ("async view", "/async/"),
    ("sync view", "/sync/"),
    ("first use in `gather` children", "/children/"),
    ("stream to its end", "/stream/"),
)
def ends(site: Site, path: str) -> None:
    name = site.name()
    with Client(site.port) as client:
        client.send(request(path + name))
        answered(site, client, name)
        site.ended(name, None)  # with the connection kept alive


@case(("view raises",))
def view_raises(site: Site) -> None:
    name = site.name()
    with Client(site.port) as client:
        assert client.get(f"/raises/{name}").status == 500
        site.ended(name, "ValueError")


@case(("streaming body raises",))
def stream_raises(site: Site) -> None:
    name = site.name()
    with Client(site.port) as client:
        client.send(request(f"/stream-raises/{name}"))
        assert client.head()[0] == 200
        client.chunk()
        site.ended(name, "KeyError")


# The client goes


@case(
    ("client gone in an async view", "/hang/", "db", "lingering", "subscription"),
    ("client gone in a sync view", "/sync-hang/"),
    ("client gone in a view's `gather` children", "/children-hang/"),
)
def gone_in_view(site: Site, path: str, *resources: str) -> None:
    for abruptly in (False, True):
        name = site.name()
        with Client(site.port) as client:
            client.send(request(path + name))
            site.wait_for("reached", name)
            client.leave(abruptly=abruptly)
            site.ended(name, "CancelledError", *resources)


@case(("client gone in a stream",))
def gone_in_stream(site: Site) -> None:
    for abruptly in (False, True):
        name = site.name()
        with Client(site.port) as client:
            client.send(request(f"/stream-hang/{name}"))
            client.head()
            client.chunk()
            site.wait_for("reached", name)
            client.leave(abruptly=abruptly)
            site.ended(name, "CancelledError", "lingering", "subscription")


@case(("10 clients gone, 5 of them while they wait for the pool",))
def gone_while_waiting(site: Site) -> None:
    names = [site.name() for _ in range(2 * POOL_SIZE)]
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(site.port)) for _ in names]
        for client, name in zip(clients, names, strict=True):
            client.send(request(f"/hang/{name}"))
            site.wait_for("asked", name)
        eventually(
            lambda: sum(bool(site.log("reached", request=name)) for name in names) == POOL_SIZE,
            lambda: "the pool is not exhausted",
        )
        for client in clients:
            client.leave()
        for name in names:
            if site.log("reached", request=name):
                site.ended(name, "CancelledError", "db", "lingering", "subscription")


@case(("client sends half a body and leaves",))
def half_a_body(site: Site) -> None:
    for abruptly in (False, True):
        name = site.name()
        with Client(site.port) as client:
            client.send(request(f"/body/{name}", BODY)[: len(BODY) // 2])
            time.sleep(0.1)  # so that the server has read of it: nothing tells from outside
            client.leave(abruptly=abruptly)
        site.is_clean()
        assert not site.log("view", request=name), "the view has seen half a body"


# Many requests in one connection


@case(("several requests in one write",))
def pipelined(site: Site) -> str | None:
    """Of which some end badly: the requests behind them must not feel it."""
    paths = ["/async/", "/stream/", "/raises/", "/sync/", "/async/", "/stream/"]
    names = [site.name() for _ in paths]
    carried = False
    with Client(site.port) as client:
        client.send(b"".join(request(path + name) for path, name in zip(paths, names, strict=True)))
        for path, name in zip(paths, names, strict=True):
            if path == "/raises/":
                assert client.answer().status == 500
                site.ended(name, "ValueError")
            else:
                carried |= bool(answered(site, client, name)["in"])
                site.ended(name, None)
    return "each begins in the Context of the one before" if carried else None


@case(("client gone in the first of several requests in one write",))
def gone_in_pipeline(site: Site) -> None:
    first, second = site.name(), site.name()
    with Client(site.port) as client:
        client.send(request(f"/hang/{first}") + request(f"/async/{second}"))
        site.wait_for("reached", first)
        client.leave()
        site.ended(first, "CancelledError", "db", "lingering", "subscription")


@case(("500 kB bodies in a row, one connection",))
def bodies(site: Site) -> str | None:
    carried = False
    with Client(site.port) as client:
        for number in range(4):
            body, name = BODY[number:], site.name()
            client.send(request(f"/body/{name}", body))
            given = answered(site, client, name)
            assert given["crc"] == zlib.crc32(body), "not the body that was sent"
            site.ended(name, None)
            carried |= bool(given["in"])
            name = site.name()
            client.send(request(f"/async/{name}"))
            carried |= bool(answered(site, client, name)["in"])
            site.ended(name, None)
    return "each begins in the Context of the one before" if carried else None


# A client that does not read


def stalls(site: Site, name: str) -> bool:
    """Whether the server holds the stream up; else the stream has ended meanwhile."""
    site.wait_for("asked", name)
    before, looks = 0, 0
    while looks < 5:  # one would not do: on a busy machine the server itself may pause
        time.sleep(0.3)
        now = site.state()["sent"].get(name, 0)
        looks = looks + 1 if now and now == before else 0
        before = now
    return before * 65_536 < FLOOD


@case(("client does not read 16 MB, and leaves",))
def slow_then_gone(site: Site) -> str | None:
    name = site.name()
    with Client(site.port, reluctant=True) as client:
        client.send(request(f"/flood/{name}"))
        stalled = stalls(site, name)
        client.leave()
        site.ended(name, "CancelledError" if stalled else None)
        events = [line["event"] for line in site.log(request=name)]
        assert events.index("closed") < events.index("torn down"), "torn down under the stream"
    return None if stalled else TAKEN


@case(("client does not read 16 MB, and then does",))
def slow_then_reads(site: Site) -> str | None:
    name = site.name()
    with Client(site.port, reluctant=True) as client:
        client.send(request(f"/flood/{name}"))
        stalled = stalls(site, name)
        if stalled:
            assert not site.log("torn down", request=name), "torn down before the last byte"
        body = client.answer().body
        assert len(body) == FLOOD, f"{len(body)} bytes came"
        assert zlib.crc32(body) == _flood_crc(), "not the bytes that were sent"
        site.ended(name, None)
    return None if stalled else TAKEN


def _flood_crc() -> int:
    crc = 0
    for number in range(256):
        crc = zlib.crc32(bytes([number]) * 65_536, crc)
    return crc


# In the end


@case(("after all that, 5 requests have 5 connections at once",))
def meet(site: Site) -> None:
    names = [site.name() for _ in range(POOL_SIZE)]
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(site.port)) for _ in names]
        for client, name in zip(clients, names, strict=True):
            client.send(request(f"/meet/{name}"))
        numbers = {
            answered(site, client, name)["db"] for client, name in zip(clients, names, strict=True)
        }
    assert len(numbers) == POOL_SIZE


# Shutdown


def what_is_left(site: Site) -> list[str]:
    """Of a server that has ended."""
    kinds = site.not_torn_down(*LIFESPAN_SCOPED)
    with suppress(AssertionError):
        eventually(lambda: not site.backends() and not site.subscribers(), str)
    return [
        *[f"not torn down: {', '.join(kinds)}" for _ in range(bool(kinds))],
        *[f"a backend is still {backend}" for backend in site.backends() if not kinds],
        *[f"{site.subscribers()} subscriber(s)" for _ in range(site.subscribers() > 0)],
    ]


@case(
    ("SIGTERM, requests and streams open", signal.SIGTERM),
    ("SIGINT, requests and streams open", signal.SIGINT),
    ends_the_site=True,
)
def shut_down(site: Site, number: signal.Signals) -> None:
    views = ["/hang/", "/sync-hang/", "/stream-hang/", "/stream-hang/"]
    names = [site.name() for _ in views]
    problems = []
    with ExitStack() as stack:
        for view, name in zip(views, names, strict=True):
            client = stack.enter_context(Client(site.port))
            client.send(request(view + name))
            site.wait_for("reached", name)
        if not site.stop(number):
            problems.append("does not end until the clients leave")
    assert site.ends(), "does not end"
    problems += what_is_left(site)
    assert not problems, "; ".join(problems)
    failures = [line["failure"] for name in names for line in site.log("torn down", request=name)]
    assert set(failures) == {"CancelledError"}, f"the factories saw {failures}"


@case(
    ("SIGTERM, a request open that is about to end", signal.SIGTERM),
    ("SIGINT, a request open that is about to end", signal.SIGINT),
    ends_the_site=True,
)
def shut_down_gently(site: Site, number: signal.Signals) -> None:
    name = site.name()
    problems = []
    with Client(site.port) as client:
        client.send(request(f"/brief/{name}"))
        site.wait_for("reached", name)
        site.process.send_signal(number)
        with suppress(AssertionError):  # of hypercorn's processes, one listens to the end
            eventually(lambda: not site.listens(), str, seconds=2)
        site.publish()  # which the view has waited for
        try:
            answered(site, client, name)
        except OSError:
            problems.append("not answered")
    assert site.ends(), "does not end"
    problems += what_is_left(site)
    assert not problems, "; ".join(problems)
    site.ended(name, None)
