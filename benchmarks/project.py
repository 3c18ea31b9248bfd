"""The web applications: what is not there is not measured, so no middleware, no database."""

# ruff: noqa: PLC0415 (one process has one of them)

from typing import Annotated, Any

from benchmarks import work

__all__ = ["APPLICATIONS", "KINDS", "make"]

APPLICATIONS = ["stock", "scoped", "FastAPI", "Litestar"]

KINDS = ["", "middleware", "request_started", "request_finished", "wsgi"]

# As `startproject` lists them.
_MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
_APPS = [f"django.contrib.{name}" for name in ("auth", "contenttypes", "messages", "sessions")]


def make(name: str, kind: str = "") -> Any:
    """
    An application that answers ``/`` using nothing, ``/one`` using one object, and ``/log``
    with what was done so far; a Django one also ``/sync``, from a sync view that uses nothing.

    A Django one is, by ``kind``, one with ``middleware``, the usual seven, or one with
    a sync receiver of its own for the signal of Django's that this names, or of ``wsgi``.
    """
    if name == "FastAPI":
        return _fastapi()
    if name == "Litestar":
        return _litestar()
    return _django(name, kind)


def _django(name: str, kind: str) -> Any:
    from django.conf import settings
    from django.core import signals

    has_middleware = kind == "middleware"
    settings.configure(
        ALLOWED_HOSTS=["*"],
        DEBUG=False,
        INSTALLED_APPS=[
            *(["scoped"] if name == "scoped" else []),
            *(_APPS if has_middleware else []),
        ],
        MIDDLEWARE=_MIDDLEWARE if has_middleware else [],
        ROOT_URLCONF="benchmarks.urls",
        SECRET_KEY="benchmarks",  # noqa: S106 (signs nothing)
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        USE_TZ=True,
    )
    application = _handler(name, kind)
    if kind in ("request_started", "request_finished"):
        getattr(signals, kind).connect(_receive)
    return application


def _handler(name: str, kind: str) -> Any:
    if kind == "wsgi":
        if name == "scoped":
            from scoped.wsgi import get_wsgi_application
        else:
            from django.core.wsgi import get_wsgi_application
        return get_wsgi_application()
    if name == "scoped":
        from scoped.asgi import get_asgi_application
    else:
        from django.core.asgi import get_asgi_application
    return get_asgi_application()


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
