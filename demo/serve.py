"""The web server: uvicorn, which says where it is once it serves, and can be told to serve anew."""

import socket

import uvicorn

from demo.stage import server


class WebServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, words: str) -> None:
        super().__init__(config)
        self.words = words
        self.restarts = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            print(self.words, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        server.begin_the_end()
        await super().shutdown(sockets)

    def restart(self) -> None:
        """What an ending asks for: the shutdown of a SIGTERM, without its end."""
        self.restarts = self.should_exit = True


def serve(listener: socket.socket, address: str) -> None:
    """Until a signal ends it, which is then raised again."""
    words = f"The demo: {address} (Ctrl-C ends it)"
    while True:
        # Open pages end at once. What else goes on has so many seconds.
        config = uvicorn.Config(
            "demo.asgi:application", lifespan="on", timeout_graceful_shutdown=2, log_config=None
        )
        web = WebServer(config, words)
        server.restarts_by(web.restart)
        # A copy, for uvicorn closes what it is given: who comes meanwhile waits in the queue.
        web.run([listener.dup()])
        if not web.restarts:
            return
        words = "Served anew."
