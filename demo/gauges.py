"""How full the pools are, and what ``scoped.inspect()`` says is open."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from demo import stock
from scoped import inspect

if TYPE_CHECKING:
    import asyncpg


def gauges(
    pool: "asyncpg.Pool[asyncpg.Record]", stock_pool: stock.Pool
) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        # Not the lifespan, nor what stock Django, since 6.1, opens and may never close.
        requests = [
            scope
            for scope in inspect()
            if scope.name != "the lifespan" and " /stock/" not in scope.name
        ]
        pages = [scope for scope in requests if scope.name.endswith(" /events")]
        return {
            "scopes": len(requests) - len(pages),
            "pages": len(pages),
            "pool": {
                **_sizes(pool),
                "waiting": sum("demo.resources.db" in one.being_set_up for one in requests),
            },
            "stock": {
                **_sizes(stock_pool.pool),
                "waiting": stock_pool.waiting,
                "lost": stock_pool.lost,
            },
        }

    return measure


def _sizes(pool: "asyncpg.Pool[asyncpg.Record]") -> dict[str, int]:
    idle = pool.get_idle_size()
    return {"max": pool.get_max_size(), "in_use": pool.get_size() - idle, "idle": idle}
