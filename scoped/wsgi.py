"""
Django's WSGI handler, for sync resources: its scope sees what a view or a
streaming body failed with, and knows when the response is sent.
"""

from collections.abc import Callable
from typing import Any

import django
from django.core.handlers.wsgi import WSGIHandler

from scoped import conf
from scoped.core.current import current
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
        around = current.get()
        try:
            return super().__call__(environ, start_response)
        except BaseException as error:
            # Not even a 500: Django leaves the request unfinished then.
            if current.get() is not around:
                note_failure(error)
                close_foreign(sender=type(self))
            raise


tells_of_response.add(ScopedWSGIHandler)
