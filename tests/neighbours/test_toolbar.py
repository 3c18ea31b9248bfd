"""Promise 18: django-debug-toolbar shows the same under Django's own handler and under ours."""

import pytest

from tests.neighbours.running import found_by

pytestmark = [pytest.mark.neighbours, pytest.mark.timeout(300)]


def test_it_is_in_each_page_and_counts_the_queries_of_sync_and_async_views():
    found = found_by("toolbar", "scoped")
    assert found == found_by("toolbar", "stock")
    assert found == [
        ["sync", 200, True, 1],
        ["async", 200, True, 1],
        ["raises", 500, True, 0],
        ["sync", 200, True, 1],
    ]
