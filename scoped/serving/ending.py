"""What ends a response, whatever it is made of and whatever it overrides."""

import logging
from collections.abc import Callable
from functools import partial
from inspect import unwrap
from typing import Any, cast

from django.core.signals import request_finished
from django.http.response import HttpResponseBase

from scoped.core.current import as_current
from scoped.core.names import printable_repr
from scoped.core.request import RequestScope
from scoped.core.waits import fork_safe_lock
from scoped.serving.bounds import in_time
from scoped.serving.receivers import Listeners

__all__ = [
    "close_resources",
    "close_response",
    "close_stream",
    "closes_itself",
    "drop_stream",
    "in_place_of",
    "see_to_close",
    "twin_of",
]

logger = logging.getLogger("scoped")


async def close_stream(response: Any, whose: object) -> None:
    """
    Django leaves a stream that was not consumed to its end to the garbage
    collector: it would be closed late, in another task.
    """
    iterator: Any = getattr(response, "_iterator", None)
    if hasattr(iterator, "aclose"):
        await in_time(iterator.aclose(), f"The end of the streaming body of {whose}")


async def drop_stream(response: Any, whose: object) -> None:
    """Close that of a response which nobody is sent."""
    try:
        await close_stream(response, whose)
    except Exception as error:
        logger.error("While a stream was dropped: %s", printable_repr(error), exc_info=error)


def in_place_of(response: Any, page: Any) -> Any:
    """What Django answers to a view's error also closes what the response had to."""
    page._resource_closers.extend(response._resource_closers)
    response._resource_closers.clear()
    return page


def close_resources(response: Any) -> None:
    """What ``HttpResponseBase.close()`` does before it sends the signal."""
    for closer in response._resource_closers:
        try:  # noqa: SIM105 (suppress() is slower)
            closer()
        except Exception:  # noqa: S110 (as Django does)
            pass
    response._resource_closers.clear()
    response.closed = True


_djangos_close = unwrap(HttpResponseBase.close)  # in whatever somebody has wrapped it


def closes_itself(response: Any) -> bool:
    """
    Whether its ``close()`` is not Django's own. That must be called as it is, and
    at its end sends ``request_finished``, to sync and async receivers alike.
    """
    return response.__class__.close is not _djangos_close or "close" in vars(response)


def see_to_close(response: Any, listeners: Listeners, scope: RequestScope) -> Any:
    """
    For a server that calls ``close()``, where and when it likes. What is the response's own is
    seen to come to its end; in the place of Django's is the same, told who listens.

    Returns the response; one like it, where another request is being answered with this one, as
    all may be with one of a module's: each ends its own.
    """
    with _lock:
        own = response.__dict__.get("close")
        if (how := getattr(own, "func", None)) in (close_plainly, _close_itself):
            served, _, before = own.args[:3]
            if before.is_open:
                response = twin_of(response)
            own = response.__dict__.pop("close").args[1] if how is _close_itself else None
            if getattr(own, "__self__", None) is served:
                own = None  # its class's
        if own is None and response.__class__.close is _djangos_close:
            response.close = partial(close_plainly, response, listeners, scope)
        else:
            own = own or response.close
            response.close = partial(_close_itself, response, own, scope, listeners.sender)
    return response


# Held while it is decided whose a response is, which requests in several threads may share.
_lock = fork_safe_lock()


def twin_of(response: Any) -> Any:
    """One like it. Not a copy(), which leaves out what cannot be pickled."""
    twin = object.__new__(cast("type[HttpResponseBase]", type(response)))
    vars(twin).update(cast("dict[str, Any]", vars(response)))
    return twin


def close_plainly(response: Any, listeners: Listeners, scope: RequestScope) -> None:
    """What Django's ``close()`` does, but that it looks for no listeners."""
    response.__dict__.pop("close", None)  # a cycle; and if it is called again, it is Django's
    with as_current(scope):
        close_resources(response)
        listeners.send(request_finished)


def _close_itself(
    response: Any, own_close: Callable[[], None], scope: RequestScope, sender: type
) -> None:
    response._handler_class = sender  # another request, which shares it, may have forgotten that
    with as_current(scope):
        close_response(response, own_close)


def close_response(response: Any, own_close: Callable[[], None]) -> None:
    """
    Call its own ``close()``; where that does not come to the end of Django's, which closes
    everything and sends ``request_finished``, do that too.
    """
    response.closed = False  # it may have been served before
    try:
        own_close()
    finally:
        if not response.closed:
            HttpResponseBase.close(response)
