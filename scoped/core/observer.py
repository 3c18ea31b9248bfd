"""Who is told of what happens to scopes and resources: nobody, until ``scoped.signals`` asks."""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from scoped.core.resource import Resource
    from scoped.core.scope import Scope

__all__ = ["Observer", "observer"]


class Observer(Protocol):
    """Called in place, in whatever task or thread; must neither wait nor raise."""

    def scope_opened(self, scope: "Scope") -> None: ...

    def scope_closed(self, scope: "Scope", seconds: float, error: BaseException | None) -> None: ...

    def resource_set_up(
        self,
        resource: "Resource[Any]",
        scope: "Scope",
        seconds: float,
        error: BaseException | None,
        asked_by: "Resource[Any] | None",
    ) -> None: ...

    def resource_torn_down(
        self,
        resource: "Resource[Any]",
        scope: "Scope",
        seconds: float,
        error: BaseException | None,
    ) -> None: ...


observer: Observer | None = None
