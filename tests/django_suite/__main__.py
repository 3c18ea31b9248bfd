"""
Run Django's own tests, with our handler, our receivers and our client handler
in place. Fails unless all that should run has run, and passed.
"""

import argparse
import ast
import contextvars
import faulthandler
import os
import runpy
import sys
import unittest
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import django

from tests.django_suite.sources import default_cache, django_source
from tests.ours_in_place import put_ours_in_place

# What reaches an ASGI handler, AsyncClient or a signal; and what WSGI and sync test client requests
# pass through, for our sync receivers are connected there. No database server is needed.
LABELS = [
    "asgi",
    "staticfiles_tests.test_handlers",
    "signals",
    "dispatch",
    "handlers",
    "async",
    "wsgi",
    "test_client",
    "test_client_regress",
    "builtin_server",
    "servers",
    "httpwrappers",
    "requests_tests",
    "responses",
    "middleware",
    "middleware_exceptions",
    "csrf_tests",
    "sessions_tests",
    "cache",
    "view_tests",
    "logging_tests",
    "file_uploads",
    "auth_tests.test_remote_user",
]

# Fewer than that in all of LABELS, skipped ones not counted: something is missing.
FLOOR = 2000

# Tests that may fail, by id, and why that says nothing about us.
KNOWN = {
    "file_uploads.tests.DirectoryCreationTests.test_readonly_root": (
        "root may write into a read-only folder; it fails with stock Django too"
    ),
}

# Django's own fix of ticket 36714 came with tests of asend(): ours is to pass them everywhere.
ASEND_TESTS_FROM = "6.1.3"
ASEND_TESTS = 6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.django_suite", description=__doc__)
    parser.add_argument("labels", nargs="*", default=LABELS, help="as for Django's runtests.py")
    parser.add_argument("--stock", action="store_true", help="put nothing in place: to compare")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="%(default)s")
    parser.add_argument(
        "--floor", type=int, default=FLOOR, help="fail where fewer tests have run (%(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=900, help="in seconds, for it all (%(default)s)"
    )
    options = parser.parse_args()
    # Some tests wait for ever for a view that a broken handler does not call.
    faulthandler.dump_traceback_later(options.timeout, exit=True)
    cache = options.cache.resolve()
    source = django_source(django.__version__, cache)

    served = {} if options.stock else put_ours_in_place()
    result = run_django_tests(source, options.labels)
    if result is None:
        sys.exit(f"The tests of Django {django.__version__} did not run.")
    summary, problems = [tally(result)], unexpected(result)
    if result.testsRun - len(result.skipped) < options.floor:
        problems.append(f"too few tests ran: expected at least {options.floor}")
    for kind, handler in served.items():
        summary.append(f"{handler.served} {kind} requests")
        if not handler.served:
            problems.append(f"our handler served no {kind} request")
        if handler.without_scope:
            problems.append(f"{handler.without_scope} {kind} requests had no scope open")
    if not options.stock:
        result = run_asend_tests(django_source(ASEND_TESTS_FROM, cache))
        summary.append(f"asend: {tally(result)}")
        problems += unexpected(result)
        if result.testsRun != ASEND_TESTS:
            problems.append(f"{result.testsRun} asend tests ran: expected {ASEND_TESTS}")

    for problem in problems:
        print(f"Problem: {problem}")
    whose, verdict = "stock" if options.stock else "scoped", "FAILED" if problems else "OK"
    print(f"Django {django.__version__}, {whose}: {'; '.join(summary)}. {verdict}")
    return 1 if problems else 0


def run_django_tests(source: Path, labels: list[str]) -> unittest.TestResult | None:
    """In this process, for here ours is in place."""
    from django.test.runner import DiscoverRunner

    results: list[unittest.TestResult] = []
    suite_result = DiscoverRunner.suite_result

    def keep(self: Any, suite: Any, result: unittest.TestResult, **kwargs: Any) -> int:
        results.append(result)
        return suite_result(self, suite, result, **kwargs)

    DiscoverRunner.suite_result = keep
    tests = source / "tests"
    os.chdir(tests)
    sys.path.insert(0, str(tests))
    sys.argv = ["runtests.py", "--parallel=1", "--noinput", "--settings=test_sqlite", *labels]
    with suppress(SystemExit):  # says that something failed; the result says what
        runpy.run_path(str(tests / "runtests.py"), run_name="__main__")
    return results[0] if results else None


def run_asend_tests(source: Path) -> unittest.TestResult:
    """
    The class is taken out of its module, which other versions of Django cannot
    import, and is given a Signal that is sent with our functions.
    """
    from asgiref.sync import markcoroutinefunction
    from django.dispatch import Signal
    from django.test import SimpleTestCase

    from scoped.dispatch import asend, asend_robust

    class OurSignal(Signal):
        async def asend(self, sender: Any, **named: Any) -> Any:
            return await asend(self, sender, **named)

        async def asend_robust(self, sender: Any, **named: Any) -> Any:
            return await asend_robust(self, sender, **named)

    name = "TestReceiversContextVarsSharing"
    path = source / "tests" / "signals" / "tests.py"
    module = ast.parse(path.read_text(encoding="utf-8"))
    module.body = [
        node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name
    ]
    namespace: dict[str, Any] = {
        "__name__": "asend_tests",
        "SimpleTestCase": SimpleTestCase,
        "contextvars": contextvars,
        "dispatch": SimpleNamespace(Signal=OurSignal),
        "markcoroutinefunction": markcoroutinefunction,
    }
    exec(compile(module, str(path), "exec"), namespace)  # noqa: S102 (as an import would)
    case = namespace[name]
    tests = [case(test) for test in dir(case) if test.startswith("test_asend_")]
    return unittest.TextTestRunner().run(unittest.TestSuite(tests))


def unexpected(result: unittest.TestResult) -> list[str]:
    problems = [f"unexpected success: {test.id()}" for test in result.unexpectedSuccesses]
    for kind, outcomes in ("failure", result.failures), ("error", result.errors):
        for test, _ in outcomes:
            test_id = getattr(test, "test_case", test).id()  # a subtest's own has parameters
            if test_id in KNOWN:
                print(f"Known {kind}: {test_id}: {KNOWN[test_id]}")
            else:
                problems.append(f"{kind}: {test.id()}")
    return problems


def tally(result: unittest.TestResult) -> str:
    return (
        f"{result.testsRun} run, {len(result.failures)} failures, "
        f"{len(result.errors)} errors, {len(result.skipped)} skipped"
    )


if __name__ == "__main__":
    sys.exit(main())
