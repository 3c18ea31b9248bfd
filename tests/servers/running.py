"""One of the servers while it runs."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import asyncpg
from redis import Redis

from tests.processes import ROOT, ps
from tests.servers.client import Client
from tests.servers.servers import Server
from tests.slowness import within

SECONDS = within(15)  # in which what is to happen has happened, on a busy machine too
REQUEST_SCOPED = ("db", "lingering", "subscription")
LIFESPAN_SCOPED = ("pool", "redis")


def eventually(
    condition: Callable[[], Any], otherwise: Callable[[], str], seconds: float = SECONDS
) -> Any:
    """Wait until the condition holds; what it then is."""
    deadline = time.monotonic() + seconds
    while not (outcome := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(otherwise())
        time.sleep(0.03)
    return outcome


class Site:
    """The project, served while the ``with`` lasts."""

    def __init__(self, server: Server, postgres_url: str, redis_url: str) -> None:
        self.server = server
        self.postgres_url = postgres_url
        self.redis_url = redis_url
        self.token = f"scoped-{uuid.uuid4().hex[:12]}"
        self._names = 0

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name, "log")
        self._log.touch()
        self._output = Path(self._folder.name, "output")
        try:
            self._start()
            self.warm_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._folder.cleanup()
        # A server that was killed leaves PostgreSQL at work on what nobody waits for.
        self.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1"
        )

    # The process

    def _start(self) -> None:
        for _ in range(5):
            self.port = _free_port()
            with self._output.open("ab") as output:
                self.process = subprocess.Popen(
                    [
                        *[sys.executable, "-X", "dev", "-m"],
                        *self.server.command.replace("PORT", str(self.port)).split(),
                    ],
                    stdout=output,
                    stderr=output,
                    cwd=ROOT,
                    env={
                        **os.environ,
                        "DJANGO_SETTINGS_MODULE": "",
                        "DATABASE_URL": self.postgres_url,
                        "REDIS_URL": self.redis_url,
                        "SERVERS_TOKEN": self.token,
                        "SERVERS_LOG": str(self._log),
                        "SERVERS_SERVER": self.server.package,
                    },
                    start_new_session=True,
                )
            eventually(lambda: self.process.poll() is not None or self._answers(), self.output)
            if self.process.poll() is None:
                return
            # Somebody else may have been faster to take the port.
            self._kill()
        raise AssertionError(f"{self.server.name} does not start:\n{self.output()}")

    def _answers(self) -> bool:
        try:
            return bool(self.state()["token"] == self.token)
        except (OSError, ValueError):
            return False

    def warm_up(self) -> None:
        with Client(self.port) as client:
            client.get(f"/async/{self.name()}")
        self.idle_tasks = Counter(self.state()["tasks"])

    def stop(self, number: signal.Signals) -> bool:
        """Tell it to shut down. Whether it then ends."""
        self.process.send_signal(number)
        return self.ends()

    def ends(self) -> bool:
        """Whether it ends in time, and all that it started."""
        with suppress(AssertionError):
            eventually(lambda: self.process.poll() is not None and not self._processes(), str)
        return self.process.poll() is not None and not self._processes()

    def listens(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), SECONDS):
                return True
        except OSError:
            return False

    def _processes(self) -> list[int]:
        """What runs in the session that was made for it."""
        lines = [line.split() for line in ps("-A", "-o", "pid=,sid=,stat=").splitlines()]
        return [
            int(pid)
            for pid, session, status in lines
            if int(session) == self.process.pid and not status.startswith("Z")
        ]

    def _kill(self) -> None:
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    # What it says

    def name(self) -> str:
        """For one more request: its path, and so its lines in the log, are its own."""
        self._names += 1
        return f"r{self._names}"

    def state(self) -> Any:
        with Client(self.port) as client:
            return json.loads(client.get("/state").body)

    def log(self, event: str = "", **facts: Any) -> list[dict[str, Any]]:
        """The lines of its log in which all that is so."""
        if event:
            facts["event"] = event
        # The last may be only half there.
        lines = self._log.read_text().split("\n")[:-1]
        return [line for line in map(json.loads, lines) if facts.items() <= line.items()]

    def wait_for(self, event: str, name: str) -> None:
        eventually(lambda: self.log(event, request=name), lambda: f"never {event}: {name}")

    # What PostgreSQL and Redis say

    def sql(self, query: str) -> Any:
        async def run() -> Any:
            connection = await asyncpg.connect(self.postgres_url)
            try:
                return await connection.fetch(query, self.token)
            finally:
                await connection.close()

        return asyncio.run(run())

    def backends(self) -> list[str]:
        """What it has PostgreSQL at work on; nothing, where that is idle."""
        rows = self.sql(
            "SELECT state, query FROM pg_stat_activity "
            "WHERE application_name = $1 AND backend_type = 'client backend' AND state <> 'idle'"
        )
        return [f"{row['state']}: {row['query']}" for row in rows]

    def subscribers(self) -> int:
        with Redis.from_url(self.redis_url) as redis:
            return int(redis.pubsub_numsub(self.token)[0][1])

    def publish(self) -> None:
        with Redis.from_url(self.redis_url) as redis:
            redis.publish(self.token, "go on")

    # What must be so

    def leftovers(self) -> list[str]:
        """What is open though no request is."""
        state = self.state()
        tasks = Counter(state["tasks"]) - self.idle_tasks
        return [
            *[f"not torn down: {resource}" for resource in self.not_torn_down()],
            *[f"task {task}" for task in sorted(tasks.elements())],
            *[
                f"{state['busy']} connection(s) of the pool in use"
                for _ in range(state["busy"] > 0)
            ],
            *[f"a backend is {backend}" for backend in self.backends()],
            *[f"{self.subscribers()} subscriber(s)" for _ in range(self.subscribers() > 0)],
        ]

    def is_clean(self) -> None:
        eventually(lambda: not self.leftovers(), lambda: "left: " + ", ".join(self.leftovers()))

    def not_torn_down(self, *also: str) -> list[str]:
        """Resources that were set up and not torn down again exactly once: what kinds."""
        log = [line for line in self.log() if line.get("resource") in (*REQUEST_SCOPED, *also)]
        counts = Counter((line["number"], line["event"]) for line in log)
        return sorted(
            {
                line["resource"]
                for line in log
                if not counts[line["number"], "set up"] == counts[line["number"], "torn down"] == 1
            }
        )

    def ended(self, name: str, failure: str | None, *resources: str) -> None:
        """
        The request had each of its resources once, their factories saw the failure, and
        `request_finished` came once, in its Context.
        """
        wanted = sorted(resources or ("db", "subscription"))

        def torn_down() -> list[dict[str, Any]]:
            return self.log("torn down", request=name)

        eventually(
            lambda: sorted(line["resource"] for line in torn_down()) == wanted,
            lambda: f"torn down: {[line['resource'] for line in torn_down()]}, not {wanted}",
        )
        set_up = [line["resource"] for line in self.log("set up", request=name)]
        assert sorted(set_up) == wanted, f"set up for {name}: {set_up}"
        seen = {line["failure"] for line in torn_down()}
        assert seen == {failure}, f"the factories saw {seen}, not {failure}"
        signals = len(self.log("finished", request=name))
        assert signals == 1, f"request_finished came {signals} times"

    def has_its_own(self, name: str, answer: dict[str, Any]) -> None:
        """What the request was given was set up for it, not for another one."""
        for resource in ("db", "subscription"):
            lines = self.log("set up", resource=resource, number=answer[resource])
            owners = [line["request"] for line in lines]
            assert owners == [name], f"{name} was given the {resource} of {owners}"

    def complaints(self) -> list[str]:
        """What Python and asyncio said about code that was not careful."""
        # When a sync view that runs async code is cancelled, asgiref's SyncToAsync looks away from
        # its thread's CancelledError if that was the faster (its `if exec_coro.done(): raise`).
        output = re.sub(
            r".*Future exception was never retrieved\nfuture: .*CancelledError.*", "", self.output()
        )
        return re.findall(r".*(?:never retrieved|never awaited|was destroyed).*", output)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
