"""Promise 18: Datadog's spans, under Django's own handler and under ours."""

import pytest

from tests import pages
from tests.neighbours.running import found_by

DATADOG = ("monitoring.md", "Datadog")

pytestmark = [pytest.mark.neighbours, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datadog")
    page, section = DATADOG
    for name, text in pages.files(pages.DOCS / "recipes" / page, section).items():
        (folder / name).write_text(text)
    return {"stock": found_by("datadog", "stock"), "scoped": found_by("datadog", str(folder))}


def test_each_request_has_one_root_span_also_when_its_client_has_gone(found):
    for request, spans in found["scoped"].items():
        assert spans["roots"][0] == ["asgi.request", f"GET {request.partition(' ')[2]}"]
        assert len(spans["roots"]) == (2 if "holds" in request else 1)


def test_spans_of_views_threads_and_streams_are_in_it_and_a_teardowns_come_after_it(found):
    assert found["scoped"]["3 streams"]["ours"] == ["stream", "view"]
    assert found["scoped"]["5 holds"]["ours"] == ["in a thread"]
    assert found["scoped"]["5 holds"]["roots"][1] == ["ours", "teardown"]


def test_but_for_the_roots_name_the_spans_are_those_under_djangos_own_handler(found):
    # And but for the request that uses a resource, which Django's before 6.1 does not serve.
    for request, spans in found["stock"].items():
        if "holds" not in request:
            [[name, resource]] = spans["roots"]
            assert name == "django.request"
            assert found["scoped"][request] == {**spans, "roots": [["asgi.request", resource]]}
