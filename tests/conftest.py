import os
from collections.abc import Iterator

import django
import pytest

from demo.servers import postgres, redis

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
django.setup()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server that all tests share."""
    with postgres() as server:
        yield server.url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server that all tests share; it may be Valkey."""
    with redis() as server:
        yield server.url
