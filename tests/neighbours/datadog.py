"""The spans that Datadog makes of some requests: kept here, and sent to no agent."""

import asyncio
import importlib
import json
import logging
import os
import sys
import warnings
from typing import Any

os.environ |= {
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "DD_TRACE_AGENT_URL": "http://127.0.0.1:9",
    "DD_TRACE_STARTUP_LOGS": "false",
}
import ddtrace.auto  # noqa: F401 (what `ddtrace-run` does, before all else)
from ddtrace.trace import TraceFilter, tracer

from tests.neighbours import project

ended: list[Any] = []


class Keep(TraceFilter):
    def process_trace(self, trace: list[Any]) -> None:
        ended.extend(trace)


def tell(what: str, user: str) -> None:
    with tracer.trace("ours", resource=what):
        pass


def found() -> dict[str, Any]:
    """What has no parent, and all that has one, in the one trace of the request."""
    [root] = [span for span in ended if span.name.endswith(".request")]
    inside = [span for span in ended if span.trace_id == root.trace_id]
    ids = {span.span_id for span in inside}
    assert all(span.parent_id in ids for span in inside if span is not root)
    return {
        "roots": [[span.name, span.resource] for span in ended if span.parent_id is None],
        "views": [span.resource for span in inside if span.name == "django.view"],
        "ours": sorted(span.resource for span in inside if span.name == "ours"),
    }


async def main(application: Any) -> None:
    of_each = {}
    for number, where in enumerate(("view", "sync", "raises", "streams", "hangs", "holds", "view")):
        ended.clear()
        await project.get(application, where, f"user-{number}")
        of_each[f"{number} {where}"] = found()
    print(json.dumps(of_each))


if __name__ == "__main__":
    logging.disable()
    tracer.configure(trace_processors=[Keep()])
    project.tell = tell
    project.configure()
    if sys.argv[1] == "stock":
        warnings.simplefilter("ignore", RuntimeWarning)  # what Django's own never awaits
        served = project.application("stock")
    else:
        sys.path.insert(0, sys.argv[1])  # with the page's asgi.py
        served = importlib.import_module("asgi").application
    asyncio.run(main(served))
