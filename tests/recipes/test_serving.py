import asyncio
import base64
import json
from time import perf_counter

import httpx
import pytest
from django.conf import settings
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path

from scoped import inspect, lifespan_scoped
from scoped.core.lifespan import lifespans
from tests.docs.project import urls
from tests.recipes.conftest import lifespan

ASYNCPG = ("postgresql.md", "asyncpg")
STATIC = ("serving.md", "Static files in development")
BESIDE = ("serving.md", "FastAPI beside it")
LAMBDA = ("serving.md", "AWS Lambda")


async def get(application, where, method="GET"):
    """As httpx asks, whose transport reads the answer whole."""
    transport = httpx.ASGITransport(application, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        return await client.request(method, where)


# Static files


async def test_static_files_and_views_from_one_application(recipe, serve, notes, tmp_path):
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "site.css").write_text("body {}")
    apps = [*settings.INSTALLED_APPS, "django.contrib.staticfiles"]
    with override_settings(
        DEBUG=True,
        INSTALLED_APPS=apps,
        STATIC_URL="/static/",
        STATICFILES_DIRS=[tmp_path / "static"],
    ):
        project = recipe(ASYNCPG, STATIC)
        application = project.asgi.application
        async with serve(path("", project.views.post), application=application) as site:
            assert (await site.get("/static/site.css")).body == b"body {}"
            assert (await site.post("/", text="one")).status == 204
            pool = await project.resources.pool()
        assert pool.is_closing(), "the lifespan reached our handler"
    assert await notes() == ["one"]


# FastAPI


async def test_another_application_beside_it(recipe, notes):
    begun = perf_counter()
    project = recipe(ASYNCPG, BESIDE)
    asgi, pools = project.asgi, []

    @asgi.api.post("/api/fails")
    async def fails(text: str) -> int:
        await asgi.post(text)
        raise ValueError

    @asgi.api.post("/api/refuses")
    async def refuses(text: str) -> int:
        from fastapi import HTTPException

        await asgi.post(text)
        raise HTTPException(409)

    async def view(request):
        pools.append(await project.resources.pool())
        return HttpResponse()

    with urls(path("", view)):
        async with lifespan(asgi.application):
            answer = await get(asgi.application, "/api/notes?text=one", "POST")
            assert (answer.status_code, answer.json()) == (200, 1)
            assert (await get(asgi.application, "/")).status_code == 200
            assert (await get(asgi.application, "/api/fails?text=no", "POST")).status_code == 500
            assert await notes() == ["one"]
            answer = await get(asgi.application, "/api/refuses?text=kept", "POST")
            assert answer.status_code == 409
            assert await notes() == ["one", "kept"]
            [pool] = pools
            assert pool is await project.resources.pool()
            assert pool.get_idle_size() == pool.get_size() > 0
            mine = perf_counter() - begun
            assert not [
                one for one in inspect() if one.name == "the request scope" and one.seconds < mine
            ]
    assert pool.is_closing()


# AWS Lambda

EVENT = {
    "version": "2.0",
    "routeKey": "$default",
    "rawPath": "/",
    "rawQueryString": "",
    "headers": {"host": "testserver"},
    "requestContext": {
        "http": {
            "method": "GET",
            "path": "/",
            "protocol": "HTTP/1.1",
            "sourceIp": "127.0.0.1",
            "userAgent": "lambda",
        },
        "stage": "$default",
    },
    "isBase64Encoded": False,
}
log: list[str] = []


@lifespan_scoped
async def pool():
    log.append("set up")
    yield "pool"
    log.append("torn down")


async def view(request):
    return HttpResponse(await pool())


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_lambda_keeps_what_is_lifespan_scoped(recipe, mode):
    from mangum import Mangum

    log.clear()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        handler = recipe(LAMBDA).aws.handler
        if mode == "auto":
            handler = Mangum(handler.app)
        with urls(path("", view)):
            for _ in range(2):
                answer = handler(EVENT, None)
                body = answer["body"]
                if answer["isBase64Encoded"]:
                    body = base64.b64decode(body).decode()
                assert (answer["statusCode"], body) == (200, "pool"), json.dumps(answer)
        assert log == (["set up"] if mode == "off" else ["set up", "torn down"] * 2)
    finally:
        if left := asyncio.all_tasks(loop):  # it is kept for the next call, until the process ends
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left))
        assert loop not in lifespans
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        asyncio.set_event_loop(None)
