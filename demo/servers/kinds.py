"""PostgreSQL and Redis: what the two differ in."""

import os
import re
import secrets
import signal

from demo.servers.watcher import Watcher

__all__ = ["KINDS", "Postgres", "Redis"]


class Postgres(Watcher):
    """
    Its superuser has a password that is thrown away, and so cannot come in. The role of
    the URL may have databases of its own, and no more: ``COPY ... FROM PROGRAM`` it may not.
    """

    name = "PostgreSQL"
    role = "LOGIN CREATEDB"
    end = signal.SIGINT  # without waiting for its clients, but with its shared memory freed

    def set_up(self) -> None:
        password = self.folder / "password"
        with open(os.open(password, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            self.account.give(file.fileno())
            file.write(secrets.token_hex(24))
        options = ["--auth=scram-sha-256", f"--pwfile={password}", "--username=postgres"]
        options += ["--encoding=UTF8", "--no-locale", "--no-sync", "-D", str(self.data)]
        initdb = self.spawn([str(self.program.with_name("initdb")), *options]).wait()
        password.unlink()
        if initdb != 0:
            raise RuntimeError("initdb failed.")
        # Without a connection, so that no password of the superuser's has to be known.
        single = ["--single", "-D", str(self.data), "-F", "-c", "exit_on_error=on", "postgres"]
        role = f"CREATE ROLE scoped {self.role} PASSWORD '{self.password}'\n"
        statements = f"{role}CREATE DATABASE scoped OWNER scoped\n"
        if self.spawn([str(self.program), *single], statements).wait():
            raise RuntimeError("the role and the database could not be made.")

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            # None: in macOS's temporary folders the path of a socket would be too long.
            "unix_socket_directories": "",
            # In the data folder, so that it goes with it.
            "dynamic_shared_memory_type": "mmap",
            "fsync": "off",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [str(self.program), "-D", str(self.data), *options]

    def url(self) -> str:
        return f"postgresql://scoped:{self.password}@127.0.0.1:{self.port}/scoped"

    def named(self, version: str) -> str:
        return f"PostgreSQL {_number(version)}"


class SuperuserPostgres(Postgres):
    role = "LOGIN SUPERUSER"


class Redis(Watcher):
    name = "Redis"
    end = signal.SIGKILL  # it has nothing to save, and takes 0.1 seconds to see another signal

    def command(self) -> list[str]:
        return [str(self.program), "-"]

    def configuration(self) -> str:
        lines = ["bind 127.0.0.1", f"port {self.port}", f"requirepass {self.password}"]
        return "\n".join([*lines, 'save ""', "appendonly no", ""])

    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def named(self, version: str) -> str:
        if version.startswith("Valkey"):
            return f"Valkey {_number(version)} (in place of Redis, same protocol)"
        return f"Redis {_number(version)}"


def _number(version: str) -> str:
    match = re.search(r"\d[\w.]*", version)
    return match[0] if match else version


KINDS: dict[str, type[Watcher]] = {
    "PostgreSQL": Postgres,
    "PostgreSQL, superuser": SuperuserPostgres,
    "Redis": Redis,
}
