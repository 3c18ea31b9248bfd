"""
What our handlers tell a request's scope: its request, what its view failed with,
and that its response is about to be sent.
"""

import logging
from contextlib import suppress
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.handlers.base import BaseHandler
from django.core.handlers.exception import response_for_exception

from scoped.core.current import scope_here
from scoped.core.errors import TeardownError
from scoped.core.request import RequestScope
from scoped.core.waits import run_without_loop
from scoped.serving.receivers import note_failure

__all__ = ["ScopedHandler", "close_resources", "close_stream"]

logger = logging.getLogger("scoped")


class ScopedHandler(BaseHandler):
    """A base of ours beside one of Django's: ``class X(ScopedHandler, ASGIHandler)``."""

    def get_response(self, request: Any) -> Any:
        scope = _scope_of(request)
        response = super().get_response(request)
        if scope is None:
            return response
        try:
            run_without_loop(scope.end_response())
        except BaseException as error:
            try:
                if not isinstance(error, TeardownError):
                    raise
                _show_cause(error)
                page: Any = response_for_exception(request, error)
            except BaseException:
                close_resources(response)  # nobody else will see it
                raise
            return _in_place_of(response, page)
        return response

    async def get_response_async(self, request: Any) -> Any:
        scope = _scope_of(request)
        response = await super().get_response_async(request)
        if scope is None:
            return response
        try:
            await scope.end_response()
        except BaseException as error:
            try:
                if not isinstance(error, TeardownError):
                    raise
                _show_cause(error)
                make_page = sync_to_async(response_for_exception, thread_sensitive=False)
                page: Any = await make_page(request, error)
            except BaseException:
                close_resources(response)  # nobody else will see it
                raise
            finally:
                await _drop_stream(response)
            return _in_place_of(response, page)
        return response

    def process_exception_by_middleware(self, exception: Exception, request: Any) -> Any:
        # Django calls this for whatever a view raises, a 404 included: the one place to see it.
        note_failure(exception)
        return super().process_exception_by_middleware(exception, request)


def _scope_of(request: Any) -> RequestScope | None:
    scope = scope_here()
    if not isinstance(scope, RequestScope) or not scope.is_open or scope.request is not None:
        return None  # not opened for this request
    scope.request = request
    return scope


def _show_cause(error: TeardownError) -> None:
    if settings.DEBUG:
        error.__cause__ = error.exceptions[0]  # Django's page shows causes, but no groups


def _in_place_of(response: Any, page: Any) -> Any:
    """What Django answers to a view's error also closes what the response had to."""
    page._resource_closers.extend(response._resource_closers)
    response._resource_closers.clear()
    return page


async def _drop_stream(response: Any) -> None:
    try:
        await close_stream(response)
    except Exception as error:
        logger.error("While a stream was dropped: %r", error, exc_info=error)


async def close_stream(response: Any) -> None:
    """
    Django leaves a stream that was not consumed to its end to the garbage
    collector: it would be closed late, in another task.
    """
    iterator: Any = getattr(response, "_iterator", None)
    if hasattr(iterator, "aclose"):
        await iterator.aclose()


def close_resources(response: Any) -> None:
    """What ``HttpResponseBase.close()`` does before it sends the signal."""
    for closer in response._resource_closers:
        with suppress(Exception):
            closer()
    response._resource_closers.clear()
    response.closed = True
