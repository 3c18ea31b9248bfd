"""What the demo says in its terminal."""

import asyncio
import logging

import asyncpg

from demo.endings import DeliberateError
from demo.stock import NoConnectionLeftError


class WhatIsNews(logging.Filter):
    """No traceback of what fails on purpose, and no word of streams that end with the server."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError) or _is_an_end(record):
            return False
        if error is not None and _on_purpose(error):
            record.exc_info = record.exc_text = None
        return True


def _is_an_end(record: logging.LogRecord) -> bool:
    """Uvicorn's error that a page is open while it ends: which is how it usually ends."""
    return record.name == "uvicorn.error" and str(record.msg).startswith("Cancel ")


def _on_purpose(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(_on_purpose, error.exceptions))
    return isinstance(
        error, DeliberateError | NoConnectionLeftError | asyncpg.ForeignKeyViolationError
    )
