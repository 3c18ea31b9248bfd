"""
Django's WSGI handler, for sync resources: its scope sees what a view or a
streaming body failed with, and knows when the response is sent.
"""

from collections.abc import Callable, Iterator
from typing import Any

import django
from django.core.handlers.wsgi import WSGIHandler
from django.http.response import HttpResponseBase

from scoped import conf
from scoped.core.current import scope_here
from scoped.serving.handler import ScopedHandler
from scoped.serving.receivers import close_foreign, connect, note_failure, tells_of_response

__all__ = ["ScopedWSGIHandler", "get_wsgi_application"]


def get_wsgi_application() -> "ScopedWSGIHandler":
    """Set Django up and return the project's WSGI application, as ``django.core.wsgi`` does."""
    django.setup(set_prefix=False)
    return ScopedWSGIHandler()


class ScopedWSGIHandler(ScopedHandler, WSGIHandler):
    """
    Serves a project as Django's ``WSGIHandler`` does. Without an event loop an
    async resource raises AsyncResourceError.
    """

    def __init__(self) -> None:
        conf.configure()
        connect()
        super().__init__()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        tells_of_response.add(cls)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        around = scope_here()
        try:
            response: Any = super().__call__(environ, start_response)
        except BaseException as error:
            # Not even a 500: Django leaves the request unfinished then.
            if scope_here() is not around:
                note_failure(error)
                close_foreign(sender=type(self))
            raise
        # Not a file that the server sends in its own way.
        if isinstance(response, HttpResponseBase) and response.streaming:
            return _Body(response)
        return response


tells_of_response.add(ScopedWSGIHandler)


class _Body:
    """A streaming body (PEP 3333) whose failure the request's factories get to see."""

    def __init__(self, response: HttpResponseBase) -> None:
        self.response = response

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self.response
        except GeneratorExit:
            raise  # the server has had enough
        except BaseException as error:
            note_failure(error)
            raise

    def close(self) -> None:
        self.response.close()
