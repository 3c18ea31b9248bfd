"""docs/checks.md: the blocks that tests/test_checks.py does not run."""

from django.core.checks import Warning as CheckWarning
from django.test import override_settings

from scoped.asgi import ScopedASGIHandler

TITLE = ("checks.md", "System checks")
ASGI = ("checks.md", "scoped.W001")


def test_a_warning_is_silenced(project):
    settings = project(TITLE).settings
    warning = CheckWarning("", id="scoped.W004")
    assert not warning.is_silenced()
    with override_settings(SILENCED_SYSTEM_CHECKS=settings.SILENCED_SYSTEM_CHECKS):
        assert warning.is_silenced()


def test_the_remedy_is_our_handler(project):
    assert isinstance(project(ASGI).asgi.application, ScopedASGIHandler)
