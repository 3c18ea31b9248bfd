"""The ASGI application: ``uvicorn demo.asgi:application``."""

import os

from scoped.asgi import get_asgi_application

# Not setdefault(): what another project has left in the shell is not meant for the demo.
os.environ["DJANGO_SETTINGS_MODULE"] = "demo.settings"

application = get_asgi_application()
