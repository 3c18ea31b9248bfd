"""
Request-scoped resources for Django, async first.

Decorate a factory with ``request_scoped``, call it where its value is needed,
and it is set up on first use, once per request, and torn down when the request
ends, however it ends.
"""

from scoped.exceptions import (
    AsyncResourceError,
    CircularResourceError,
    FactoryError,
    LifetimeError,
    NoScopeError,
    ScopeClosedError,
    ScopedError,
    TeardownError,
)
from scoped.resources import lifespan_scoped, request_scoped
from scoped.scopes import current_scope, lifespan_scope, request_scope

__all__ = [
    "AsyncResourceError",
    "CircularResourceError",
    "FactoryError",
    "LifetimeError",
    "NoScopeError",
    "ScopeClosedError",
    "ScopedError",
    "TeardownError",
    "current_scope",
    "lifespan_scope",
    "lifespan_scoped",
    "request_scope",
    "request_scoped",
]
