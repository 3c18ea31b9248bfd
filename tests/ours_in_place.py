"""Our handlers, receivers and client handlers in place of Django's, for others' suites."""

import sys
from typing import Any

__all__ = ["put_ours_in_place"]


def put_ours_in_place() -> dict[str, Any]:
    """Returns the class that serves requests, and counts them, by kind of request."""
    import django.core.asgi
    import django.core.handlers.asgi
    import django.core.handlers.wsgi
    import django.core.wsgi

    from scoped.asgi import ScopedASGIHandler
    from scoped.serving import receivers

    handler = counting(ScopedASGIHandler)
    # Before the next import: Django's static files handler takes its base from here.
    django.core.handlers.asgi.ASGIHandler = handler
    django.core.asgi.ASGIHandler = handler
    import django.test.client
    from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler

    from scoped.testing import ASGIClientHandler, AsyncClientHandler, WSGIClientHandler
    from scoped.wsgi import ScopedWSGIHandler

    if not issubclass(ASGIStaticFilesHandler, handler):
        sys.exit("Django's static files handler was imported too early: its base is not ours.")
    AsyncClientHandler.handler_class = counting(ASGIClientHandler)
    django.test.client.AsyncClientHandler = AsyncClientHandler
    client_handler = counting(WSGIClientHandler)
    receivers.tells_of_response.add(client_handler)
    django.test.client.ClientHandler = client_handler
    django.core.handlers.wsgi.WSGIHandler = ScopedWSGIHandler
    django.core.wsgi.WSGIHandler = ScopedWSGIHandler
    # As with "scoped" in INSTALLED_APPS: they must do no harm to others' requests.
    receivers.connect()
    return {
        "ASGI": handler,
        "AsyncClient": AsyncClientHandler.handler_class,
        "Client": client_handler,
    }


def counting(base: Any) -> Any:
    from scoped import NoScopeError, current_scope

    class Counting(base):
        served = 0
        without_scope = 0

        def create_request(self, scope: Any, body_file: Any) -> Any:
            _count()
            return super().create_request(scope, body_file)

        def get_response(self, request: Any) -> Any:  # without an event loop, in its place
            _count()
            return super().get_response(request)

    def _count() -> None:
        Counting.served += 1
        try:
            current_scope()
        except NoScopeError:
            Counting.without_scope += 1

    return Counting
