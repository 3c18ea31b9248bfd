"""
Ticket 36714, second program: the view sets a ContextVar to a new connection;
a receiver of ``request_finished`` reads it, closes it and sets it to None.
"""

import contextvars

from django.conf import settings
from django.core.signals import request_finished
from django.http import HttpResponse, JsonResponse
from django.urls import path

from scoped.asgi import get_asgi_application

db_connection = contextvars.ContextVar("db_connection", default=None)
log = []


class Connection:
    async def close(self):
        log.append("close connection")


async def get_or_create_connection():
    if db_connection.get() is None:
        db_connection.set(Connection())
    return db_connection.get()


async def close_connection(**kwargs):
    connection = db_connection.get()
    if connection is None:
        log.append("cannot clean - connection does not exist")
        return
    await connection.close()
    db_connection.set(None)


async def index(request):
    await get_or_create_connection()
    return HttpResponse("ok")


async def show_log(request):
    return JsonResponse(list(log), safe=False)


urlpatterns = [path("", index), path("log", show_log)]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="ticket")
request_finished.connect(close_connection)
application = get_asgi_application()
