"""
Signals that keep the caller's Context, on every supported Django.

Django before 6.1 runs async receivers in tasks of their own, so that what a
receiver sets in a ContextVar is lost (ticket 36714). Here they are awaited one
after the other, in the caller's task and Context: nothing to copy, nothing to
restore.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from asgiref.sync import sync_to_async
from django.dispatch import Signal

from scoped.core.names import printable_repr

__all__ = ["asend", "asend_robust"]

logger = logging.getLogger("scoped")

Receiver = Callable[..., Any]
# What a receiver returned, or the error that it raised.
Outcome = tuple[Receiver, Any, Exception | None]

NOTHING: Mapping[str, Any] = {}


async def asend(signal: Signal, /, sender: Any, **named: Any) -> list[tuple[Receiver, Any]]:
    """
    Send ``signal`` as ``signal.asend()`` does, in the caller's Context: first
    the sync receivers, in one hop to the thread for sync code, then the async
    ones, in the order in which they were connected.

    Returns a list of ``(receiver, response)``. Where receivers raise, the others
    run all the same; then the first error is raised, and the later ones are
    logged. A cancellation is raised at once.
    """
    outcomes = await _dispatch(signal, sender, named)
    raise_first(error for _, _, error in outcomes)
    return [(receiver, response) for receiver, response, _ in outcomes]


async def asend_robust(signal: Signal, /, sender: Any, **named: Any) -> list[tuple[Receiver, Any]]:
    """
    As ``asend``, but an error is logged, and is that receiver's response, as
    with ``signal.asend_robust()``.
    """
    responses: list[tuple[Receiver, Any]] = []
    for receiver, response, error in await _dispatch(signal, sender, named):
        if error is not None:
            _log(error)
        responses.append((receiver, response if error is None else error))
    return responses


async def _dispatch(signal: Signal, sender: Any, named: Mapping[str, Any]) -> list[Outcome]:
    return await call_in_turn(*live_receivers(signal, sender), signal, sender, named)


async def call_in_turn(
    sync_receivers: Iterable[Receiver],
    async_receivers: Iterable[Receiver],
    signal: Signal,
    sender: Any,
    named: Mapping[str, Any],
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    try:
        if sync_receivers:
            await _call_all(sync_receivers, outcomes, signal, sender, named)
        await await_all(async_receivers, outcomes, signal, sender, named)
    except BaseException:
        log_errors(outcomes)  # which the cancellation would hide
        raise
    return outcomes


def live_receivers(signal: Signal, sender: Any) -> tuple[list[Receiver], list[Receiver]]:
    """The sync and the async receivers that are connected for this sender."""
    if not signal.receivers:
        return [], []
    return signal._live_receivers(sender)


def call_all(
    receivers: Iterable[Receiver],
    outcomes: list[Outcome],
    signal: Signal,
    sender: Any,
    named: Mapping[str, Any] = NOTHING,
) -> None:
    for receiver in receivers:
        try:
            outcomes.append((receiver, receiver(signal=signal, sender=sender, **named), None))
        except Exception as error:
            outcomes.append((receiver, None, error))


_call_all = sync_to_async(call_all)  # once, as asgiref looks into what it is given


async def await_all(
    receivers: Iterable[Receiver],
    outcomes: list[Outcome],
    signal: Signal,
    sender: Any,
    named: Mapping[str, Any] = NOTHING,
) -> None:
    for receiver in receivers:
        try:
            response = await receiver(signal=signal, sender=sender, **named)
            outcomes.append((receiver, response, None))
        except Exception as error:
            outcomes.append((receiver, None, error))


def log_errors(outcomes: Iterable[Outcome]) -> None:
    for _, _, error in outcomes:
        if error is not None:
            _log(error)


def raise_first(errors: Iterable[BaseException | None]) -> None:
    """Raise the first error, if there is any, and log the others."""
    first: BaseException | None = None
    for error in errors:
        if first is None:
            first = error
        elif error is not None:
            _log(error)
    if first is not None:
        try:
            raise first
        finally:
            del first, errors


def _log(error: BaseException) -> None:
    logger.error(
        "A signal was sent, and this was raised: %s", printable_repr(error), exc_info=error
    )
