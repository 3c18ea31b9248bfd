"""
What both our handlers do: whatever a view or a middleware raises, or is cancelled with,
is seen by the request's scope before Django makes a response of it; and under WSGI the
response is ended when it has passed the middleware.
"""

from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial, wraps
from inspect import unwrap
from types import CodeType
from typing import Any, ClassVar

from asgiref.sync import SyncToAsync, iscoroutinefunction, sync_to_async
from django.conf import settings
from django.core.handlers import base as _djangos
from django.core.handlers import exception
from django.core.handlers.base import BaseHandler
from django.core.handlers.exception import convert_exception_to_response
from django.db import connections

from scoped.core.current import current, scope_here
from scoped.core.errors import TeardownError
from scoped.core.request import RequestScope
from scoped.core.waits import hop, run_without_loop, sync_parent
from scoped.serving.bounds import sync_code_ended
from scoped.serving.ending import close_resources, in_place_of, see_to_close
from scoped.serving.receivers import Listeners, note_failure
from scoped.serving.streams import watch_without_loop
from scoped.serving.threads import lent_here

__all__ = ["ScopedHandler", "adopt", "error_page", "page_in_thread", "scope_of"]


class ScopedHandler(BaseHandler):
    """A base of ours beside one of Django's: ``class X(ScopedHandler, ASGIHandler)``."""

    # Not of an instance: Django's handler of static files does not call __init__().
    listeners: ClassVar[Listeners]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.listeners = Listeners(cls)

    def adapt_method_mode(self, is_async: bool, method: Any, *args: Any, **kwargs: Any) -> Any:
        # Django hands each middleware, and the view, through here as it builds the chain.
        if (converted := _converted(method)) is not None:
            # Where something is around it, the converter was wrapped: as New Relic does.
            around = converted is not method
            method = _seen(converted.__wrapped__)
            if around:
                convert: Any = vars(_djangos)["convert_exception_to_response"]
                method = convert(method)
        return super().adapt_method_mode(is_async, method, *args, **kwargs)

    def process_exception_by_middleware(self, exception: Exception, request: Any) -> Any:
        # Django calls this for whatever a view raises: a middleware may make a response of it.
        note_failure(exception)
        return super().process_exception_by_middleware(exception, request)

    def get_response(self, request: Any) -> Any:
        scope = scope_of(request)
        response: Any = super().get_response(request)
        response._handler_class = None  # whoever has served it before
        if scope is None:
            return response
        try:
            if (rest := scope.begin_to_respond()) is not None:
                run_without_loop(rest)
        except BaseException as error:
            try:
                if not isinstance(error, TeardownError):
                    raise
                page = error_page(request, error)
            except BaseException:
                close_resources(response)  # nobody else will see it
                raise
            response = in_place_of(response, page)
        if response.streaming:
            watch_without_loop(response, scope)
        return see_to_close(response, self.listeners, scope)


# The two functions that convert_exception_to_response() puts around each middleware.
_CONVERTERS = {
    constant
    for constant in unwrap(convert_exception_to_response).__code__.co_consts
    if isinstance(constant, CodeType)
}


def _converted(method: Any) -> Any:
    """What Django's converter made, in whatever somebody has wrapped it; None for other methods."""
    found, seen = None, 0
    while method is not None and seen < 20:
        if getattr(method, "__code__", None) in _CONVERTERS:
            found = method  # the last one: a proxy shows what is its object's
        method, seen = getattr(method, "__wrapped__", None), seen + 1
    return found


def _seen(get_response: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """
    ``convert_exception_to_response()``, which lets nobody know of a 404, 403 or 400, nor
    of a cancellation that a middleware further out answers for. And the page is made in
    the request's thread, as from Django 6.2 on (ticket 36027).
    """
    if iscoroutinefunction(get_response):  # pyright: ignore[reportDeprecated] (asgiref's is not)

        @wraps(get_response)
        async def inner_async(request: Any) -> Any:
            try:
                return await get_response(request)
            except Exception as error:
                note_failure(error)
                return await page_in_thread(request, error)
            except BaseException as error:
                note_failure(error)
                raise

        return inner_async

    @wraps(get_response)
    def inner(request: Any) -> Any:
        try:
            return get_response(request)
        except Exception as error:
            note_failure(error)
            return exception.response_for_exception(request, error)
        except BaseException as error:
            note_failure(error)
            raise

    return inner


def scope_of(request: Any) -> RequestScope | None:
    """The scope that was opened for this request, which it then knows."""
    scope = scope_here()
    if not isinstance(scope, RequestScope) or not scope.is_open or scope.request is not None:
        return None
    scope.request = request
    return scope


def error_page(request: Any, error: BaseException) -> Any:
    """What Django answers to a request that fails with this; the signal is sent."""
    if settings.DEBUG and isinstance(error, TeardownError):
        error.__cause__ = error.exceptions[0]  # Django's page shows causes, but no groups
    traceback = error.__traceback__
    try:
        raise error
    except BaseException:  # Django looks up the one that is being handled
        error.__traceback__ = traceback
        make_page: Any = exception.response_for_exception  # typed for an Exception
        return make_page(request, error)
    finally:
        del error, traceback  # no cycle with this frame


async def page_in_thread(request: Any, error: BaseException, *, has_waited: bool = False) -> Any:
    """
    The same, made in the request's thread; what it sets in ContextVars is seen here. Where sync
    code hangs in that, for longer than a teardown may, it is made in another one.
    """
    made: list[tuple[Any, Context]] = []
    # Where sync code, a middleware say, waits for this, its thread is at hand.
    thread = lent_here() if sync_parent() is None else None
    try:
        if thread is not None and thread.is_busy and not has_waited:
            await sync_code_ended(thread, scope_here())
        if thread is not None and thread.is_busy:
            await sync_to_async(_make_page_elsewhere, thread_sensitive=False)(made, request, error)
        else:
            # Also where a sync view that was cancelled has left its executor in the Context.
            await hop(partial(_make_page, made, request, error))
    finally:
        del error  # no cycle with this frame
    page, context = made[0]
    adopt(context)
    return page


def _make_page(made: list[tuple[Any, Context]], request: Any, error: BaseException) -> None:
    page = error_page(request, error)
    made.append((page, copy_context()))


def _make_page_elsewhere(
    made: list[tuple[Any, Context]], request: Any, error: BaseException
) -> None:
    try:
        _make_page(made, request, error)
    finally:
        connections.close_all()  # nobody else comes to this thread again


# What belongs to the task that it is set in.
_NOT_ADOPTED = {current, SyncToAsync.thread_sensitive_context, SyncToAsync.deadlock_context}


def adopt(context: Context) -> None:
    """Set here what has been set there, in a task of its own."""
    for variable, value in context.items():
        if variable not in _NOT_ADOPTED and variable.get(_NOT_ADOPTED) is not value:
            variable.set(value)
