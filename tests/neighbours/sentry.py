"""What Sentry is sent of some requests, one after the other; and what a thousand leave behind."""

import asyncio
import gc
import json
import logging
import sys
from typing import Any

import sentry_sdk
from django.core.handlers.asgi import ASGIRequest
from sentry_sdk.transport import Transport

from tests.neighbours import project

sent: list[dict[str, Any]] = []


class Keep(Transport):
    def capture_envelope(self, envelope: Any) -> None:
        for item in envelope.items:
            event = item.payload.json
            sent.append(
                {
                    "type": item.type,
                    "transaction": event.get("transaction"),
                    "query": (event.get("request") or {}).get("query_string"),
                    "user": event.get("tags", {}).get("user"),
                    "error": [one["type"] for one in event.get("exception", {}).get("values", [])],
                    "spans": sorted(
                        span["description"]
                        for span in event.get("spans", [])
                        if span["op"] in ("ours", "view.render")
                    ),
                }
            )


def tell(what: str, user: str) -> None:
    if user:
        assert sentry_sdk.get_isolation_scope()._tags == {}, "another request's"
        sentry_sdk.set_tag("user", user)
    with sentry_sdk.start_span(op="ours", name=what):
        pass


async def main(whose: str) -> None:
    application = project.application(whose)
    of_each = {}
    kinds = ("view", "sync", "raises", "streams", "hangs", "holds", "breaks", "view")
    for number, where in enumerate(kinds):
        sent.clear()
        await project.get(application, where, f"user-{number}")
        of_each[f"{number} {where}"] = list(sent)
    processors: list[int] = []

    def count(what: str, user: str) -> None:
        processors.append(len(sentry_sdk.get_isolation_scope()._event_processors))

    project.tell = count
    for number in range(1000):
        await project.get(application, "view", str(number))
    gc.collect()
    left = sum(type(thing) is ASGIRequest for thing in gc.get_objects())
    print(json.dumps({"sent": of_each, "processors": max(processors), "requests left": left}))


if __name__ == "__main__":
    logging.lastResort = None  # it is Sentry that is to hear of it
    # In the settings, as Sentry's pages have it: before Django, and scoped, are set up.
    sentry_sdk.init("http://key@localhost/1", transport=Keep, traces_sample_rate=1.0)
    project.tell = tell
    project.configure()
    asyncio.run(main(sys.argv[1]))
