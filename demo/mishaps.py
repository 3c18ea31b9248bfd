"""Resources that go wrong on purpose. What else the request holds is torn down all the same."""

import asyncio

from demo.resources import db
from scoped import request_scoped


class DeliberateError(Exception):
    """What fails here fails on purpose."""


@request_scoped
async def refused():
    await db()
    await asyncio.sleep(0.3)
    raise DeliberateError("The set-up raises.")


@request_scoped
async def careless():
    await db()
    yield
    await asyncio.sleep(0.3)
    raise DeliberateError("The teardown raises.")


@request_scoped
async def stuck():
    await db()
    yield
    await asyncio.sleep(3600)  # cancelled after SCOPED["TEARDOWN_TIMEOUT"] seconds
