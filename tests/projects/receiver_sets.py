"""Ticket 36714, first program: a receiver sets a ContextVar, the view answers with its value."""

import contextvars

from django.conf import settings
from django.core.signals import request_started
from django.http import HttpResponse
from django.urls import path

from scoped.asgi import get_asgi_application

request_id = contextvars.ContextVar("request_id", default="lost")


async def set_global_variable(**kwargs):
    request_id.set("request_id_value")


async def index(request):
    return HttpResponse(request_id.get())


urlpatterns = [path("", index)]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="ticket")
request_started.connect(set_global_variable)
application = get_asgi_application()
