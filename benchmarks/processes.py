"""The real processes that a benchmark measures, each of them known by its address once it listens."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_LIMIT_S = 60.0


@contextmanager
def listening(directory: Path, name: str, *arguments: str) -> Iterator[str]:
    """`python -m param_server ARGUMENTS` until the block ends; gives its address.

    Raises: RuntimeError with the end of its output if it does not listen within START_LIMIT_S.
    """
    ready, output_path = directory / f"{name}.ready", directory / f"{name}.txt"
    command = [sys.executable, "-m", "param_server", *arguments, "--ready-file", str(ready)]
    with output_path.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            deadline_s = time.monotonic() + START_LIMIT_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline_s:
                    said = output_path.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the process '{name}' did not start; it said:\n{said}")
                time.sleep(0.05)
            yield json.loads(ready.read_text())["address"]
        finally:
            process.terminate()
            process.wait()
