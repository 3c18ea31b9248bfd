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
# Where it is not in the URL, in which it would have to be quoted. (PostgreSQL's own PGPASSWORD is
# read by asyncpg itself.)
REDIS_PASSWORD = os.environ.get("REDIS_PASSWORD") or None

DEBUG = False
# Nothing here outlives the process that signs it.
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or get_random_secret_key()
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]").split(",")
# Where a proxy in front speaks TLS: what the browser calls the page, https://demo.example.
CSRF_TRUSTED_ORIGINS = os.environ.get("CSRF_TRUSTED_ORIGINS", "").split(",")
if CSRF_TRUSTED_ORIGINS == [""]:
    CSRF_TRUSTED_ORIGINS = []

INSTALLED_APPS = ["scoped", "demo"]
MIDDLEWARE = [
    "demo.middleware.health",  # before the host is looked at
    "demo.middleware.content_security_policy",
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",  # refuses what is not in ALLOWED_HOSTS
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "demo.urls"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
USE_TZ = True
TIME_ZONE = "UTC"

# Stock Django, since 6.1, leaves requests open that nothing ever closes: do not wait for long.
SCOPED = {"SHUTDOWN_TIMEOUT": 1}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "filters": {"news": {"()": "demo.logs.WhatIsNews"}},
    "handlers": {
        "console": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["news"]}
    },
    "root": {"handlers": ["console"], "level": "WARNING"},
}
