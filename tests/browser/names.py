"""A name server that knows one name, as Docker's knows a service's containers."""

import socket
import struct
import threading
from typing import Self


class NameServer:
    """Answers every question for IPv4 addresses, while the ``with`` lasts."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self.socket.close()

    def _serve(self) -> None:
        while True:
            query, sender = self.socket.recvfrom(512)
            if not query:
                return
            question = query[12 : query.index(b"\0", 12) + 5]  # the name, its type and its class
            answers = [
                # A pointer to the name above, type A, class IN, a second to live, four bytes.
                struct.pack("!HHHIH4s", 0xC00C, 1, 1, 1, 4, socket.inet_aton(address))
                for address in self.addresses
            ]
            header = query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(answers), 0, 0)
            self.socket.sendto(header + question + b"".join(answers), sender)
