"""The web applications: what is not there is not measured, so no middleware, no database."""

# ruff: noqa: PLC0415 (one process has one of them)

from typing import Annotated, Any

from benchmarks import work

__all__ = ["APPLICATIONS", "make"]

APPLICATIONS = ["stock", "scoped", "FastAPI", "Litestar"]


def make(name: str, receiver: str | None = None) -> Any:
    """
    An ASGI application that answers ``/`` using nothing, ``/one`` using one object,
    and ``/log`` with what was done so far. With a ``receiver``, one of the project's
    own, a sync one, is connected to that signal of Django's.
    """
    if name == "FastAPI":
        return _fastapi()
    if name == "Litestar":
        return _litestar()
    return _django(name, receiver)


def _django(name: str, receiver: str | None) -> Any:
    from django.conf import settings

    settings.configure(
        ALLOWED_HOSTS=["*"],
        DEBUG=False,
        INSTALLED_APPS=["scoped"] if name == "scoped" else [],
        MIDDLEWARE=[],
        ROOT_URLCONF="benchmarks.urls",
        SECRET_KEY="benchmarks",  # noqa: S106 (signs nothing)
        USE_TZ=True,
    )
    if name == "scoped":
        from scoped.asgi import get_asgi_application
    else:
        from django.core.asgi import get_asgi_application
    application = get_asgi_application()
    if receiver is not None:
        from django.core import signals

        getattr(signals, receiver).connect(_receive)
    return application


def _receive(**kwargs: Any) -> None: ...


def _fastapi() -> Any:
    from fastapi import Depends, FastAPI
    from fastapi.responses import PlainTextResponse

    application = FastAPI(openapi_url=None, default_response_class=PlainTextResponse)

    @application.get("/")
    async def index() -> Any:
        return PlainTextResponse("ok")

    @application.get("/one")
    async def one(value: Annotated[work.A, Depends(work.make_a)]) -> Any:  # noqa: ARG001
        return PlainTextResponse("ok")

    @application.get("/log")
    async def log() -> Any:
        return PlainTextResponse("".join(work.log))

    return application


def _litestar() -> Any:
    from litestar import Litestar, MediaType, get
    from litestar.di import NamedDependency, Provide

    @get("/", media_type=MediaType.TEXT)
    async def index() -> str:
        return "ok"

    @get("/one", media_type=MediaType.TEXT, dependencies={"value": Provide(work.make_a)})
    async def one(value: NamedDependency[work.A]) -> str:  # noqa: ARG001
        return "ok"

    @get("/log", media_type=MediaType.TEXT)
    async def log() -> str:
        return "".join(work.log)

    return Litestar([index, one, log], openapi_config=None)
