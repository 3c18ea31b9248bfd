"""For uvicorn, with Sentry, whose every transaction is a line of the log."""

import asyncio
import json
import sys
from typing import Any

import sentry_sdk
from django.http import HttpRequest, HttpResponse
from django.urls import path
from sentry_sdk.transport import Transport

from tests.neighbours import project


class Log(Transport):
    def capture_envelope(self, envelope: Any) -> None:
        for item in envelope.items:
            if item.type == "transaction":
                event = item.payload.json
                line = [event["request"]["query_string"], event["tags"]["user"]]
                print("transaction", json.dumps(line), file=sys.stderr, flush=True)


async def view(request: HttpRequest) -> HttpResponse:
    assert "user" not in sentry_sdk.get_isolation_scope()._tags, "another request's"
    await asyncio.sleep(0.01)  # others come
    sentry_sdk.set_tag("user", request.GET["user"])
    await asyncio.sleep(0.01)
    return HttpResponse()


urlpatterns = [path("", view)]

sentry_sdk.init("http://key@localhost/1", transport=Log, traces_sample_rate=1.0)
project.configure(ROOT_URLCONF=__name__)
application = project.application("scoped")
