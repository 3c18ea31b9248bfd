"""Promise 18: Sentry sees of each request what it sees under Django's own handler."""

import asyncio
import json
import signal

import httpx
import pytest

from tests.neighbours.running import found_by
from tests.uvicorn import uvicorn

pytestmark = [pytest.mark.neighbours, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found():
    return {whose: found_by("sentry", whose) for whose in ("stock", "scoped")}


def test_each_request_is_one_transaction_with_its_own_data_and_nobody_elses(found):
    for number, (request, sent) in enumerate(found["scoped"]["sent"].items()):
        kinds = [event["type"] for event in sent]
        fails = "raises" in request or "breaks" in request
        assert kinds == (["event", "transaction"] if fails else ["transaction"])
        for event in sent:
            assert event["query"] == f"user=user-{number}"
            assert event["user"] == f"user-{number}"
            assert event["transaction"] == f"/{request.partition(' ')[2]}"


def test_it_is_what_is_sent_under_djangos_own_handler(found):
    # But for requests that use a resource, which Django's before 6.1 does not serve.
    for request, sent in found["stock"]["sent"].items():
        if "holds" not in request and "breaks" not in request:
            assert found["scoped"]["sent"][request] == sent


def test_a_transaction_has_the_spans_of_threads_streams_and_teardowns(found):
    sent = found["scoped"]["sent"]
    assert sent["3 streams"][0]["spans"] == ["stream", "view"]
    assert sent["5 holds"][0]["spans"] == ["in a thread", "teardown"]


def test_a_teardown_that_fails_after_the_last_byte_is_an_event_of_its_request(found):
    event, _ = found["scoped"]["sent"]["6 breaks"]
    assert "ValueError" in event["error"]
    assert event["query"] == "user=user-6"


def test_a_thousand_requests_leave_nothing_behind(found):
    # An event processor more for each, and each with its request, without Sentry's isolation.
    # A few are there with stock Django too: the last ones, which threads and clients still hold.
    for side in ("scoped", "stock"):
        assert found[side]["processors"] <= 5
        assert found[side]["requests left"] <= 5


async def test_under_uvicorn_twenty_requests_at_once_are_twenty_transactions_each_with_its_tag():
    with uvicorn("tests.neighbours.served") as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            users = [f"user-{number}" for number in range(20)]
            answers = await asyncio.gather(*(client.get(f"/?user={user}") for user in users))
        assert [answer.status_code for answer in answers] == [200] * 20
        server.stop(signal.SIGINT)
    sent = [json.loads(line[12:]) for line in server.lines if line.startswith("transaction ")]
    assert sorted(sent) == sorted([f"user={user}", user] for user in users)


def test_under_wsgi_it_is_sent_the_same_and_a_factory_sees_the_failing_stream_all_the_same():
    stock, scoped = found_by("sentry_wsgi", "stock"), found_by("sentry_wsgi", "scoped")
    assert [[where, sent] for where, sent, _ in scoped] == [
        [where, sent] for where, sent, _ in stock
    ]
    assert [seen for _, _, seen in scoped] == [["success"], ["ValueError"], ["success"]]
