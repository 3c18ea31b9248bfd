"""
Promises 6, 15 and 16 under real servers. Every day under one; ``-m servers``
runs every case under all of them, as ``python -m tests.servers`` does.
"""

import re
from pathlib import Path

import pytest

from tests.servers.cases import CASES
from tests.servers.limits import LIMITS
from tests.servers.run import run
from tests.servers.servers import EVERYDAY, SERVERS

PAGE = Path(__file__).parents[2] / "docs" / "servers.md"

# A shutdown takes a server of its own and its seconds: one of them has to do every day.
QUICK = [
    case for case in CASES if not case.ends_the_site or case.title.startswith("SIGTERM, requests")
]


@pytest.mark.timeout(120)
def test_however_a_request_ends_under_uvicorn_all_is_torn_down_once(postgres_url, redis_url):
    outcomes = list(run(EVERYDAY, QUICK, postgres_url, redis_url))
    surprises = [outcome.surprise for outcome in outcomes if outcome.surprise]
    assert not surprises, "\n\n".join(surprises)


@pytest.mark.servers
@pytest.mark.timeout(600)
@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_however_a_request_ends_the_server_does_what_is_declared(server, postgres_url, redis_url):
    outcomes = list(run(server, CASES, postgres_url, redis_url))
    surprises = [outcome.surprise for outcome in outcomes if outcome.surprise]
    assert not surprises, "\n\n".join(surprises)


def test_every_limit_is_of_some_server_and_case():
    for limit in LIMITS:
        assert any(re.fullmatch(limit.servers, server.name) for server in SERVERS), limit
        assert any(re.fullmatch(limit.cases, case.title) for case in CASES), limit


def test_the_page_shows_every_server_and_case():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert rows[0][1:] == [*[server.name for server in SERVERS[:-1]], f"{SERVERS[-1].name} |"]
    assert [row[0].removeprefix("| ") for row in rows[2 : 2 + len(CASES)]] == [
        case.title for case in CASES
    ]
