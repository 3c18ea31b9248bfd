"""``Resource``: the frozen recipe. Imports nothing of the rest, so everything may import it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakSet

from scoped.core.factory import Factory

__all__ = ["Lifetime", "Resource"]

T_co = TypeVar("T_co", covariant=True)


class Lifetime(IntEnum):
    """What lives longer is greater."""

    RESPONSE = 1
    REQUEST = 2
    LIFESPAN = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Resource(Generic[T_co]):
    """
    What is known of a resource without setting it up. Never changes. Compared by
    identity: two of the same factory are two resources, and a scope's table finds one by its
    address alone.
    """

    factory: Factory
    lifetime: Lifetime
    # factory.start, so that a set-up finds it at once.
    start: Callable[[], Any] = field(init=False, repr=False)

    # For the system checks and `manage.py scoped`; one declared in a function ends with it.
    declared: ClassVar["WeakSet[Resource[Any]]"] = WeakSet()

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.factory.start)

    def __str__(self) -> str:
        return str(self.factory)
