"""Which scope a resource's value is found in."""

from typing import TYPE_CHECKING, Any

from scoped.core.current import current, scope_here
from scoped.core.errors import LifetimeError, NoScopeError, ScopeClosedError
from scoped.core.lifespan import lifespans
from scoped.core.record import ENDING, GONE, HELD, Record
from scoped.core.request import RequestScope
from scoped.core.resource import LIFESPAN, RESPONSE
from scoped.core.waits import running_loop

if TYPE_CHECKING:
    from scoped.core.resource import Resource
    from scoped.core.scope import Scope

__all__ = ["current_scope", "scope_for"]


def scope_for(resource: "Resource[Any]") -> "Scope":
    """The scope that holds, or is to hold, the resource's value; raises where there is none."""
    here = current.get()
    scope = here.scope if isinstance(here, Record) else here
    if resource.lifetime is LIFESPAN:
        return _lifespan_for(resource, scope)
    if isinstance(scope, RequestScope):
        if resource.lifetime is RESPONSE:
            scope.check_response(resource)
        return scope
    if isinstance(here, Record):
        asker = here.resource
        lifetimes = str(asker.lifetime), str(resource.lifetime)
        raise LifetimeError(
            asker,
            resource,
            *lifetimes,
            left_running=here.state in (HELD, GONE),
            in_teardown=here.state == ENDING,
        )
    raise NoScopeError(resource, in_lifespan=scope is not None and scope.is_open)


def _lifespan_for(resource: "Resource[Any]", scope: "Scope | None") -> "Scope":
    if isinstance(scope, RequestScope) and scope.is_open:
        return scope.need_lifespan(resource)
    # What is being torn down may use what is there yet, and has nobody else to find it by.
    lifespan = None if scope is None or scope.is_over else scope.lifespan
    if lifespan is not None and (lifespan.is_open or resource in lifespan.records):
        return lifespan
    # Code that has outlived a request, or never had one, may use what is there.
    if (lifespan := lifespans.get(running_loop())) is not None:
        return lifespan
    if scope is not None:
        raise ScopeClosedError(resource, scope)
    raise NoScopeError(resource)


def current_scope() -> "Scope":
    """
    The scope that is open here: the request's, or the lifespan's outside any
    request. Raises NoScopeError where there is none.
    """
    scope = scope_here()
    if scope is None or not scope.is_open:
        raise NoScopeError
    return scope
