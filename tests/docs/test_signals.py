"""docs/signals.md."""

import asyncio
import json
import re

import pytest
from django.http import HttpResponse
from django.urls import path

from scoped import request_scope, request_scoped
from scoped.signals import resource_set_up, resource_torn_down, scope_closed, scope_opened
from tests import pages

SLOW = ("signals.md", "Signals")
METRICS = ("signals.md", "Metrics")
OPENED = ("signals.md", "What is open now")
SIGNALS = [scope_opened, scope_closed, resource_set_up, resource_torn_down]


@pytest.fixture(autouse=True)
def _only_ours():
    """The receivers of the page go with its module."""
    before = [[receiver() for _, receiver, *_ in signal.receivers] for signal in SIGNALS]
    yield
    for signal, known in zip(SIGNALS, before, strict=True):
        for _, reference, *_ in list(signal.receivers):
            if (receiver := reference()) is not None and receiver not in known:
                signal.disconnect(receiver)


@request_scoped
async def report():
    await asyncio.sleep(0.02)
    yield


@request_scoped
async def broken():
    raise ValueError
    yield


async def test_a_slow_set_up_is_logged(project, serve, monkeypatch, caplog):
    monkeypatch.setattr(project(SLOW).receivers, "SLOW", 0.01)

    async def view(request):
        await report()
        return HttpResponse()

    async with serve(path("report", view)) as site:
        await site.get("/report")
    [line] = [record.getMessage() for record in caplog.records if record.name == "resources"]
    [documented] = pages.blocks(pages.DOCS / "signals.md", "Signals", "text")
    pattern = re.compile(r"^(\S+\.report) \((.+\.py:\d+)\) (took \d\.\d s .*), (in the .*)$")
    assert pattern.match(line).groups()[3] == pattern.match(documented.strip()).groups()[3]


async def test_an_async_receiver_is_refused_and_one_that_raises_is_logged(caplog):
    async def asynchronous(**kwargs): ...

    def raises(**kwargs):
        raise ValueError

    with pytest.raises(TypeError):
        scope_opened.connect(asynchronous)
    scope_opened.connect(raises)
    async with request_scope():
        await report()
    assert [record.name for record in caplog.records] == ["django.dispatch"]


async def test_what_they_are_sent_with():
    """The table."""
    seen = {}

    def receiver(signal, sender, **named):
        seen[signal] = set(named)

    for signal in SIGNALS:
        signal.connect(receiver)
    async with request_scope():
        await report()
    text = (pages.DOCS / "signals.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    documented = {name: set(re.findall(r"`([a-z_]+)`", cell)) for name, cell in rows}
    names = ["scope_opened", "scope_closed", "resource_set_up", "resource_torn_down"]
    assert documented == {name: seen[signal] for name, signal in zip(names, SIGNALS, strict=True)}


async def test_the_metrics(project, serve):
    metrics = project(METRICS).metrics

    async def view(request):
        await report()
        await broken()

    async with serve(path("", view), path("metrics", metrics.metrics)) as site:
        await site.get("/")
        answer = await site.get("/metrics")
    lines = dict(line.rsplit(" ", 1) for line in answer.body.decode().splitlines())
    name = f"{__name__}.report"
    assert lines['scopes_closed_total{error="ValueError"}'] == "1"
    assert lines[f'resource_set_ups_total{{resource="{name}",failed="False"}}'] == "1"
    failed = f'resource_set_ups_total{{resource="{__name__}.broken",failed="True"}}'
    assert lines[failed] == "1"
    assert lines[f'resource_teardowns_total{{resource="{name}",failed="False"}}'] == "1"
    assert float(lines[f'resource_set_up_seconds_total{{resource="{name}"}}']) >= 0.015


async def test_the_page_of_what_is_open(project, serve):
    opened = project(OPENED).opened
    reached = asyncio.Event()

    @request_scoped
    async def hangs():
        reached.set()
        await asyncio.Event().wait()
        yield

    async def view(request):
        await report()
        await hangs()

    async with serve(path("opened", opened.opened), path("", view)) as site:
        connection = site.open("/")
        task = connection.start()
        await reached.wait()
        answer = await site.get("/opened")
        connection.disconnect()
        await task
    assert answer.status == 200
    told = json.loads(answer.body)
    assert len(told["open"]) == told["in_all"]
    [one] = [one for one in told["open"] if one["name"] == "the request GET /"]
    assert one["holds"] == [f"{__name__}.report"]
    assert one["waits_for"][0].endswith(".hangs")
    assert one["seconds"] > 0
