"""What ends a response, whatever it is made of and whatever it overrides."""

import logging
from collections.abc import Callable
from typing import Any, cast

from django.http.response import HttpResponseBase

from scoped.core.names import printable_repr
from scoped.serving.bounds import in_time

__all__ = [
    "close_resources",
    "close_response",
    "close_stream",
    "closes_itself",
    "drop_stream",
    "in_place_of",
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


def closes_itself(response: Any) -> bool:
    """
    Whether its ``close()`` is not Django's own. That must be called as it is, and
    at its end sends ``request_finished``, to sync and async receivers alike.
    """
    cls = cast("type[HttpResponseBase]", type(response))
    return cls.close is not HttpResponseBase.close or "close" in vars(response)


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
