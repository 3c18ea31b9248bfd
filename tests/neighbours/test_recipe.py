"""docs/recipes/monitoring.md"""

import pytest

from tests import pages
from tests.neighbours.running import found_by

pytestmark = [pytest.mark.neighbours, pytest.mark.timeout(300)]

SENTRY = ("monitoring.md", "Sentry")
OPENTELEMETRY = ("monitoring.md", "OpenTelemetry")


def test_what_the_page_says_is_all_that_there_is_to_do(tmp_path):
    for page, section in (SENTRY, OPENTELEMETRY):
        for name, text in pages.files(pages.DOCS / "recipes" / page, section).items():
            (tmp_path / name).write_text(text)
    found = found_by("recipe", str(tmp_path))
    assert found == {"servers": ["GET /view"], "sentry": True}
