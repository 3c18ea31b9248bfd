"""A short run of each fuzzer; ``python -m tests.fuzz`` has longer ones."""

import re
import subprocess
import sys

import pytest

from tests.processes import ROOT

SECONDS = 12


@pytest.mark.fuzz
@pytest.mark.timeout(300)
@pytest.mark.parametrize("switching", ["0.005", "0.000001"], ids=["as ever", "always"])
@pytest.mark.parametrize("what", ["core", "requests"])
def test_random_programs_break_no_promise(what: str, switching: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", what, "--seconds", str(SECONDS)]
    ran = subprocess.run(  # in a process of its own: it has its own settings, and may hang
        [*command, "--switch-interval", switching],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^[1-9]\d* programs, [1-9]\d* set-ups", ran.stdout, re.MULTILINE), ran.stdout
