"""The web server: uvicorn, which says where it is once it serves."""

import socket

import uvicorn


class WebServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, address: str) -> None:
        super().__init__(config)
        self.address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            print(f"The demo: {self.address} (Ctrl-C ends it)", flush=True)


def serve(listener: socket.socket, address: str) -> None:
    """Until a signal ends it, which is then raised again."""
    # Without a limit an open event stream would keep uvicorn from ever ending.
    config = uvicorn.Config(
        "demo.asgi:application", lifespan="on", timeout_graceful_shutdown=0.5, log_config=None
    )
    WebServer(config, address).run([listener])
