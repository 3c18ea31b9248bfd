"""
Run with pytest the own tests of a project that is built on Django, such as Django REST
framework or django-ninja, with our handlers, receivers and client handlers in place.

    python -m tests.other_suites FOLDER            # its source, with its tests
    python -m tests.other_suites FOLDER --stock    # as they are, to compare with

What pytest takes may follow. Needs what the project's own tests need, and Django's.
"""

import argparse
import os
import sys
from pathlib import Path

import pytest

import scoped  # noqa: F401 (see below)
from tests.ours_in_place import put_ours_in_place


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.other_suites",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="with the project's source and tests")
    parser.add_argument("--stock", action="store_true", help="put nothing in place: to compare")
    options, arguments = parser.parse_known_args()
    # Its `tests` are not ours, and it is to find itself before what is installed. Of ours it needs
    # `scoped` alone, which is imported.
    root = os.getcwd()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os.chdir(options.folder)
    sys.path[:] = [os.getcwd(), *(path for path in sys.path if path not in {"", root})]

    served = {} if options.stock else put_ours_in_place()
    code = int(pytest.main(["-p", "no:cacheprovider", *arguments]))
    for kind, handler in served.items():
        print(f"{handler.served} {kind} requests, {handler.without_scope} of them without a scope")
    if served and not any(handler.served for handler in served.values()):
        sys.exit("Our handlers served no request.")
    return code


if __name__ == "__main__":
    sys.exit(main())
