"""Promise 18: New Relic's transactions, under Django's own handler and under ours."""

import pytest

from tests.neighbours.running import found_by

pytestmark = [pytest.mark.neighbours, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found():
    return {whose: found_by("newrelic", whose) for whose in ("stock", "scoped")}


def test_each_request_is_one_transaction_named_after_its_view(found):
    for request, sent in found["scoped"].items():
        view = request.partition(" ")[2].replace("sync", "sync_view")
        path = f"WebTransaction/Function/tests.neighbours.project:{view}"
        assert [one["path"] for one in sent] == [path]


def test_what_is_done_in_views_threads_and_streams_is_a_part_of_it(found):
    ours = {request: sent[0]["ours"] for request, sent in found["scoped"].items()}
    assert ours["0 view"] == ours["1 sync"] == ours["2 raises"] == ours["4 hangs"] == ["view"]
    assert ours["3 streams"] == ["stream", "view"]
    assert ours["5 holds"] == ["in a thread"]


def test_the_transactions_are_those_under_djangos_own_handler(found):
    # But for the request that uses a resource, which Django's before 6.1 does not serve.
    for request, sent in found["stock"].items():
        if "holds" not in request:
            assert found["scoped"][request] == sent
