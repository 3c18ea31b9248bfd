"""
Which scopes there are, for ``inspect()``: noted as they open, from its first call on.
Before that it costs one look at a global.
"""

from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

if TYPE_CHECKING:
    from scoped.core.scope import Scope

__all__ = ["note", "scopes"]

# No WeakSet: that may not be looked through while another thread adds to it. What is done to this
# set, and the copy that is made of it, is one step each of the interpreter's.
scopes: "set[ReferenceType[Scope]] | None" = None


def note(scope: "Scope") -> None:
    """Until it is collected. Twice is no harm."""
    assert scopes is not None
    scopes.add(ref(scope, scopes.discard))
