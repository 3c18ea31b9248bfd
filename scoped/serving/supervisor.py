"""
The server's task: it waits for the request's own, which serves it, and for the client
to go away.
"""

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from scoped.core.waits import outlast, set_done
from scoped.dispatch import raise_first

if TYPE_CHECKING:
    from scoped.serving.exchange import Exchange, Receive

__all__ = ["supervise"]


async def supervise(exchange: "Exchange", receive: "Receive") -> None:
    """
    Serve the request. What it fails with is raised; the server's cancellation, which ends
    the request, is raised when that has ended, be it repeated at every turn until then.
    """
    child = exchange.begin()
    cancellation: asyncio.CancelledError | None = None
    if exchange.is_new:
        try:
            # A request that never waits is over after its first turn: nobody need listen.
            await asyncio.sleep(0)
        except asyncio.CancelledError as error:
            cancellation = error
            exchange.cut_off()
    if not child.done():
        exchange.listen(receive)
    while not child.done():
        woken = child.get_loop().create_future()
        callback = partial(set_done, woken)
        child.add_done_callback(callback)
        try:
            await woken
        except asyncio.CancelledError as error:
            cancellation = error
            exchange.cut_off()
        finally:
            child.remove_done_callback(callback)
    if exchange.listener is not None:
        exchange.listener.cancel()
        cancellation = await outlast(exchange.listener) or cancellation
    failure, stray = None if child.cancelled() else child.exception(), exchange.stray
    try:
        if cancellation is not None:
            raise_first([cancellation, failure])
        if stray is not None:
            raise_first([stray, failure])
        if not (exchange.client_gone and child.cancelled()):
            child.result()
    finally:
        exchange.stray = None
        del cancellation, stray, failure  # no cycle with this frame
