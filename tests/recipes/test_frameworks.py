import asyncio
import json

import pytest
from asgiref.sync import async_to_sync
from asgiref.testing import ApplicationCommunicator
from django.conf import settings
from django.test import override_settings
from django.urls import path

ASYNCPG = ("postgresql.md", "asyncpg")
DRF = ("frameworks.md", "Django REST framework")
NINJA = ("frameworks.md", "django-ninja")
CHANNELS = ("frameworks.md", "Channels")
APPS = ["django.contrib.contenttypes", "django.contrib.auth"]


async def returned(project):
    pool = await project.resources.pool()
    assert pool.get_idle_size() == pool.get_size() > 0


def posting(content):
    body = json.dumps(content).encode()
    length = str(len(body)).encode()
    return {
        "method": "POST",
        "headers": [(b"content-type", b"application/json"), (b"content-length", length)],
        "body": [body],
    }


# Django REST framework


@pytest.fixture
def drf(recipe, notes):
    with override_settings(
        INSTALLED_APPS=[*settings.INSTALLED_APPS, *APPS, "rest_framework"],
    ):
        project = recipe(ASYNCPG, DRF)
        with override_settings(REST_FRAMEWORK=project.settings.REST_FRAMEWORK):
            yield project


async def test_an_api_view_commits(drf, serve, notes):
    async with serve(path("", drf.views.Notes.as_view())) as site:
        for number, text in enumerate(["one", "two"], 1):
            answer = await site.get("/", **posting({"text": text}))
            assert (answer.status, json.loads(answer.body)) == (201, {"id": number})
            await returned(drf)
    assert await notes() == ["one", "two"]


async def test_an_api_view_has_one_connection_in_all_its_calls(drf, serve, notes):
    from rest_framework.response import Response
    from rest_framework.views import APIView

    class View(APIView):
        def get(self, request):
            first, second = (async_to_sync(drf.resources.db)() for _ in range(2))
            return Response({"same": first is second})

    async with serve(path("", View.as_view())) as site:
        assert (await site.get("/")).body == b'{"same":true}'
        await returned(drf)


@pytest.mark.parametrize("is_noted", [True, False])
async def test_what_rest_framework_answers_itself_must_be_noted(drf, serve, notes, is_noted):
    from rest_framework.exceptions import ValidationError

    class View(drf.views.Notes):
        def post(self, request):
            super().post(request)
            raise ValidationError("after the INSERT")

    settings = {} if is_noted else {"REST_FRAMEWORK": {}}
    async with serve(path("", View.as_view()), **settings) as site:
        answer = await site.get("/", **posting({"text": "one"}))
        assert (answer.status, answer.body) == (400, b'["after the INSERT"]')
        assert await notes() == ([] if is_noted else ["one"])
        await returned(drf)


def test_an_api_view_in_a_unit_test_has_no_scope(drf):
    from rest_framework.test import APIRequestFactory

    answer = drf.views.Notes.as_view()(APIRequestFactory().post("/", {}))
    assert answer.status_code == 400


async def test_any_other_exception_of_an_api_view_rolls_back(drf, serve, notes):
    class View(drf.views.Notes):
        def post(self, request):
            super().post(request)
            raise ValueError

    async with serve(path("", View.as_view()), REST_FRAMEWORK={}) as site:
        assert (await site.get("/", **posting({"text": "never"}))).status == 500
        assert await notes() == []
        await returned(drf)


# django-ninja


async def test_a_ninja_operation(recipe, serve, notes):
    from ninja.errors import HttpError

    project = recipe(ASYNCPG, NINJA)
    reached = asyncio.Event()

    # Operations of its own: once its URLs are made, ninja's api takes no more.
    api = project.api.NotingAPI(urls_namespace="failing")

    @api.post("/refused")
    async def refused(request, text: str):
        await project.api.post(request, text)
        raise HttpError(409, "after the INSERT")

    @api.post("/broken")
    async def broken(request, text: str):
        await project.api.post(request, text)
        raise ValueError

    @api.post("/hangs")
    async def hangs(request, text: str):
        await project.api.post(request, text)
        reached.set()
        await asyncio.Event().wait()

    async with serve(path("failing/", api.urls), *project.urls.urlpatterns) as site:
        answer = await site.get("/notes?text=one", method="POST")
        assert (answer.status, answer.body) == (200, b"1")
        assert await notes() == ["one"]
        assert (await site.get("/failing/refused?text=never", method="POST")).status == 409
        assert (await site.get("/failing/broken?text=never", method="POST")).status == 500
        connection = site.open("/failing/hangs?text=never", method="POST")
        task = connection.start()
        await reached.wait()
        connection.disconnect()
        await task
        assert await notes() == ["one"]
        await returned(project)


def test_a_ninja_operation_in_a_unit_test_has_no_scope(recipe, notes):
    from ninja.errors import HttpError
    from ninja.testing import TestClient

    api = recipe(ASYNCPG, NINJA).api.NotingAPI(urls_namespace="unit")

    @api.get("/refused")
    def refused(request):
        raise HttpError(409, "no")

    assert TestClient(api).get("/refused").status_code == 409


async def test_what_ninja_answers_itself_must_be_noted(recipe, serve, notes):
    from ninja import NinjaAPI
    from ninja.errors import HttpError

    project = recipe(ASYNCPG, NINJA)
    api = NinjaAPI(urls_namespace="other")

    @api.post("/refused")
    async def refused(request, text: str):
        await project.api.post(request, text)
        raise HttpError(409, "after the INSERT")

    async with serve(path("", api.urls)) as site:
        assert (await site.get("/refused?text=kept", method="POST")).status == 409
    assert await notes() == ["kept"]


# Channels


class Socket(ApplicationCommunicator):
    """As a server keeps it: each application runs in an empty Context."""

    def __init__(self, application):
        scope = {"type": "websocket", "path": "/notes", "headers": [], "subprotocols": []}
        super().__init__(application, scope)

    async def connect(self):
        await self.send_input({"type": "websocket.connect"})
        assert (await self.receive_output())["type"] == "websocket.accept"

    async def ask(self, content):
        await self.send_input({"type": "websocket.receive", "text": json.dumps(content)})
        return json.loads((await self.receive_output(5))["text"])

    async def disconnect(self):
        await self.send_input({"type": "websocket.disconnect", "code": 1001})
        await self.wait()


async def test_a_message_is_a_scope(recipe, serve, notes):
    project = recipe(ASYNCPG, CHANNELS)
    async with serve(application=project.asgi.application):
        socket, other = Socket(project.asgi.application), Socket(project.asgi.application)
        await socket.connect()
        await other.connect()
        for number, text in enumerate(["one", "two", "three"], 1):
            asked = socket if number % 2 else other
            assert await asked.ask({"text": text}) == {"id": number}
            assert len(await notes()) == number, "committed before the answer"
            await returned(project)
        await socket.disconnect()
        await other.disconnect()
    assert await notes() == ["one", "two", "three"]


async def test_http_beside_channels(recipe, serve, notes):
    project = recipe(ASYNCPG, CHANNELS)
    async with serve(path("", project.views.post), application=project.asgi.application) as site:
        assert (await site.post("/", text="one")).status == 204
        pool = await project.resources.pool()
    assert await notes() == ["one"]
    assert pool.is_closing(), "the lifespan reached our handler"


async def test_a_message_that_fails_rolls_back_its_own(recipe, serve, notes):
    project = recipe(ASYNCPG, CHANNELS)

    class Notes(project.consumers.Notes):
        async def send_json(self, content):
            await super().send_json(content)
            raise ValueError("after the COMMIT")

    async with serve(application=project.asgi.application):
        socket = Socket(project.asgi.application)
        await socket.connect()
        assert await socket.ask({"text": "one"}) == {"id": 1}
        await socket.send_input({"type": "websocket.receive", "text": '{"text": null}'})
        with pytest.raises(Exception, match="null value"):
            await socket.wait(5)
        await returned(project)
        socket = Socket(Notes.as_asgi())
        await socket.connect()
        await socket.ask({"text": "two"})
        with pytest.raises(ValueError):
            await socket.wait(5)
        await returned(project)
    assert await notes() == ["one", "two"]


@pytest.mark.parametrize("end", ["disconnect", "cancel"])
async def test_a_scope_around_the_whole_socket(recipe, serve, notes, end):
    project = recipe(ASYNCPG, CHANNELS)
    log = []

    from scoped import request_scoped

    @request_scoped
    async def subscription():
        try:
            yield object()
        except BaseException as error:
            log.append(type(error).__name__)
            raise
        finally:
            log.append("torn down")

    class Subscriber(project.consumers.Subscriber):
        async def connect(self):
            self.subscription = await subscription()
            await super().connect()

        async def receive_json(self, content):
            assert await subscription() is self.subscription
            await super().receive_json(content)
            assert await subscription() is self.subscription

    async with serve(application=project.asgi.application):
        socket = Socket(Subscriber.as_asgi())
        await socket.connect()
        for number in [1, 2]:
            assert await socket.ask({"text": "a"}) == {"id": number}
            await returned(project)
        assert log == []
        if end == "disconnect":
            await socket.disconnect()
            assert log == ["torn down"]
        else:
            socket.stop()
            await socket.wait()
            assert log == ["CancelledError", "torn down"]


async def test_a_scope_in_dispatch_would_see_stop_consumer(recipe, serve, notes):
    from scoped import request_scope, request_scoped

    project = recipe(ASYNCPG, CHANNELS)
    seen = []

    @request_scoped
    async def watch():
        try:
            yield
        except Exception as error:
            seen.append(type(error).__name__)
            raise

    class Notes(project.consumers.Notes):
        async def dispatch(self, message):
            async with request_scope():
                await super().dispatch(message)

        async def disconnect(self, code):
            await watch()

    async with serve(application=project.asgi.application):
        socket = Socket(Notes.as_asgi())
        await socket.connect()
        await socket.disconnect()
    assert seen == ["StopConsumer"]
