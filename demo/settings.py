"""Django's settings for the demo."""

import os

from django.core.exceptions import ImproperlyConfigured
from django.core.management.utils import get_random_secret_key


def _address_of(server: str) -> str:
    try:
        return os.environ[server]
    except KeyError:
        raise ImproperlyConfigured(
            f"{server} is not set. `python -m demo` sets it and starts the server; "
            "anything else has to say where that is."
        ) from None


DATABASE_URL = _address_of("DATABASE_URL")
REDIS_URL = _address_of("REDIS_URL")
REDIS = {
    # Where it is not in the URL, in which it would have to be quoted. (PostgreSQL's, PGPASSWORD, is
    # read by asyncpg itself.)
    "password": os.environ.get("REDIS_PASSWORD") or None,
    "decode_responses": True,
    # redis-py uses asyncio.wait_for() for it: that of Python 3.11 may swallow the cancellation of a
    # request whose client has gone.
    "socket_timeout": None,
}


def _pool(name: str) -> dict[str, object]:
    return {"min_size": 2, "max_size": 10, "server_settings": {"application_name": name}}


POOL, STOCK_POOL = _pool("scoped"), _pool("stock")  # equal, and told apart by PostgreSQL

DEBUG = False
# Nothing here outlives the process that signs it.
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or get_random_secret_key()
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]").split(",")
# Where a proxy in front speaks TLS: what the browser calls the page, https://demo.example.
CSRF_TRUSTED_ORIGINS = os.environ.get("CSRF_TRUSTED_ORIGINS", "").split(",")
if CSRF_TRUSTED_ORIGINS == [""]:
    CSRF_TRUSTED_ORIGINS = []

INSTALLED_APPS = ["scoped", "demo", "demo.stage"]
MIDDLEWARE = [
    "demo.stage.middleware.health",  # before the host is looked at
    "demo.stage.middleware.content_security_policy",
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",  # refuses what is not in ALLOWED_HOSTS
    "demo.stage.middleware.no_other_site",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "demo.urls"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
USE_TZ = True
TIME_ZONE = "UTC"

SCOPED = {
    # Stock Django, since 6.1, leaves requests open that nothing ever closes: do not wait for long.
    "SHUTDOWN_TIMEOUT": 1,
    "TEARDOWN_TIMEOUT": 2,  # people look on
    "LONG_STREAM": 1,
}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "filters": {"news": {"()": "demo.stage.logs.WhatIsNews"}},
    "handlers": {
        "console": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["news"]},
        "timeline": {"class": "demo.stage.timeline.LongStreams"},
    },
    "loggers": {"scoped": {"handlers": ["timeline"]}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
