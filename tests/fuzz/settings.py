"""Those of the tests, with a database, for connections are what threads must be clean of."""

from tests.settings import *  # noqa: F403

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": "file:fuzz?mode=memory&cache=shared",
        "CONN_MAX_AGE": 60,
    }
}
ROOT_URLCONF = "tests.fuzz.requests"
SCOPED = {"TEARDOWN_TIMEOUT": 30.0, "SHUTDOWN_TIMEOUT": 30.0, "SLOW_TEARDOWN": 60.0}
