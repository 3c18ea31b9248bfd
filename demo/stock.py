"""
The same without scoped: Django's own handler, and what ticket 36714 calls the natural way. A
ContextVar holds the connection of the request, and a receiver of ``request_finished`` gives it
back; if it is called, and if it sees what the view has set.
"""

from contextvars import ContextVar

from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished

from demo.stage.pools import stock_pool as pool  # of ten connections, as scoped's

held = ContextVar("held", default=None)


async def db():
    if held.get() is None:
        held.set(await (await pool()).acquire(timeout=1))
    return held.get()


async def give_back(**kwargs):
    if (connection := held.get()) is not None:
        held.set(None)
        await (await pool()).release(connection)


request_finished.connect(give_back, sender=ASGIHandler)
