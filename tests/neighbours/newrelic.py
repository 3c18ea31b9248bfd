"""The transactions that New Relic makes of some requests: kept here, and sent nowhere."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ |= {
    "NEW_RELIC_APP_NAME": "neighbours",
    "NEW_RELIC_DEVELOPER_MODE": "true",  # it connects to nothing
    "NEW_RELIC_HOST": "127.0.0.1",
    "NEW_RELIC_LICENSE_KEY": "0" * 40,
}
from newrelic import agent

agent.initialize()  # what `newrelic-admin run-program` does, before all else
from newrelic.core.application import Application  # noqa: E402

from tests.neighbours import project  # noqa: E402

ended: list[dict[str, Any]] = []
record_transaction = Application.record_transaction


def keep(self: Any, data: Any) -> Any:
    errors = [error.type for error in data.errors]
    ended.append({"path": data.path, "errors": errors, "ours": sorted(ours_in(data.root))})
    return record_transaction(self, data)


def ours_in(node: Any) -> Iterator[str]:
    if getattr(node, "group", None) == "ours":
        yield node.name
    for child in node.children:
        yield from ours_in(child)


def tell(what: str, user: str) -> None:
    with agent.FunctionTrace(what, group="ours"):
        pass


async def main(whose: str) -> None:
    application = project.application(whose)
    of_each = {}
    for number, where in enumerate(("view", "sync", "raises", "streams", "hangs", "holds", "view")):
        ended.clear()
        await project.get(application, where, f"user-{number}")
        of_each[f"{number} {where}"] = list(ended)
    print(json.dumps(of_each))


if __name__ == "__main__":
    logging.disable()
    Application.record_transaction = keep
    agent.register_application(timeout=30)
    project.tell = tell
    project.configure()
    asyncio.run(main(sys.argv[1]))
