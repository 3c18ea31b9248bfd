"""A WSGI application, called as a server would."""

import io
from collections.abc import Callable
from typing import Any


def environ(where: str | None = "/", **more: Any) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "GET",
        **({"PATH_INFO": where} if where else {}),  # PEP 3333: may be absent if empty
        "wsgi.input": io.BytesIO(),
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        **more,
    }


def form(text: str) -> dict[str, Any]:
    """What makes it a POST of a form."""
    return {
        "REQUEST_METHOD": "POST",
        "CONTENT_TYPE": "application/x-www-form-urlencoded",
        "CONTENT_LENGTH": str(len(text)),
        "wsgi.input": io.BytesIO(text.encode()),
    }


def call(
    application: Callable[..., Any], where: str | None = "/", **more: Any
) -> tuple[str, bytes]:
    """The status and the body."""
    statuses: list[str] = []
    body = application(environ(where, **more), lambda status, headers: statuses.append(status))
    try:
        return statuses[0], b"".join(body)
    finally:
        body.close()
