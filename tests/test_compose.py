"""
docker-compose.yml and the Dockerfile, as far as can be known without Docker. More
of it is in tests/browser/: the proxy, and the Dockerfile's steps.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from redis import Redis

from demo.servers import start_postgres, start_redis
from tests.processes import ROOT, Demo, Visitor


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file as compose reads it where the environment sets none of its variables."""
    text = (ROOT / "docker-compose.yml").read_text()
    parsed: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return parsed


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "demo" / "Dockerfile").read_text().replace("\\\n", "")
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def arguments(instructions: list[tuple[str, str]], name: str) -> Iterator[str]:
    return (rest for instruction, rest in instructions if instruction == name)


def test_it_runs_the_demo_with_real_postgres_and_redis(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"proxy", "web", "postgres", "redis"}
    assert services["proxy"]["image"] == "nginx:1-alpine"
    assert services["postgres"]["image"] == "postgres:18"
    assert services["redis"]["image"] == "redis:8"
    assert services["web"]["build"] == {"context": ".", "dockerfile": "demo/Dockerfile"}


def test_the_web_service_sets_what_the_demo_s_settings_read_and_nothing_else(
    compose: dict[str, Any],
) -> None:
    settings = (ROOT / "demo" / "settings.py").read_text()
    read = re.findall(r"""(?:environ\.get|_address_of)\("(\w+)\"""", settings)
    assert settings.count("environ") == 3  # one of them in _address_of()
    assert sorted(compose["services"]["web"]["environment"]) == sorted(read)


def test_the_page_is_the_only_thing_published_and_only_on_loopback(
    compose: dict[str, Any],
) -> None:
    published = {
        name: service["ports"]
        for name, service in compose["services"].items()
        if "ports" in service
    }
    assert published == {"proxy": ["127.0.0.1:8000:8000"]}
    assert not any("network_mode" in service for service in compose["services"].values())


def test_a_service_waits_until_those_it_needs_are_healthy(compose: dict[str, Any]) -> None:
    services = compose["services"]
    healthy = {"condition": "service_healthy"}
    assert services["proxy"]["depends_on"] == {"web": healthy}
    assert services["web"]["depends_on"] == {"postgres": healthy, "redis": healthy}
    for service in services.values():
        kind, *command = service["healthcheck"]["test"]
        assert kind in ("CMD", "CMD-SHELL")
        assert command


def test_the_messages_are_kept_where_postgres_18_has_its_data(compose: dict[str, Any]) -> None:
    # Up to 17 it was /var/lib/postgresql/data; docker-library/postgres, pull request 1259.
    assert compose["services"]["postgres"]["volumes"] == ["messages:/var/lib/postgresql"]
    assert compose["volumes"] == {"messages": None}


def test_no_password_is_fixed(compose: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    defaults = re.findall(r"\$\{(\w+):-([^}]*)\}", text)
    passwords = {default for name, default in defaults if name.endswith("_PASSWORD")}
    assert {name for name, _ in defaults} == {
        *("POSTGRES_PASSWORD", "REDIS_PASSWORD"),
        *("DJANGO_SECRET_KEY", "ALLOWED_HOSTS"),
    }
    (default,) = passwords
    assert ("DJANGO_SECRET_KEY", "") in defaults
    assert default not in re.sub(r"\$\{[^}]*\}", "", text)
    services = compose["services"]
    assert default == services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert default == services["redis"]["command"][-1]
    assert default == services["redis"]["environment"]["REDISCLI_AUTH"]


def test_the_image_has_what_it_needs_and_no_root(instructions: list[tuple[str, str]]) -> None:
    assert instructions[0] == ("FROM", "python:3.13-slim")
    (user,) = arguments(instructions, "USER")
    assert user not in ("root", "0")
    names = [name for name, _ in instructions]
    assert names.index("USER") < names.index("CMD")
    (install,) = arguments(instructions, "RUN")
    assert re.search(r"pip install [^&]*\. --group web$", install)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    assert {"include-group": "web"} in groups["demo"]  # which adds what the image has no need of
    assert not any("embedded" in str(package) for package in groups["web"])


def test_what_the_image_copies_is_there_and_in_the_build_s_context(
    instructions: list[tuple[str, str]],
) -> None:
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [source for rest in arguments(instructions, "COPY") for source in rest.split()[:-1]]
    assert sorted(copied) == sorted(allowed)
    assert [source for source in copied if not (ROOT / source).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "scoped", "demo"} < set(copied)
    read_by_its_build = {"README.md", "hatch_build.py", *project["license-files"]}
    assert read_by_its_build < set(copied)


def test_the_web_service_s_command_and_environment_serve_the_page(
    compose: dict[str, Any], instructions: list[tuple[str, str]]
) -> None:
    web, broker = compose["services"]["web"], compose["services"]["redis"]
    (default,) = arguments(instructions, "CMD")
    command = json.loads(default)
    assert "command" not in web
    assert "entrypoint" not in web
    assert command[-4:] == ["--host", "0.0.0.0", "--port", "8000"]
    with start_postgres() as database, start_redis() as redis, Redis.from_url(redis.url) as client:
        password = broker["command"][broker["command"].index("--requirepass") + 1]
        client.config_set("requirepass", password)
        hosts = {
            "@postgres:5432": re.search(r"127\.0\.0\.1:\d+", database.url),
            "@redis:6379": re.search(r"127\.0\.0\.1:\d+", redis.url),
        }
        environment = dict(web["environment"])
        for name, value in environment.items():
            for host, local in hosts.items():
                assert local
                environment[name] = environment[name].replace(host, f"@{local[0]}")
            assert (environment[name] != value) == name.endswith("_URL")
        local_command = [
            {"python": sys.executable, "0.0.0.0": "127.0.0.1", "8000": "0"}.get(word, word)
            for word in command
        ]
        with Demo(command=local_command, **environment) as demo, Visitor(demo) as visitor:
            assert visitor.write("from compose").status_code == 303
            assert "from compose" in visitor.page()
            assert password not in demo.output
            kind, *check = web["healthcheck"]["test"]
            assert kind == "CMD"
            local_check = [
                word.replace("http://127.0.0.1:8000/", demo.url)
                if word != "python"
                else sys.executable
                for word in check
            ]
            assert local_check[-1] != check[-1]
            assert subprocess.run(local_check, check=False).returncode == 0
        unhealthy = subprocess.run(local_check, stderr=subprocess.DEVNULL, check=False)
        assert unhealthy.returncode != 0
