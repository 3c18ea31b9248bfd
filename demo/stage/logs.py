"""What the demo says in its terminal."""

import asyncio
import logging

import asyncpg

from demo.mishaps import DeliberateError


class WhatIsNews(logging.Filter):
    """Not what fails on purpose, and no word of streams that end with the server."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError) or _is_an_end(record):
            return False
        if error is not None and _on_purpose(error, record):
            record.exc_info = record.exc_text = None
            return record.name == "scoped"  # what it says of a teardown is worth a line
        return not (record.name == "django.request" and _path(record).endswith("/missing"))


def _is_an_end(record: logging.LogRecord) -> bool:
    """
    Uvicorn's error that a page is open while it ends, which is how it usually ends; and scoped's,
    that requests are which stock Django has lost.
    """
    if record.name == "uvicorn.error":
        return str(record.msg).startswith("Cancel ")
    text = record.getMessage() if record.name == "scoped" else ""
    if "has been streaming" in text:
        return "GET /events " in text  # the pages are meant to
    return "still open after" in text and " /stock/" in text and " /scoped/" not in text


def _on_purpose(error: BaseException, record: logging.LogRecord) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_on_purpose(one, record) for one in error.exceptions)
    if isinstance(error, DeliberateError | asyncpg.ForeignKeyViolationError):
        return True
    if not isinstance(error, TimeoutError):
        return False
    return "demo.mishaps." in str(error) or _path(record).startswith(("/stock/", "/scoped/"))


def _path(record: logging.LogRecord) -> str:
    return str(getattr(getattr(record, "request", None), "path", ""))
