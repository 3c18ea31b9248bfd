"""
``python -m tests.fuzz core`` and ``python -m tests.fuzz requests``: random programs, one after
the other, with real threads. Prints the seed of each in which a promise was broken: ``--seed
N --seconds 0`` has that one again, though threads may take turns otherwise. ``--switch-interval
1e-6`` has Python switch between threads as often as it can.
"""

import argparse
import faulthandler
import importlib
import logging
import os
import platform
import sys
import time
import warnings

import django

from tests.fuzz.world import DEADLINE


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("what", choices=["core", "requests"])
    parser.add_argument("--seed", type=int, default=1, help="of the first program")
    parser.add_argument("--seconds", type=float, default=15, help="begin with none after so many")
    parser.add_argument("--switch-interval", type=float, default=sys.getswitchinterval())
    options = parser.parse_args()

    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.fuzz.settings"
    django.setup()
    logging.disable(logging.CRITICAL)
    # A task of the program's that is cancelled before its first step awaits nothing.
    warnings.filterwarnings(
        "ignore", r"coroutine '(Program\.|Site\.|(request|lifespan)_scoped tests)"
    )
    warnings.filterwarnings("ignore", "StreamingHttpResponse must consume")
    sys.setswitchinterval(options.switch_interval)
    run = importlib.import_module(f"tests.fuzz.{options.what}").run

    programs = attempts = broken = 0
    seed, end = options.seed, time.monotonic() + options.seconds
    while not programs or time.monotonic() < end:
        faulthandler.dump_traceback_later(4 * DEADLINE, exit=True)
        world = run(seed)
        programs, attempts = programs + 1, attempts + len(world.attempts)
        if world.problems:
            broken += 1
            print(f"seed {seed}:", *world.problems[:4], sep="\n    ", flush=True)
        seed += 1
    faulthandler.cancel_dump_traceback_later()
    print(
        f"{programs} programs, {attempts} set-ups, from seed {options.seed} to {seed - 1}, on "
        f"Python {platform.python_version()} and Django {django.__version__}: {broken} with a "
        "promise broken.",
        flush=True,
    )
    # Not to wait for threads: one whose caller was cancelled may ask asgiref for the event loop
    # when that is about to end, and then waits for ever.
    sys.stderr.flush()
    os._exit(broken > 0)


if __name__ == "__main__":
    main()
