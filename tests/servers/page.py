"""The page that shows what happened: ``docs/servers.md``."""

from collections.abc import Sequence
from string import ascii_lowercase

from tests.servers.run import Outcome

INTRODUCTION = """\
# Under real servers

*Written by `python -m tests.servers` (dependency group `servers`): do not edit.*

Each server runs a small Django project with `ScopedASGIHandler`, as a process of its own. Its
requests use a connection from an asyncpg pool of 5 and a Redis subscription of their own; the cases
are driven from outside, over TCP. *yes* means: the client got what it should; every resource was
set up once and torn down once; its factory saw how the request ended; no request saw another's;
afterwards the pool is whole, no backend of PostgreSQL is busy, Redis has no subscriber, no task of
the project's is left, and neither Python nor asyncio complained. For a shutdown also: the
lifespan's resources were torn down, and the server ended by itself.

What a server cannot do is declared in `tests/servers/limits.py`. The run fails when it does
otherwise, for better or worse.
"""


def page(outcomes: Sequence[Outcome], versions: Sequence[str]) -> str:
    servers = list(dict.fromkeys(outcome.server for outcome in outcomes))
    cases = list(dict.fromkeys(outcome.case.title for outcome in outcomes))
    limits = list(dict.fromkeys(outcome.limit for outcome in outcomes if outcome.limit))
    remarks = list(dict.fromkeys(outcome.remark for outcome in outcomes if outcome.remark))

    def cell(outcome: Outcome) -> str:
        if outcome.limit:
            return f"**{outcome.limit.cell}** ({limits.index(outcome.limit) + 1})"
        return (
            f"yes ({ascii_lowercase[remarks.index(outcome.remark)]})" if outcome.remark else "yes"
        )

    cells = {(outcome.server, outcome.case.title): cell(outcome) for outcome in outcomes}
    table = [
        ["", *[server.name for server in servers]],
        ["---"] * (len(servers) + 1),
        *[[case, *[cells[server, case] for server in servers]] for case in cases],
    ]
    return "\n".join(
        [
            INTRODUCTION,
            f"Run with {', '.join(versions)}.",
            "",
            *[f"| {' | '.join(row)} |" for row in table],
            "",
            "## Limits of the servers",
            "",
            *[f"{n}. *{limit.cell}*: {limit.reason}" for n, limit in enumerate(limits, 1)],
            "",
            "## Remarks",
            "",
            *[f"- ({ascii_lowercase[n]}) {remark}." for n, remark in enumerate(remarks)],
            "",
            "## The servers",
            "",
            "| | Version | Command, after `python -m` |",
            "| --- | --- | --- |",
            *[f"| {server.name} | {server.version} | `{server.command}` |" for server in servers],
            "",
        ]
    )
