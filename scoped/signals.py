"""
Signals that say what happens to scopes and resources, for metrics, traces and
timelines. While nothing is connected to any of them they cost nothing.

``scope_opened``
    sent with ``scope``

``scope_closed``
    sent with ``scope``, ``seconds`` (that it was open) and ``error`` (what ended
    it, or None)

``resource_set_up``
    sent with ``resource``, ``scope``, ``seconds`` (that it took), ``error`` (why it
    failed, or None) and ``asked_by`` (the resource whose factory asked for it, or
    None)

``resource_torn_down``
    sent with ``resource``, ``scope``, ``seconds`` and ``error``

The sender is the class of the scope. ``str(scope)`` is its name, and
``scope.request`` Django's request, if it has one. Receivers are sync functions; they
are called at once, in the task or thread in which it happens, so they must not wait.
What they raise is logged (logger ``django.dispatch``), and changes nothing.
"""

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType

from asgiref.sync import iscoroutinefunction
from django.dispatch import Signal

from scoped.core import observer
from scoped.core.resource import Resource
from scoped.core.scope import Scope
from scoped.core.waits import fork_safe_lock

__all__ = ["resource_set_up", "resource_torn_down", "scope_closed", "scope_opened"]


class _Event(Signal):
    def connect(
        self,
        receiver: Callable[..., Any],
        sender: object = None,
        weak: bool = True,
        dispatch_uid: object = None,
    ) -> None:
        if any(map(iscoroutinefunction, (receiver, getattr(receiver, "__call__")))):  # noqa: B004, B009
            raise TypeError(
                f"{receiver!r} is async, and this signal is sent by code that cannot wait for it. "
                "Connect a sync function, and hand on from there what takes longer."
            )
        super().connect(receiver, sender, weak, dispatch_uid)
        _update()

    def disconnect(
        self,
        receiver: Callable[..., Any] | None = None,
        sender: object = None,
        dispatch_uid: object = None,
    ) -> bool:
        disconnected = super().disconnect(receiver, sender, dispatch_uid)
        _update()
        return disconnected


scope_opened = _Event()
scope_closed = _Event()
resource_set_up = _Event()
resource_torn_down = _Event()


class _Sender:
    def scope_opened(self, scope: Scope) -> None:
        _send(scope_opened, scope)

    def scope_closed(self, scope: Scope, seconds: float, error: BaseException | None) -> None:
        _send(scope_closed, scope, seconds=seconds, error=error)

    def resource_set_up(
        self,
        resource: Resource[Any],
        scope: Scope,
        seconds: float,
        error: BaseException | None,
        asked_by: Resource[Any] | None,
    ) -> None:
        _send(
            resource_set_up,
            scope,
            resource=resource,
            seconds=seconds,
            error=error,
            asked_by=asked_by,
        )

    def resource_torn_down(
        self,
        resource: Resource[Any],
        scope: Scope,
        seconds: float,
        error: BaseException | None,
    ) -> None:
        _send(resource_torn_down, scope, resource=resource, seconds=seconds, error=error)


def _send(signal: _Event, scope: Scope, **named: Any) -> None:
    if not signal.send_robust(type(scope), scope=scope, **named):
        _update()  # receivers are held weakly: perhaps the last one is gone


# Held from the look until what it says is noted: whoever connects meanwhile would else be missed.
_lock = fork_safe_lock()


def _update() -> None:
    signals = (scope_opened, scope_closed, resource_set_up, resource_torn_down)
    with _lock:
        anybody = any(_is_alive(entry) for signal in signals for entry in list(signal.receivers))
        observer.observer = _Sender() if anybody else None


def _is_alive(entry: tuple[Any, ...]) -> bool:
    receiver = entry[1]
    return not isinstance(receiver, ReferenceType) or receiver() is not None
