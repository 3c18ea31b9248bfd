"""What a server's start and stop do to lifespan resources, and to a request that is open then."""

import asyncio
import os
import sys

from django.conf import settings
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

from scoped import lifespan_scoped, request_scoped
from scoped.asgi import get_asgi_application


def log(text):
    print(text, file=sys.stderr, flush=True)


@lifespan_scoped(eager=True)
async def pool():
    log("pool set up")
    if os.environ.get("POOL_FAILS"):
        raise ConnectionError("no database there")
    yield "pool"
    log("pool torn down")


@request_scoped
async def db():
    try:
        yield await pool()
    finally:
        await asyncio.sleep(0.3)
        log("db torn down")


async def index(request):
    return HttpResponse(await db())


async def stream(request):
    async def body():
        yield await db()
        await asyncio.sleep(60)

    return StreamingHttpResponse(body())


urlpatterns = [path("", index), path("stream", stream)]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="lifespan")
application = get_asgi_application()
