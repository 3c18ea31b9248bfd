"""Views that a test module registers by their names."""

from collections.abc import Callable
from typing import Any

from django.http import HttpRequest
from django.urls import path


class Views(dict[str, Any]):
    """``view = Views()`` is a decorator, and ``view.urlpatterns`` serves what it was put on."""

    def __call__(self, function: Callable[..., Any]) -> Any:
        self[function.__name__] = function
        return function

    async def dispatch(self, request: HttpRequest, name: str) -> Any:
        return await self[name](request)

    def dispatch_sync(self, request: HttpRequest, name: str) -> Any:
        return self[name](request)

    @property
    def urlpatterns(self) -> list[Any]:
        return [path("sync/<name>", self.dispatch_sync), path("<name>", self.dispatch)]
