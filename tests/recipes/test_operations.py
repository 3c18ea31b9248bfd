import asyncio
from types import SimpleNamespace

import pytest
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.urls import path

from scoped import request_scoped, signals
from scoped.testing import override
from tests.recipes import pages

ASYNCPG = ("postgresql.md", "asyncpg")
PROMETHEUS = ("operations.md", "Prometheus")
OPENTELEMETRY = ("operations.md", "OpenTelemetry")
READY = ("operations.md", "Ready when the resources are")
GRAPH = ("operations.md", "A graph of resources")


@pytest.fixture
def connected():
    """Disconnects at the end what the page has connected."""
    ours = [signals.scope_opened, signals.scope_closed]
    ours += [signals.resource_set_up, signals.resource_torn_down]
    before = [list(signal.receivers) for signal in ours]
    yield
    for signal, receivers in zip(ours, before, strict=True):
        new = [one for one in signal.receivers if one not in receivers]
        for one in new:
            receiver = one[1]()
            assert signal.disconnect(receiver)


@request_scoped
async def db():
    yield "db"


async def answers(request):
    return HttpResponse(await db())


async def refuses(request):
    await db()
    raise Http404


class Streams:
    def __init__(self):
        self.reached = asyncio.Event()

    async def view(self, request):
        await db()

        async def body():
            yield "1"
            if request.path == "/fails":
                raise ValueError
            if request.path == "/hangs":
                self.reached.set()
                await asyncio.Event().wait()

        return StreamingHttpResponse(body())

    @property
    def urls(self):
        return [path(name, self.view) for name in ("streams", "fails", "hangs")]


async def end_each(site, streams):
    """One request of each kind; what is asked for while a stream is open is yielded for."""
    assert (await site.get("/")).status == 200
    assert (await site.get("/refuses")).status == 404
    assert (await site.get("/streams")).status == 200
    with pytest.raises(ValueError):
        await site.get("/fails")
    connection = site.open("/hangs")
    task = connection.start()
    await streams.reached.wait()
    yield
    connection.disconnect()
    await task


MIDDLEWARE = ["middleware.say_what_streams"]


@pytest.fixture
def prometheus(recipe, connected):
    """The page's project; its metrics are taken back from the registry of the process."""
    from prometheus_client import REGISTRY
    from prometheus_client.metrics import MetricWrapperBase

    project = recipe(PROMETHEUS)
    yield project
    for metric in vars(project.metrics).values():
        if isinstance(metric, MetricWrapperBase):
            REGISTRY.unregister(metric)


async def test_prometheus(prometheus, serve):
    metrics, streams = prometheus.metrics, Streams()
    urls = [path("", answers), path("refuses", refuses), path("metrics", metrics.metrics)]
    async with serve(*urls, *streams.urls, MIDDLEWARE=MIDDLEWARE) as site:

        async def value(line):
            text = (await site.get("/metrics")).body.decode()
            found = [one for one in text.splitlines() if one.startswith(line)]
            return float(found[0].rsplit(" ", 1)[1]) if found else None

        name = f"{__name__}.db"
        async for _ in end_each(site, streams):
            # The stream, and the request that asks.
            assert await value('scoped_open{kind="ServedScope"}') == 2
        assert await value('scoped_open{kind="ServedScope"}') == 1
        assert await value('scoped_streams_total{outcome="ok"}') == 1
        assert await value('scoped_streams_total{outcome="ValueError"}') == 1
        assert await value('scoped_streams_total{outcome="CancelledError"}') == 1
        assert await value("scoped_stream_seconds_count") == 3
        assert await value('scoped_closed_total{kind="ServedScope",outcome="Http404"}') == 1
        assert await value(f'scoped_set_up_seconds_count{{resource="{name}"}}') == 5
        assert await value(f'scoped_teardown_seconds_count{{resource="{name}"}}') == 5


async def test_opentelemetry(prometheus, recipe, serve, monkeypatch):
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracing, metering = TracerProvider(), MeterProvider([reader])
    tracing.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(trace, "get_tracer", tracing.get_tracer)
    monkeypatch.setattr(metrics, "get_meter", metering.get_meter)
    telemetry, streams = recipe(OPENTELEMETRY).telemetry, Streams()

    @request_scoped
    async def broken():
        raise OSError("no server")

    async def traced(request):
        with telemetry.tracer.start_as_current_span("the view"):
            await asyncio.create_task(db())
        with pytest.raises(OSError):
            await broken()
        return HttpResponse()

    def points(name):
        [resource] = reader.get_metrics_data().resource_metrics
        [scope] = resource.scope_metrics
        [metric] = [one for one in scope.metrics if one.name == name]
        return {
            (point.attributes["kind"], point.attributes.get("outcome")): point
            for point in metric.data.data_points
        }

    try:
        urls = [path("", answers), path("refuses", refuses), path("traced", traced)]
        async with serve(*urls, *streams.urls, MIDDLEWARE=MIDDLEWARE) as site:
            async for _ in end_each(site, streams):
                assert points("scoped.open")["ServedScope", None].value == 1
            assert points("scoped.open")["ServedScope", None].value == 0
            ended = points("scoped.duration")
            assert ended["ServedScope", "ValueError"].count == 1
            assert ended["ServedScope", "CancelledError"].attributes["streams"]
            spans.clear()
            assert (await site.get("/traced")).status == 200
    finally:
        tracing.shutdown()
        metering.shutdown()
    found = {span.name: span for span in spans.get_finished_spans()}
    set_up, parent = found[f"set up {__name__}.db"], found["the view"]
    assert set_up.parent.span_id == parent.context.span_id
    assert set_up.start_time <= set_up.end_time
    assert f"tear down {__name__}.db" in found
    [failed] = [span for span in found.values() if not span.status.is_ok]
    assert "broken" in failed.name
    assert failed.events[0].attributes["exception.message"] == "no server"


async def test_ready_as_soon_as_the_server_is(recipe, serve, notes, monkeypatch, caplog):
    project = recipe(ASYNCPG, READY)
    away, tried = True, []

    async def pool():
        tried.append(away)
        if away == "refuses":
            raise OSError("connection refused")
        if away:
            await asyncio.Event().wait()
        async with project.resources.asyncpg.create_pool(
            project.resources.os.environ["DATABASE_URL"], min_size=1
        ) as pool:
            yield pool

    monkeypatch.setattr(
        project.health, "asyncio", SimpleNamespace(timeout=lambda seconds: asyncio.timeout(0.05))
    )
    with override(project.resources.pool, pool):
        async with serve(path("", project.health.ready)) as site:
            assert (await site.get("/")).status == 503
            away = "refuses"
            assert (await site.get("/")).status == 503
            away = False
            monkeypatch.setattr(project.health, "asyncio", asyncio)
            answer = await site.get("/")
            assert (answer.status, answer.body) == (200, b"ready")
            assert (await site.get("/")).status == 200
    assert tried == [True, "refuses", False]
    assert len([one for one in caplog.records if one.name == "health"]) == 2


async def test_the_graph_is_that_of_the_page(recipe, serve, notes, connected):
    project = recipe(ASYNCPG, GRAPH)

    async def view(request):
        await project.resources.transaction()
        return HttpResponse()

    async with serve(path("", view), path("graph", project.graph.graph)) as site:
        for _ in range(2):
            await site.get("/")
        answer = await site.get("/graph")
    [expected] = pages.pages.blocks(pages.DIRECTORY / "operations.md", GRAPH[1], "text")
    assert answer.body.decode() == expected
