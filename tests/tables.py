"""What a scope has in its tables."""

from typing import Any

from scoped.core.record import STARTING
from scoped.core.scope import Scope

__all__ = ["under_way", "what_is_kept"]


def what_is_kept(scope: Scope) -> list[Any]:
    """Its values, what there is to tear down, and its set-ups under way."""
    return [*scope.records.values(), *(scope.ending or ())]


def under_way(scope: Scope) -> list[Any]:
    return [record.resource for record in scope.records.values() if record.state == STARTING]
