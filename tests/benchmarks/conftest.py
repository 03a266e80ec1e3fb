"""How the tests run a benchmark: as a reader would, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def run_benchmark() -> Run:
    """Run `python -m benchmarks.NAME ARGUMENTS`; its last line as an object, and all that it wrote."""

    def run(name: str, *arguments: str) -> tuple[dict[str, Any], str]:
        finished = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout.splitlines()[-1]), finished.stdout

    return run
