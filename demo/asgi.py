"""The ASGI application: ``uvicorn demo.asgi:application``."""

import os

from scoped.asgi import get_asgi_application

# Not setdefault(): what another project has left in the shell is not meant for the demo.
os.environ["DJANGO_SETTINGS_MODULE"] = "demo.settings"

scoped_application = get_asgi_application()

from django.core.handlers.asgi import ASGIHandler  # noqa: E402

from demo.stage.timeline import Recorder  # noqa: E402

stock_application = ASGIHandler()


async def side_by_side(scope, receive, send):
    is_stock = scope["type"] == "http" and scope["path"].startswith("/stock/")
    await (stock_application if is_stock else scoped_application)(scope, receive, send)


application = Recorder(side_by_side)
