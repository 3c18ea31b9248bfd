"""
Run every case under every server, and write ``docs/servers.md``::

    python -m tests.servers [--check] [NAME ...]

With ``--check``, or for some servers only (those whose name contains NAME),
nothing is written. Fails where what happens is not what is declared.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import django

from demo.servers import postgres, redis
from tests.servers.cases import CASES
from tests.servers.page import page
from tests.servers.run import Outcome, run
from tests.servers.servers import SERVERS

PAGE = Path(__file__).parents[2] / "docs" / "servers.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.servers")
    parser.add_argument("names", metavar="NAME", nargs="*", help="part of a server's name")
    parser.add_argument("--check", action="store_true", help="do not write docs/servers.md")
    options = parser.parse_args()
    servers = [
        server
        for server in SERVERS
        if not options.names or any(name in server.name for name in options.names)
    ]
    outcomes: list[Outcome] = []
    began = time.monotonic()
    with postgres() as database, redis() as broker:
        for server in servers:
            for outcome in run(server, CASES, database.url, broker.url):
                outcomes.append(outcome)
                told = outcome.failure or outcome.remark or "yes"
                print(f"{server.name}: {outcome.case.title}: {told}", flush=True)
        names = [database.name, broker.name]
    surprises = [outcome.surprise for outcome in outcomes if outcome.surprise]
    print(
        f"{len(outcomes)} cases under {len(servers)} servers in {time.monotonic() - began:.0f} s, "
        f"{len(surprises)} not as declared"
    )
    for surprise in surprises:
        print(f"\n{surprise}", file=sys.stderr)
    if not surprises and servers == SERVERS and not options.check:
        versions = [f"Python {platform.python_version()}", f"Django {django.__version__}", *names]
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(outcomes, versions))
    return bool(surprises)


if __name__ == "__main__":
    sys.exit(main())
