"""Runs a program of this folder, and reads what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def found_by(program: str, *arguments: str) -> Any:
    """What ``python -m tests.neighbours.PROGRAM`` has printed as JSON, in its last line."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-m", f"tests.neighbours.{program}", *arguments],
        cwd=ROOT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "never awaited" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
