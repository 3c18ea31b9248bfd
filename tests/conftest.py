import os
import signal
from collections.abc import Iterator

import django
import pytest
from django.core.signals import request_finished, request_started
from django.db import close_old_connections

from demo.servers import postgres, redis
from scoped.core.lifespan import eager, lifespans
from scoped.core.waits import run_without_loop
from tests.slowness import FACTOR, within

# A shell that runs the tests in the background has them, and so the servers they start, ignore
# Ctrl-C, which some of those are to be ended with.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
django.setup()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server that all tests share."""
    with postgres() as server:
        yield server.url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server that all tests share; it may be Valkey."""
    with redis() as server:
        yield server.url


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "only_if(condition, *, reason): deselected where it cannot be, so not skipped",
        "fast: starts no server and no process; not to be set, it is found out",
    ):
        config.addinivalue_line("markers", marker)


# A test whose module has one of these may start a process.
PROCESSES = {"subprocess", "uvicorn", "Demo", "Project", "start_redis", "CHECKERS"}
RUN_APART = ("servers", "faults", "demo", "browser", "neighbours", "fuzz")


def is_fast(item: pytest.Item) -> bool:
    names = vars(getattr(item, "module", None)).keys()
    fixtures = getattr(item, "fixturenames", [])
    return not (
        PROCESSES & names
        or {"postgres_url", "redis_url"} & set(fixtures)
        or any(item.get_closest_marker(name) for name in RUN_APART)
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    What can be run here must run: a skip means that something is missing, a failure in CI.
    What is fast is found out, and every test's timeout is longer where the machine is slower.
    """
    impossible = [
        item for item in items if any(not mark.args[0] for mark in item.iter_markers("only_if"))
    ]
    if impossible:
        config.hook.pytest_deselected(items=impossible)
        items[:] = [item for item in items if item not in impossible]
    for item in items:
        if is_fast(item):
            item.add_marker(pytest.mark.fast)
    if FACTOR > 1:
        default = config.getoption("timeout") or config.getini("timeout")
        for item in items:
            own = item.get_closest_marker("timeout")
            seconds = float(own.args[0] if own else default)
            item.add_marker(pytest.mark.timeout(within(seconds)), append=False)


@pytest.fixture(autouse=True)
def _djangos_receivers_are_left_alone() -> Iterator[None]:
    """Django's test clients disconnect one for a request, and lose it where that fails."""
    yield
    for sent in (request_started, request_finished):
        if close_old_connections not in sent._live_receivers(None)[0]:  # type: ignore[attr-defined]
            sent.connect(close_old_connections)
            pytest.fail("close_old_connections was disconnected: later tests would go without it")


@pytest.fixture(autouse=True)
def _the_demos_pools_are_its_own() -> None:
    """Some tests import the demo, whose pools are set up wherever a lifespan opens: not in ours."""
    eager[:] = [access for access in eager if not access.__module__.startswith("demo.")]


@pytest.fixture(autouse=True)
def _no_lifespan_is_left() -> Iterator[None]:
    """
    A request that implies a lifespan leaves it open to the end of its event loop, or of the
    process where there is none. Here each test is followed by others, which look at what is open.
    """
    yield
    if lifespan := lifespans.get(None):
        run_without_loop(lifespan.close())
    left = [
        loop for loop, one in lifespans.items() if one.is_open and (not loop or loop.is_closed())
    ]
    for loop in left:
        del lifespans[loop]
    assert not left, "the test's event loop has ended, and its lifespan is still open"
