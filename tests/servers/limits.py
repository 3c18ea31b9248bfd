"""
What a server cannot do, or does otherwise: the cases that are expected to fail
under it, and how. One that passes, or fails otherwise, makes the run fail: so
this is as true as the versions of the servers that it was run with.
"""

import re
import sys
from typing import NamedTuple


class Limit(NamedTuple):
    servers: str  # a pattern of their names
    cases: str  # a pattern of their titles
    failure: str  # a pattern of what the case says
    cell: str  # what the table says
    reason: str
    applies: bool = True

    def covers(self, server: str, case: str) -> bool:
        return bool(
            self.applies and re.fullmatch(self.servers, server) and re.fullmatch(self.cases, case)
        )


LIMITS = [
    Limit(
        servers="uvicorn httptools .*|hypercorn|granian",
        cases="client gone in the first of several requests in one write",
        failure=r"torn down: \[\], not .*",
        cell="not noticed",
        reason=(
            "While a request waits behind another one in the same connection, the server does not "
            "read from it, and so learns that the client has gone when the first has been "
            "answered. Until then the view runs and keeps its resources; then they are torn down."
        ),
    ),
    Limit(
        servers="hypercorn",
        cases="SIG(TERM|INT), requests and streams open",
        failure="does not end until the clients leave",
        cell="waits",
        reason=(
            "It awaits asyncio's `Server.wait_closed()` before its `--graceful-timeout` begins. "
            "From Python 3.12 on that waits until the clients have left; then all is torn down."
        ),
        applies=sys.version_info >= (3, 12),
    ),
    Limit(
        servers="granian",
        cases="SIG(TERM|INT), requests and streams open",
        failure="not torn down: db, lingering, pool, redis, subscription",
        cell="killed",
        reason=(
            "It waits for open requests and cancels none, for ever or until "
            "`--workers-kill-timeout` ends it with SIGKILL, which nothing survives. PostgreSQL "
            "notices when it next has something to send."
        ),
    ),
    Limit(
        servers="gunicorn",
        cases="SIGTERM, requests and streams open",
        failure="not torn down: db, lingering, pool, redis, subscription",
        cell="killed",
        reason=(
            "The worker waits for open requests for `--graceful-timeout`, and would cancel them "
            "after that; but by then its arbiter, which waits for just as long, has ended it with "
            "SIGKILL."
        ),
    ),
    Limit(
        servers="gunicorn",
        cases="SIGINT, a request open that is about to end",
        failure="not answered",
        cell="not answered",
        reason=(
            "SIGINT is its quick shutdown: open requests are cancelled at once, and all is torn "
            "down."
        ),
    ),
    Limit(
        servers="daphne",
        cases="SIG(TERM|INT), a request open that is about to end",
        failure="not answered",
        cell="not answered",
        reason=(
            "It cancels all requests at once. It has no lifespan protocol either: lifespan "
            "resources are set up on first use, and torn down at the interpreter's exit."
        ),
    ),
]


def limit_of(server: str, case: str) -> Limit | None:
    return next((limit for limit in LIMITS if limit.covers(server, case)), None)
