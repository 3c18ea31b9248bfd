"""Promise 18: OpenTelemetry's spans, under Django's own handler and under ours."""

import pytest

from tests.neighbours.running import found_by

pytestmark = [pytest.mark.neighbours, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found():
    return {whose: found_by("opentelemetry", whose) for whose in ("stock", "scoped")}


def test_each_request_has_one_server_span_also_when_its_client_has_gone(found):
    for request, spans in found["scoped"].items():
        assert spans["servers"] == [f"GET /{request.partition(' ')[2]}"]


def test_spans_of_views_threads_streams_and_teardowns_are_in_it(found):
    """That each is in its trace, and all but the teardown ends before it, the program looks at."""
    ours = {request: spans["ours"] for request, spans in found["scoped"].items()}
    assert ours["0 view"] == ours["1 sync"] == ours["2 raises"] == [["view", "INTERNAL"]]
    assert ours["3 streams"] == [["stream", "SERVER"], ["view", "INTERNAL"]]
    assert ours["5 holds"] == [["in a thread", "INTERNAL"], ["teardown", "INTERNAL"]]


def test_the_spans_are_those_under_djangos_own_handler(found):
    # But for the request that uses a resource, which Django's before 6.1 does not serve.
    for request, spans in found["stock"].items():
        if "holds" not in request:
            assert found["scoped"][request] == spans
