"""Types are behaviour: what mypy and pyright infer for a resource is its factory's type."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_layers import CORE, MODULES

ROOT = Path(__file__).parent.parent

PROGRAM = """\
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import Any

from scoped import current_scope, lifespan_scope, lifespan_scoped, request_scope, request_scoped
from scoped.testing import override
from scoped.wsgi import get_wsgi_application


class Connection: ...


@request_scoped
async def async_generator() -> AsyncIterator[Connection]:
    yield Connection()


@request_scoped
async def async_generator_2() -> AsyncGenerator[Connection, None]:
    yield Connection()


@request_scoped
async def coroutine_function() -> Connection:
    return Connection()


@request_scoped
async def untyped() -> AsyncIterator[Any]:  # of a library without types
    yield Connection()


def undecorated(function: Any) -> Any: ...


@request_scoped
@undecorated
async def decorated() -> AsyncIterator[Connection]:
    yield Connection()


@request_scoped
def untyped_function() -> Any:
    return Connection()


@lifespan_scoped
def untyped_settings() -> Any:
    return {}


@request_scoped(keyed=True)
def untyped_keyed(name: str) -> Any:
    return Connection()


@request_scoped
def generator() -> Iterator[Connection]:
    yield Connection()


@request_scoped
def generator_2() -> Generator[Connection, None, None]:
    yield Connection()


@request_scoped
def function() -> Connection:
    return Connection()


@lifespan_scoped
async def pool() -> AsyncIterator[Connection]:
    yield Connection()


@lifespan_scoped(eager=True)
async def eager_pool() -> AsyncIterator[Connection]:
    yield Connection()


@lifespan_scoped(eager=True)
def settings() -> dict[str, int]:
    return {}


@request_scoped()
async def maybe() -> Connection | None:
    return None


@request_scoped(until="response")
async def transaction() -> AsyncIterator[Connection]:
    yield Connection()


@request_scoped(until="response")
async def until_coroutine() -> Connection:
    return Connection()


@request_scoped(until="response")
def sync_transaction() -> Iterator[Connection]:
    yield Connection()


@request_scoped(until=None)
def until_function() -> Connection:
    return Connection()


@request_scoped(keyed=True)
async def lock(name: str, seconds: int = 60) -> AsyncIterator[Connection]:
    yield Connection()


@request_scoped(keyed=True)
async def keyed_coroutine(name: str) -> Connection:
    return Connection()


@request_scoped(keyed=True, until="response")
def keyed_generator(name: str) -> Iterator[Connection]:
    yield Connection()


@request_scoped(keyed=True)
def keyed_function(name: str, *others: int) -> Connection:
    return Connection()


@request_scope()
async def nightly(number: int, *, dry: bool = False) -> Connection:
    return Connection()


@request_scope()
def weekly(number: int) -> Connection:
    return Connection()


@override(lock, "a fake")
async def test_nightly(number: int) -> Connection:
    return Connection()


async def view() -> None:
    reveal_type(await lock("invoice-7"))  # Connection
    reveal_type(await lock("invoice-7", 30))  # Connection
    reveal_type(await lock.release("invoice-7"))  # None
    reveal_type(lock.get_nowait("invoice-7", 30))  # Connection
    reveal_type(await keyed_coroutine("a"))  # Connection
    reveal_type(keyed_generator("a"))  # Connection
    reveal_type(keyed_function("a", 1, 2))  # Connection
    keyed_generator.release("a")
    reveal_type(await nightly(1, dry=True))  # Connection
    reveal_type(weekly(1))  # Connection
    reveal_type(await test_nightly(1))  # Connection
    reveal_type(await async_generator())  # Connection
    reveal_type(await async_generator_2())  # Connection
    reveal_type(await coroutine_function())  # Connection
    reveal_type(await untyped())  # Any
    reveal_type(await decorated())  # Any
    reveal_type(await decorated.release())  # Any
    reveal_type(decorated.get_nowait())  # Any
    reveal_type(untyped_function())  # Any
    reveal_type(untyped_settings())  # Any
    reveal_type(untyped_keyed("a"))  # Any
    reveal_type(generator())  # Connection
    reveal_type(generator_2())  # Connection
    reveal_type(function())  # Connection
    reveal_type(await pool())  # Connection
    reveal_type(await eager_pool())  # Connection
    reveal_type(settings())  # dict[str, int]
    reveal_type(await maybe())  # Connection | None
    reveal_type(current_scope().is_open)  # bool
    reveal_type(current_scope().request)  # HttpRequest | None
    async with request_scope() as scope:
        reveal_type(scope)  # RequestScope
    async with lifespan_scope() as lifespan:
        reveal_type(lifespan)  # Scope
    with request_scope() as scope:
        reveal_type(scope.name)  # str
    reveal_type(await transaction())  # Connection
    reveal_type(await until_coroutine())  # Connection
    reveal_type(sync_transaction())  # Connection
    reveal_type(until_function())  # Connection
    reveal_type(await transaction.release())  # None
    reveal_type(await coroutine_function.release())  # None
    reveal_type(async_generator.get_nowait())  # Connection
    reveal_type(transaction.get_nowait())  # Connection
    reveal_type(pool.get_nowait())  # Connection
    reveal_type((await maybe()) or (maybe.get_nowait()))  # Connection | None
    generator.release()
    sync_transaction.release()
    reveal_type(get_wsgi_application())  # ScopedWSGIHandler
"""

WRONG = """\
from collections.abc import AsyncIterator

from scoped import lifespan_scoped, request_scope, request_scoped


@lifespan_scoped
async def pool() -> AsyncIterator[str]:
    yield "pool"


@request_scoped
async def db() -> AsyncIterator[str]:
    yield "db"


@request_scoped
def tenant() -> str:
    return "tenant"


@request_scoped(keyed=True)
async def lock(name: str) -> AsyncIterator[str]:
    yield name


@request_scope()
async def nightly(number: int) -> None: ...


async def view() -> None:
    number: int = await db()
    (await db()).no_such_method()
    await tenant()
    db(1)
    await tenant.release()
    await pool.release()
    tenant.get_nowait()
    number = db.get_nowait()
    request_scoped(until="view")
    db.release(1)
    await lock()
    await lock(1)
    await lock.release()
    lock.get_nowait(1)
    number = await lock("a")
    await nightly("1")
    nightly(1).no_such_method()
    db.release()


@request_scoped
async def needs_an_argument(request: object) -> None: ...
"""


def run(checker: str, path: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", checker, *options, str(path)],
        cwd=ROOT,
        env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def check(checker: str, path: Path, cache: Path) -> tuple[int, str]:
    if checker == "mypy":
        return run(checker, path, "--strict", "--cache-dir", str(cache))
    return run(checker, path, "--pythonpath", sys.executable)


# pyright is in the dependency group `lint`: .ci/run runs this file with it too.
CHECKERS = pytest.mark.parametrize(
    "checker", [name for name in ("mypy", "pyright") if importlib.util.find_spec(name)]
)


@CHECKERS
@pytest.mark.timeout(300)
def test_a_resource_has_the_type_of_its_factory(checker: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    code, output = check(checker, path, tmp_path / "cache")
    assert code == 0, output
    found = dict(
        re.findall(r"program\.py:(\d+):.*(?:Revealed type is|Type of .* is) ['\"](.*)['\"]", output)
    )
    expected = {
        str(number): line.rpartition("# ")[2]
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if "reveal_type" in line
    }
    assert len(expected) == 43

    def plain(name: str) -> str:
        return re.sub(r"(?:program|builtins|scoped(?:\.\w+)+|django\.http\.request)\.", "", name)

    assert {number: plain(name) for number, name in found.items()} == expected


@CHECKERS
@pytest.mark.timeout(300)
def test_a_wrong_use_is_an_error(checker: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    code, output = check(checker, path, tmp_path / "cache")
    assert code == 1, output
    lines = WRONG.splitlines()
    found = {int(number) for number in re.findall(r"wrong\.py:(\d+):(?:\d+)?[ :-]*error", output)}
    first = lines.index("async def view() -> None:") + 1
    assert set(range(first + 1, first + 19)) <= found, output
    declared = len(lines)
    assert found & {declared, declared - 1}, output
    assert found <= {*range(first + 1, first + 19), declared, declared - 1}, output


@CHECKERS
@pytest.mark.timeout(300)
def test_the_core_is_clean_in_strict_mode(checker: str, tmp_path: Path) -> None:
    modules = [str(MODULES[name].relative_to(ROOT)) for name in CORE]
    options = (
        ["--strict", "--cache-dir", str(tmp_path / "cache")]
        if checker == "mypy"
        else ["--pythonpath", sys.executable]
    )
    code, output = run(checker, Path("scoped/__init__.py"), *options, *modules)
    assert code == 0, output
