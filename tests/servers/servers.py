"""The servers, as each is configured here."""

from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Server:
    name: str
    package: str
    options: str

    @property
    def version(self) -> str:
        return f"{self.package} {version(self.package)}"

    @property
    def command(self) -> str:
        """What follows ``python -m``."""
        return f"{self.package} {self.options} tests.servers.project:application"


# Each has a bound on how long its shutdown waits for requests, where it knows any: uvicorn without
# one never ends while a stream is open, nor does granian.
SERVERS = [
    *(
        Server(
            f"uvicorn {http} {loop}",
            "uvicorn",
            f"--http {http} --loop {loop} --port PORT --timeout-graceful-shutdown 1",
        )
        for http in ("h11", "httptools")
        for loop in ("asyncio", "uvloop")
    ),
    Server("hypercorn", "hypercorn", "--bind 127.0.0.1:PORT --graceful-timeout 4"),
    Server("granian", "granian", "--interface asgi --port PORT --workers-kill-timeout 4"),
    Server("daphne", "daphne", "--port PORT"),
    Server(
        "gunicorn",
        "gunicorn",
        "--worker-class asgi --bind 127.0.0.1:PORT --graceful-timeout 4 --no-control-socket",
    ),
]

# The one for which the dependency group `test` suffices.
EVERYDAY = SERVERS[0]
