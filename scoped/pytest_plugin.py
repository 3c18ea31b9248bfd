"""
A plugin of pytest's. In the ``conftest.py`` of a project's root::

    pytest_plugins = ["scoped.pytest_plugin"]

It brings two fixtures, for tests run by pytest-asyncio or by anyio (on asyncio), in event
loops of any scope, and for sync tests:

``scoped_client``
    the client of ``scoped.testing`` that suits the test, ``AsyncClient`` or ``Client``, with
    the lifespan held open

``request_scope``
    a request scope, open in the test and in the fixtures that come after. A test that fails
    reaches the factories, as a view does that raises: they roll back.

Either raises AssertionError at its end where a test that has passed leaves a request scope open.
"""

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from inspect import iscoroutinefunction
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connections

import scoped
from scoped.core.request import RequestScope
from scoped.serving.threads import idle_ended
from scoped.testing import AsyncClient, Client, assert_no_leaks

__all__ = ["request_scope", "scoped_client"]


@pytest.fixture
def scoped_client(request: pytest.FixtureRequest) -> Any:
    """``AsyncClient`` in an async test, ``Client`` in a sync one, in a lifespan of its own."""
    _begin_with("transactional_db", "db", request=request)
    return request.getfixturevalue(_of_its_runner("client", request))


@pytest.fixture
def request_scope(request: pytest.FixtureRequest) -> RequestScope:
    """A request scope that sees whether the test fails. It is open for what comes after it."""
    _begin_with("transactional_db", "db", "scoped_client", request=request)
    scope: RequestScope = request.getfixturevalue(_of_its_runner("scope", request))
    return scope


def _begin_with(*fixtures: str, request: pytest.FixtureRequest) -> None:
    """What the test asks for too and is to outlast what is torn down with the fixture."""
    for name in fixtures:
        if name in request.fixturenames:
            request.getfixturevalue(name)


def _of_its_runner(name: str, request: pytest.FixtureRequest) -> str:
    """That of the fixtures below which runs where the test does."""
    marker = request.node.get_closest_marker("asyncio")
    # It may be the mark of a whole module: pytest-asyncio makes items of its own of what is async.
    if marker is not None and type(request.node).__module__.startswith("pytest_asyncio"):
        loop_scope = marker.kwargs.get("loop_scope") or request.config.getini(
            "asyncio_default_test_loop_scope"
        )
        return f"_scoped_{name}_{loop_scope}"
    # Likewise: it may be a fixture of each test.
    if "anyio_backend" in request.fixturenames and _is_async(request.function):
        return f"_scoped_{name}_anyio"
    return f"_scoped_{name}_sync"


def _is_async(test: Any) -> bool:
    return iscoroutinefunction(getattr(getattr(test, "hypothesis", None), "inner_test", test))


# What a test has failed with, while one of the fixtures wants to know.
_failures = pytest.StashKey[list[BaseException]]()


@pytest.fixture
def _scoped_failures(request: pytest.FixtureRequest) -> Generator[list[BaseException], None, None]:
    failures: list[BaseException] = []
    request.node.stash[_failures] = failures
    yield failures
    del request.node.stash[_failures]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield  # in which pytest's unittest plugin finds out what a TestCase has failed with
    if _failures in item.stash and call.when != "teardown":
        if call.excinfo is None:
            if report.failed:  # by passing, where it was to fail
                item.stash[_failures].append(pytest.fail.Exception(str(report.longrepr)))
        elif not call.excinfo.errisinstance(pytest.skip.Exception):
            item.stash[_failures].append(call.excinfo.value)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def _interrupted(item: pytest.Item) -> Generator[None, Any, Any]:
    """There is no report of it."""
    try:
        return (yield)
    except (KeyboardInterrupt, pytest.exit.Exception) as error:
        nobodys: list[BaseException] = []
        item.stash.get(_failures, nobodys).append(error)
        raise


pytest_runtest_setup = pytest_runtest_call = _interrupted


@contextmanager
def _failing_as(failures: list[BaseException]) -> Generator[Callable[[], None], None, None]:
    """What is called in the block, after the test, fails there as the test has failed."""

    def fail() -> None:
        if failures:
            raise failures[0]

    try:
        with assert_no_leaks():
            yield fail
    except BaseException as error:
        if error not in failures:  # those are reported already
            raise


@asynccontextmanager
async def _no_connections_left() -> AsyncGenerator[None, None]:
    """
    Django's belong to the threads that async code has its ORM calls run in. They are not the
    main thread, whose connections are the test's: so nobody else closes them, and the test
    database could not be dropped.
    """
    try:
        yield
    finally:
        await idle_ended()
        await sync_to_async(connections.close_all)()


@pytest.fixture(name="_scoped_client_sync")
def _client_sync(_scoped_failures: list[BaseException]) -> Generator[Client, None, None]:
    with _failing_as(_scoped_failures) as fail_with_the_test:
        with Client() as client:
            yield client
        fail_with_the_test()


@pytest.fixture(name="_scoped_scope_sync")
def _scope_sync(_scoped_failures: list[BaseException]) -> Generator[RequestScope, None, None]:
    with _failing_as(_scoped_failures) as fail_with_the_test:
        with scoped.request_scope() as scope:
            yield scope
            fail_with_the_test()


# A new function each time: pytest-asyncio marks the one that it makes a fixture of.


def _client() -> Callable[..., AsyncGenerator[AsyncClient, None]]:
    async def client(_scoped_failures: list[BaseException]) -> AsyncGenerator[AsyncClient, None]:
        with _failing_as(_scoped_failures) as fail_with_the_test:
            async with _no_connections_left(), AsyncClient() as client:
                yield client
            fail_with_the_test()

    return client


def _scope() -> Callable[..., AsyncGenerator[RequestScope, None]]:
    async def scope(_scoped_failures: list[BaseException]) -> AsyncGenerator[RequestScope, None]:
        with _failing_as(_scoped_failures) as fail_with_the_test:
            async with _no_connections_left(), scoped.request_scope() as scope:
                yield scope
                fail_with_the_test()

    return scope


_client_anyio = pytest.fixture(name="_scoped_client_anyio")(_client())
_scope_anyio = pytest.fixture(name="_scoped_scope_anyio")(_scope())

with suppress(ImportError):
    import pytest_asyncio

    # It runs a fixture in the event loop that the fixture names, be the test's what it may.
    for _where in ("function", "class", "module", "package", "session"):
        for _what, _make in (("client", _client), ("scope", _scope)):
            _name = f"_scoped_{_what}_{_where}"
            globals()[_name] = pytest_asyncio.fixture(name=_name, loop_scope=_where)(_make())
