"""An HTTP/1.1 client that can do what no good client does."""

import socket
import struct
from typing import NamedTuple, Self


class Answer(NamedTuple):
    status: int
    body: bytes


class Client:
    """
    One connection. With ``reluctant`` the operating system takes little for it,
    so that a server soon notices when it does not read.
    """

    def __init__(self, port: int, *, reluctant: bool = False) -> None:
        self.socket = socket.socket()
        if reluctant:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(30)
        try:
            self.socket.connect(("127.0.0.1", port))
        except OSError:
            self.socket.close()
            raise
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self, *, abruptly: bool = False) -> None:
        """Close the connection; abruptly: with a RST in place of a FIN."""
        if abruptly:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def get(self, path: str) -> Answer:
        self.send(request(path))
        return self.answer()

    def post(self, path: str, body: bytes) -> Answer:
        self.send(request(path, body))
        return self.answer()

    def answer(self) -> Answer:
        """The next response. Raises ConnectionError where it is not complete."""
        status, headers = self.head()
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = b"".join(iter(self.chunk, b""))
        elif (length := headers.get("content-length")) is not None:
            body = self.read(int(length))
        else:
            body = self.file.read()
        return Answer(status, body)

    def head(self) -> tuple[int, dict[str, str]]:
        status = self.line()
        headers: dict[str, str] = {}
        while line := self.line():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return int(status.split()[1]), headers

    def chunk(self) -> bytes:
        data = self.read(int(self.line(), 16))
        self.line()
        return data

    def line(self) -> str:
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError(f"the server closed the connection after {line!r}")
        return line.decode().rstrip("\r\n")

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) < size:
            raise ConnectionError(
                f"the server closed the connection {size - len(data)} bytes early"
            )
        return data


def request(path: str, body: bytes | None = None) -> bytes:
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: localhost"]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")
