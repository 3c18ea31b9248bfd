"""What is open in this process right now."""

import gc
from dataclasses import dataclass
from time import perf_counter

from scoped.core.record import HELD, STARTING
from scoped.core.scope import Scope

__all__ = ["OpenScope", "inspect", "open_scopes", "picture"]


@dataclass(frozen=True, slots=True)
class OpenScope:
    """A scope at the moment of ``inspect()``."""

    name: str
    seconds: float  # since it was opened
    resources: tuple[str, ...]  # that it holds, in the order of their set-up
    being_set_up: tuple[str, ...]
    being_torn_down: tuple[str, ...]


def inspect() -> list[OpenScope]:
    """
    The scopes that are open in this process, the oldest first, lifespans too. Looks
    through all objects that Python's garbage collector knows, so that scopes need
    not be registered: a matter of milliseconds, for people and health checks.
    """
    now = perf_counter()
    scopes = sorted(open_scopes(), key=lambda scope: scope.opened)
    return [picture(scope, now) for scope in scopes]


def open_scopes() -> list[Scope]:
    # By type(), as isinstance() would evaluate Django's lazy objects.
    scopes = [thing for thing in gc.get_objects() if issubclass(type(thing), Scope)]
    return [one for one in scopes if one.is_open]


def picture(scope: Scope, now: float) -> OpenScope:
    records = list(scope.records.values())
    held = sorted((one for one in records if one.state == HELD), key=lambda one: one.number)
    return OpenScope(
        name=str(scope),
        seconds=now - scope.opened,
        resources=tuple(one.resource.factory.name for one in held),
        being_set_up=tuple(one.resource.factory.name for one in records if one.state == STARTING),
        being_torn_down=tuple(one.resource.factory.name for one in list(scope.ending or ())),
    )
