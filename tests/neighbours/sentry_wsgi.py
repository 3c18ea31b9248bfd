"""What Sentry is sent of requests under WSGI, and what their factories see."""

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any
from wsgiref.util import setup_testing_defaults

import django
import sentry_sdk
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path
from sentry_sdk.transport import Transport

from scoped import request_scoped
from tests.neighbours import project

sent: list[list[Any]] = []
seen: list[str] = []


class Keep(Transport):
    def capture_envelope(self, envelope: Any) -> None:
        sent.extend([item.type, item.payload.json.get("transaction")] for item in envelope.items)


@request_scoped
def tenant() -> Iterator[str]:
    try:
        yield "ada"
    except BaseException as error:
        seen.append(type(error).__name__)
        raise
    else:
        seen.append("success")


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(tenant())


def streams(request: HttpRequest) -> StreamingHttpResponse:
    def body() -> Iterator[str]:
        yield tenant()
        raise ValueError("boom")

    return StreamingHttpResponse(body())


urlpatterns = [path("view", view), path("streams", streams)]


def call(application: Any, where: str) -> list[Any]:
    sent.clear()
    seen.clear()
    environ: dict[str, Any] = {"PATH_INFO": where}
    setup_testing_defaults(environ)
    response = application(environ, lambda *arguments: None)
    try:
        b"".join(response)
    except ValueError:
        pass
    finally:
        response.close()
    return [where, list(sent), list(seen)]


def main(whose: str) -> None:
    if whose == "scoped":
        from scoped.wsgi import get_wsgi_application
    else:
        from django.core.wsgi import get_wsgi_application
    django.setup()
    application = get_wsgi_application()
    print(json.dumps([call(application, where) for where in ("/view", "/streams", "/view")]))


if __name__ == "__main__":
    logging.disable()
    sentry_sdk.init("http://key@localhost/1", transport=Keep, traces_sample_rate=1.0)
    project.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])
    main(sys.argv[1])
