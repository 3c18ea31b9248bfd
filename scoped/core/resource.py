"""``Resource``: the frozen recipe. Imports nothing of the rest, so everything may import it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakSet

from scoped.core.errors import FactoryError
from scoped.core.factory import Factory

__all__ = ["LIFESPAN", "REQUEST", "RESPONSE", "KeyedResource", "Lifetime", "Resource"]

T_co = TypeVar("T_co", covariant=True)


class Lifetime(IntEnum):
    """What lives longer is greater."""

    RESPONSE = 1
    REQUEST = 2
    LIFESPAN = 3

    def __str__(self) -> str:
        return self.name.lower()


# For what is looked at with each use: a name of the module's own is found at once.
RESPONSE, REQUEST, LIFESPAN = Lifetime


@dataclass(frozen=True, slots=True, eq=False, repr=False, weakref_slot=True)
class Resource(Generic[T_co]):
    """
    What is known of a resource without setting it up. Never changes. Compared by
    identity: two of the same factory are two resources, and a scope's table finds one by its
    address alone.
    """

    factory: Factory
    lifetime: Lifetime
    is_keyed: bool = False
    # factory.start, so that a set-up finds it at once; of one key, with that.
    start: Callable[..., Any] = field(init=False)

    # For the system checks and `manage.py scoped`; one declared in a function ends with it.
    declared: ClassVar["WeakSet[Resource[Any]]"] = WeakSet()

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.factory.start)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def __str__(self) -> str:
        return str(self.factory)


class KeyedResource(Resource[T_co]):
    """
    A keyed resource with one set of arguments: made anew each time that it is asked for,
    and equal to any other of the same. Shows no argument, which may be a secret.
    """

    __slots__ = ("_hash", "is_leaving", "key", "keyed")

    _hash: int
    is_leaving: bool  # then it is found by its identity alone
    keyed: Resource[T_co]
    key: tuple[Any, ...]

    def __init__(self, keyed: Resource[T_co], key: tuple[Any, ...]) -> None:
        put = object.__setattr__
        try:
            put(self, "_hash", hash((keyed, key)))
        except TypeError as error:
            raise FactoryError(
                keyed,
                f"was asked for with an argument that cannot be part of a key: {error}",
                "Give it what is hashable, as a string, a number or a tuple of them.",
            ) from error
        put(self, "factory", keyed.factory)
        put(self, "lifetime", keyed.lifetime)
        put(self, "is_keyed", True)
        put(self, "start", partial(keyed.factory.start, *key))
        put(self, "keyed", keyed)
        put(self, "key", key)
        put(self, "is_leaving", False)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, KeyedResource)
            and other.keyed is self.keyed  # pyright: ignore[reportUnknownMemberType]
            and not (self.is_leaving or other.is_leaving)
            and other.key == self.key
        )

    def __hash__(self) -> int:
        return self._hash
