"""``Resource``: the frozen recipe. Imports nothing of the rest, so everything may import it."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakSet

from scoped.core.factory import Factory

__all__ = ["Lifetime", "Resource"]

T_co = TypeVar("T_co", covariant=True)


class Lifetime(Enum):
    RESPONSE = "response"
    REQUEST = "request"
    LIFESPAN = "lifespan"


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Resource(Generic[T_co]):
    """What is known of a resource without setting it up. Never changes."""

    factory: Factory
    lifetime: Lifetime

    # For the system checks and `manage.py scoped`; one declared in a function ends with it.
    declared: ClassVar["WeakSet[Resource[Any]]"] = WeakSet()

    def __str__(self) -> str:
        return str(self.factory)
