"""
Request-scoped resources for Django, async first.

Decorate a factory with ``request_scoped``, call it where its value is needed,
and it is set up on first use, once per request, and torn down when the request
ends, however it ends.
"""

from scoped.background import spawn
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
from scoped.inspection import OpenScope, inspect
from scoped.lifespans import lifespan_scope
from scoped.requests import current_scope, request_scope
from scoped.resources import lifespan_scoped, request_scoped

__all__ = [
    "AsyncResourceError",
    "CircularResourceError",
    "FactoryError",
    "LifetimeError",
    "NoScopeError",
    "OpenScope",
    "ScopeClosedError",
    "ScopedError",
    "TeardownError",
    "current_scope",
    "inspect",
    "lifespan_scope",
    "lifespan_scoped",
    "request_scope",
    "request_scoped",
    "spawn",
]
