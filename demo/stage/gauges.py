"""What PostgreSQL, the pools and ``scoped.inspect()`` say, once a second or so."""

import time
from typing import Any

import asyncpg
from django.conf import settings

from demo.stage import timeline
from demo.stage.pools import StockPool
from scoped import inspect

# What every process sees is the same: the connections of all of them.
ACTIVITY = """
    SELECT pid, application_name, state, query,
        extract(epoch FROM clock_timestamp() - state_change)::float AS seconds
    FROM pg_stat_activity
    WHERE application_name IN ('scoped', 'stock') AND datname = current_database()
    ORDER BY application_name, backend_start, pid
    LIMIT 100
"""
LIKES = "SELECT count(*) FROM likes"  # those of the ending whose COMMIT fails: none, ever


def measure(pool: Any, stock: StockPool) -> dict[str, Any]:
    """How full this process's pools are, what is open in it, and what it has lost."""
    opened = [scope for scope in inspect() if scope.name != "the lifespan"]
    # What stock Django, since 6.1, opens and may never close, is its own.
    requests = [scope for scope in opened if " /stock/" not in scope.name]
    pages = [scope for scope in requests if scope.name.endswith(" /events")]
    waiting = sum(any(name.endswith(".db") for name in scope.being_set_up) for scope in requests)
    timeline.note_waits(requests[:])
    return {
        "scopes": len(requests) - len(pages),
        "pages": len(pages),
        "scoped": {**_sizes(pool), "waiting": waiting, **_lost("scoped")},
        "stock": {**_sizes(stock.pool), "waiting": stock.waiting, **_lost("stock")},
        # Whose each lost connection is, by the pid that PostgreSQL knows it by.
        "lost": {
            connection.get_server_pid(): row.title.rpartition("/")[2]
            for connection, (row, _) in stock.lent.items()
            if row.ended is not None
        },
    }


def _sizes(pool: Any) -> dict[str, int]:
    idle = pool.get_idle_size()
    return {"max": pool.get_max_size(), "in_use": pool.get_size() - idle, "idle": idle}


def _lost(kind: str) -> dict[str, Any]:
    rows = timeline.lost(kind)
    since = min((row.ended for row in rows if row.ended is not None), default=None)
    return {"lost": sum(row.lost for row in rows), "since": since}


class Observer:
    """Asks PostgreSQL through a connection of its own, which no pool can run out of."""

    def __init__(self) -> None:
        self._connection: Any = None
        self._asked = 0.0

    async def ask(self) -> dict[str, Any]:
        """Once a second: the connections that it has, and how many likes. Else nothing."""
        if time.monotonic() - self._asked < 1:
            return {}
        self._asked = time.monotonic()
        try:
            if self._connection is None:
                self._connection = await asyncpg.connect(
                    settings.DATABASE_URL,
                    timeout=2,
                    command_timeout=2,
                    server_settings={"application_name": "observer"},
                )
            rows = await self._connection.fetch(ACTIVITY)
            likes = await self._connection.fetchval(LIKES)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            self.close()
            return {"activity": None, "away": timeline.words(error)}
        return {"activity": [_shown(row) for row in rows], "likes": likes}

    def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


def _shown(row: Any) -> dict[str, Any]:
    query = timeline.cut(" ".join((row["query"] or "").split()), 80)
    return {**row, "query": query, "seconds": max(row["seconds"] or 0, 0)}
