"""
django-injector, which changes the views of its whole process: the page's view, asked twice, and
once over ASGI. Prints as JSON the answers, whether the connections are open, and what ASGI met.
"""

import asyncio
import gc
import json

import django
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["*"],
    INJECTOR_MODULES=["before.Connections"],
    INSTALLED_APPS=["django_injector"],
    LOGGING_CONFIG=None,
    MIDDLEWARE=["django_injector.apps.inject_request_middleware"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="injector",
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
)

import before  # noqa: E402  (the page's)
from connections import Connection  # noqa: E402
from django.test import AsyncClient, Client  # noqa: E402
from django.urls import path  # noqa: E402

kept = []


class Kept(Connection):
    def __init__(self):
        kept.append(self)


before.Connection = Kept
urlpatterns = [path("", before.index)]
django.setup()

answers = [Client().get("/").content.decode() for _ in range(2)]
gc.collect()
try:
    asyncio.run(AsyncClient().get("/"))
except RuntimeError as error:
    refused = str(error)
print(json.dumps({"answers": answers, "open": [one.is_open for one in kept], "refused": refused}))
