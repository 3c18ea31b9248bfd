"""A request as a WSGI server makes it, and what it keeps until its process ends."""

import io
from collections.abc import Callable
from typing import Any

from scoped import lifespans
from scoped.waiting import run_without_loop


def environ(path: str, **headers: str) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "wsgi.input": io.BytesIO(),
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        **headers,
    }


def call(application: Callable[..., Any], path: str, **headers: str) -> tuple[str, bytes]:
    statuses: list[str] = []
    response = application(environ(path, **headers), lambda status, _: statuses.append(status))
    try:
        return statuses[0], b"".join(response)
    finally:
        response.close()


def end_of_process() -> None:
    if lifespan := lifespans.lifespans.get(None):
        run_without_loop(lifespan.close())
