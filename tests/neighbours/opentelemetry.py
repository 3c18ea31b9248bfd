"""The spans of some requests, with their parents, as the recipe sets OpenTelemetry up."""

import asyncio
import json
import logging
import sys
from typing import Any

from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.django import DjangoInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from tests.neighbours import project

ended: list[ReadableSpan] = []


class Keep(SpanExporter):
    def export(self, spans: Any) -> SpanExportResult:
        ended.extend(spans)
        return SpanExportResult.SUCCESS


def tell(what: str, user: str) -> None:
    with trace.get_tracer("ours").start_as_current_span(what):
        pass


def ours() -> list[tuple[str, str]]:
    """Each of ours, and the kind of what it is in; all in the trace of one server span."""
    [server] = [span for span in ended if span.kind.name == "SERVER"]
    by_id = {span.context.span_id: span for span in ended}
    found = []
    for span in ended:
        if span.instrumentation_scope.name == "ours":
            assert span.parent is not None, span.name
            assert span.context.trace_id == server.context.trace_id, span.name
            # The server span ends with the last byte, and then come teardowns.
            assert span.end_time <= server.end_time or span.name == "teardown", span.name
            # Django's middleware does not end its own span when it is cancelled.
            parent = by_id.get(span.parent.span_id)
            found.append((span.name, "never ended" if parent is None else parent.kind.name))
    return sorted(found)


async def main(whose: str) -> None:
    application = OpenTelemetryMiddleware(project.application(whose))
    of_each = {}
    for number, where in enumerate(("view", "sync", "raises", "streams", "hangs", "holds", "view")):
        ended.clear()
        await project.get(application, where, f"user-{number}")
        servers = [span.name for span in ended if span.kind.name == "SERVER"]
        of_each[f"{number} {where}"] = {"servers": servers, "ours": ours()}
    print(json.dumps(of_each))


if __name__ == "__main__":
    logging.disable()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Keep()))
    trace.set_tracer_provider(provider)
    project.tell = tell
    project.configure()
    DjangoInstrumentor().instrument()
    asyncio.run(main(sys.argv[1]))
