"""The page's own code: that its asgi.py serves, and its settings.py begins Sentry."""

import asyncio
import importlib
import json
import logging
import os
import sys

import sentry_sdk
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.neighbours import project

if __name__ == "__main__":
    logging.disable()
    sys.path.insert(0, sys.argv[1])
    os.environ["SENTRY_DSN"] = "http://key@localhost/1"
    importlib.import_module("settings")
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    project.configure()
    asgi = importlib.import_module("asgi")
    asyncio.run(project.get(asgi.application, "view", "ada"))
    spans = [span.name for span in exporter.get_finished_spans() if span.kind.name == "SERVER"]
    begun = sentry_sdk.get_client().get_integration("django") is not None
    sentry_sdk.init()  # nothing is sent
    print(json.dumps({"servers": spans, "sentry": begun}))
