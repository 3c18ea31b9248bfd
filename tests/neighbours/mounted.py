"""For uvicorn: the recipe's application, and the same without its lifespan."""

import os
import sys
from collections.abc import AsyncIterator

from django.http import HttpRequest, HttpResponse
from django.urls import path
from starlette.applications import Starlette
from starlette.routing import Mount

from scoped import lifespan_scoped
from tests.neighbours import project


@lifespan_scoped
async def pool() -> AsyncIterator[str]:
    yield "pool"
    print("pool torn down", file=sys.stderr, flush=True)


async def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(await pool())


urlpatterns = [path("", view)]

project.configure(ROOT_URLCONF=__name__)
if os.environ.get("WITH_THE_RECIPE"):
    from outer import application
else:
    application = Starlette(routes=[Mount("/", project.application("scoped"))])
