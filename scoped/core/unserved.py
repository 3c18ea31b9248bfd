"""
A lifespan in a server that does not say when it ends: daphne and WSGI's have no lifespan protocol,
others were told not to speak it. It ends with the event loop's tasks, or with the process.
"""

import asyncio
import atexit
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from scoped.core.waits import run_without_loop

if TYPE_CHECKING:
    from scoped.core.lifespan import LifespanScope

__all__ = ["Stay", "tell_of_no_server"]

logger = logging.getLogger("scoped")


def tell_of_no_server() -> None:
    logger.warning(
        "A request needs the lifespan, and the server has not begun one: it begins now, and "
        "ends with the event loop, if the server lets that end. Have the server speak ASGI's "
        "lifespan protocol (not `uvicorn --lifespan off`); have an application that mounts "
        "this one pass its lifespan on, or hold `async with lifespan_scope():` in its own. "
        "daphne has none: there it ends at the interpreter's exit."
    )


class Stay:
    """Holds the lifespan until then."""

    def __init__(self, lifespan: "LifespanScope") -> None:
        self.lifespan = lifespan
        if lifespan.loop is not None:
            lifespan.in_loop(self._begin_to_wait)
        atexit.register(self._close_at_exit)

    def over(self) -> None:
        atexit.unregister(self._close_at_exit)

    def _begin_to_wait(self) -> None:
        self.lifespan.owner = self.lifespan.context().run(asyncio.create_task, self._wait())

    async def _wait(self) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await self.lifespan.drop()

    def _close_at_exit(self) -> None:
        """
        daphne stops the event loop without a word to its tasks. Run it on, for the
        requests that were cancelled and for what the lifespan holds.
        """
        loop, waiting = self.lifespan.loop, self.lifespan.owner
        if loop is None:
            run_without_loop(self.lifespan.close())
            return
        if waiting is None or waiting.done() or loop.is_closed() or loop.is_running():
            return
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(waiting)
