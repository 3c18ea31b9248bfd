"""Promise 16: a lifespan whose event loop is left without a word ends with the process."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("end", ["", "loop.close()\n"], ids=["stopped", "closed"])
def test_where_the_event_loop_is_left_without_a_word_it_ends_with_the_process(end: str) -> None:
    """daphne stops it. What is closed can be run no more."""
    program = (
        "import asyncio\n"
        "from scoped import lifespan_scoped\n"
        "from scoped.core.request import ServedScope\n"
        "@lifespan_scoped\n"
        "async def pool():\n"
        "    yield\n"
        "    print('pool')\n"
        "async def request():\n"
        "    scope = ServedScope('the request GET /').open()\n"
        "    await pool()\n"
        "    await scope.close()\n"
        "loop = asyncio.new_event_loop()\n"
        "loop.run_until_complete(request())\n"
        "print('served')\n"
    )
    command = [sys.executable, "-c", program + end]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout == ("served\n" if end else "served\npool\n")
