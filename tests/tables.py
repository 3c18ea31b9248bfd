"""What a scope has in its tables."""

from typing import Any

from scoped.core.scope import Scope

__all__ = ["under_way", "what_is_kept"]


def what_is_kept(scope: Scope) -> list[Any]:
    """Its values, what there is to tear down, and its set-ups under way."""
    tables: list[Any] = [scope.values, scope.generators, scope.others]
    return [table for table in tables if table] + under_way(scope)


def under_way(scope: Scope) -> list[Any]:
    return [set_up.resource for set_up in scope.set_ups()]
