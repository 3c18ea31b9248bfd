"""
Request-scoped resources for Django, async first.

Decorate a factory with ``request_scoped``, call it where its value is needed,
and it is set up on first use, once per request, and torn down when the request
ends, however it ends.
"""

from scoped.core.declare import lifespan_scoped, request_scoped
from scoped.core.errors import (
    AsyncResourceError,
    CircularResourceError,
    FactoryError,
    LifetimeError,
    NoScopeError,
    ScopeClosedError,
    ScopedError,
    TeardownError,
)
from scoped.core.inspect import OpenScope, inspect
from scoped.core.lifespan import lifespan_scope
from scoped.core.lookup import current_scope
from scoped.core.request import request_scope
from scoped.core.scope import Scope
from scoped.serving.background import spawn

__all__ = [
    "AsyncResourceError",
    "CircularResourceError",
    "FactoryError",
    "LifetimeError",
    "NoScopeError",
    "OpenScope",
    "Scope",
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
