"""
Clicks on all of the demo's buttons, many at once, and what they leave behind::

    python -m tests.clicks --clicks 500

Ours are to leave nothing: no open scope, the pool as it was, no more memory.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter

import httpx

from demo.servers import postgres, redis
from demo.stage.buttons import ENDINGS
from tests.processes import Demo, eventually, ps
from tests.watching import Page

AT_ONCE = 20
WARM_UP = 200  # clicks, after which all that is kept for good has been made
MEGABYTES = 8  # that memory may have grown by, over the clicks that follow


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.clicks", description=__doc__)
    parser.add_argument("--clicks", type=int, default=500)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    options = parser.parse_args()
    print(f"{options.clicks} clicks, seed {options.seed}")
    command = (sys.executable, "-m", "demo")
    with (
        postgres() as database,
        redis() as broker,
        Demo(
            "--port", "0", command=command, DATABASE_URL=database.url, REDIS_URL=broker.url
        ) as demo,
        Page(demo) as page,
    ):
        chance = random.Random(options.seed)  # noqa: S311 (to be repeated)
        problems = run(demo, page, options.clicks, chance)
    sys.exit("\n".join(problems) or None)


def run(demo: Demo, page: Page, clicks: int, chance: random.Random) -> list[str]:
    asyncio.run(click(page, WARM_UP, chance))
    eventually(page.settled, 20)
    idle, memory = page.gauge("scoped", "idle"), megabytes(demo)
    started = time.monotonic()
    outcomes = asyncio.run(click(page, clicks, chance))
    seconds = time.monotonic() - started
    eventually(page.settled, 20)
    time.sleep(1.5)  # the pages hear of it once more
    grown = megabytes(demo) - memory
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:6} {outcome}")
    print(f"{seconds:6.1f} seconds")
    for name in ("in_use", "waiting", "idle", "max"):
        print(f"{page.gauge('scoped', name):6} {name.replace('_', ' ')} of our pool")
    print(f"{page.gauge('scopes'):6} scopes open, {page.gauge('pages')} page")
    print(f"{memory:6.1f} MB before, {grown:+.1f} MB after")
    problems = {
        "scopes are open": page.gauge("scopes"),
        "connections are in use": page.gauge("scoped", "in_use"),
        "requests wait": page.gauge("scoped", "waiting"),
        "pages too many are open": page.gauge("pages") - 1,
        f"connections fewer than before, {idle}": idle - page.gauge("scoped", "idle"),
        "clicks are missing": clicks - outcomes.total(),
    }
    found = [f"{number} {what}" for what, number in problems.items() if number > 0]
    if grown > MEGABYTES:
        found.append(f"{grown:.1f} MB more")
    return found


async def click(page: Page, clicks: int, chance: random.Random) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    names = [ending.name for ending in ENDINGS if ending.is_in_runs]
    left = [chance.choice(names) for _ in range(clicks)]
    async with httpx.AsyncClient(base_url=page.base_url, timeout=60) as client:

        async def visitor() -> None:
            while left:
                name = left.pop()
                try:
                    async with asyncio.timeout(0.3 if name == "leave" else None):
                        answer = str((await client.post(f"/scoped/{name}")).status_code)
                except TimeoutError:
                    answer = "left"
                except httpx.RemoteProtocolError:
                    answer = "broke off"
                outcomes[f"{name}: {answer}"] += 1

        await asyncio.gather(*(visitor() for _ in range(AT_ONCE)))
    return outcomes


def megabytes(demo: Demo) -> float:
    return int(ps("-o", "rss=", "-p", str(demo.process.pid))) / 1024


if __name__ == "__main__":
    main()
