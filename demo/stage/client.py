"""A client of the demo's own server, over a connection as any other's: what a run sends with."""

import asyncio
import re
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

PATIENCE = 20  # seconds, after which something is wrong that the run is not about


@dataclass
class Answer:
    status: int | None  # None: none came
    is_whole: bool
    seconds: float


async def post(
    address: tuple[str, int], path: str, headers: dict[str, str], leave_after: float | None = None
) -> Answer:
    """Send a POST without a body, and read the answer to its end, or go away before it comes."""
    began, received = perf_counter(), b""
    try:
        async with asyncio.timeout(PATIENCE if leave_after is None else leave_after):
            reader, writer = await asyncio.open_connection(*address)
            try:
                lines = {**headers, "Content-Length": "0", "Connection": "close"}.items()
                head = "".join(f"{name}: {value}\r\n" for name, value in lines)
                writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1"))
                with suppress(ConnectionError):  # it broke off
                    while part := await reader.read(65536):
                        received += part
            finally:
                writer.close()
    except TimeoutError:
        return Answer(None, False, perf_counter() - began)
    status = re.match(rb"HTTP/1\.1 (\d{3})", received)
    return Answer(int(status[1]) if status else None, _is_whole(received), perf_counter() - began)


def _is_whole(received: bytes) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    if length := re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE):
        return len(body) == int(length[1])
    return bool(end) and body.endswith(b"0\r\n\r\n")  # the last chunk, which is empty
