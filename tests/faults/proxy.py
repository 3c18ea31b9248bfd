"""A TCP proxy whose line can go dead: open, and yet nothing comes through."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


class Proxy:
    """``url`` is the server's, by way of this proxy."""

    def __init__(self, listener: socket.socket, url: str) -> None:
        server = urlsplit(url)
        assert server.hostname
        assert server.port
        self.url = url.replace(f":{server.port}", f":{listener.getsockname()[1]}")
        self._listener = listener
        self._target = (server.hostname, server.port)
        self._alive = threading.Event()
        self._alive.set()
        self._sockets: list[socket.socket] = []

    def go_dead(self) -> None:
        """Hold back what either side sends, its end of the connection too."""
        self._alive.clear()

    def revive(self) -> None:
        """Forward again, first what was held back."""
        self._alive.set()

    def serve(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._alive.wait()
                sink.sendall(data)
        self._alive.wait()
        _shut(sink)

    def close(self) -> None:
        self.revive()
        _shut(self._listener)  # wakes accept(), which close() alone does not
        self._listener.close()
        for each in self._sockets:
            _shut(each)
            each.close()


def _shut(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(url: str) -> Iterator[Proxy]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Proxy(listener, url)
        accepting = threading.Thread(target=proxy.serve, daemon=True)
        accepting.start()
        try:
            yield proxy
        finally:
            proxy.close()
            accepting.join()
