"""The Django project's views, the same under the stock handler and ours."""

from contextlib import asynccontextmanager

from django.apps import apps
from django.http import HttpRequest, HttpResponse
from django.urls import path

from benchmarks import work
from scoped import request_scoped

resource = request_scoped(work.make_a)
context_manager = asynccontextmanager(work.make_a)


async def index(_: HttpRequest) -> HttpResponse:
    return HttpResponse("ok", content_type="text/plain")


async def ours(_: HttpRequest) -> HttpResponse:
    await resource()
    return HttpResponse("ok", content_type="text/plain")


async def by_hand(_: HttpRequest) -> HttpResponse:
    async with context_manager():  # the least that one can do
        return HttpResponse("ok", content_type="text/plain")


def sync(_: HttpRequest) -> HttpResponse:
    return HttpResponse("ok", content_type="text/plain")


async def log(_: HttpRequest) -> HttpResponse:
    return HttpResponse("".join(work.log), content_type="text/plain")


urlpatterns = [
    path("", index),
    path("one", ours if apps.is_installed("scoped") else by_hand),
    path("sync", sync),
    path("log", log),
]
