"""A whole run one of whose processes is killed: nothing waits for what will never answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
STOP_S_MAX = 15.0
"""Well below the shard's request timeout (30 s); on a machine at rest it takes about 4."""


def trained(out: Path) -> int:
    status = out / "status" / "trainer.json"
    return int(json.loads(status.read_text())["impressions_trained"]) if status.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["shard", "broker"])
@pytest.mark.timeout(240)
def test_killed_service_ends_the_run_within_seconds_and_the_state_is_saved(
    victim: str, tmp_path: Path, is_running: Callable[[int], bool], wait_for: Callable[..., None]
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "run", "--no-live", "--preset", "quickstart", "--out", str(out)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline_s = time.monotonic() + 150
        while trained(out) <= 2000:
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline_s, "the run did not get there in time"
            time.sleep(0.1)
        ready = {path.stem: json.loads(path.read_text())["pid"] for path in (out / "ready").glob("*.json")}
        os.kill(ready[victim], signal.SIGKILL)
        killed_s = time.monotonic()
        wait_for(lambda: not any(is_running(pid) for pid in ready.values()))
        stop_s = time.monotonic() - killed_s
        _, errors = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert stop_s < STOP_S_MAX
    assert process.returncode == 1
    # The producer may have to be killed while it waits for the broker; nothing else is worth a word.
    said = [line for line in errors.splitlines() if not line.startswith(("producer: did not end", "  | "))]
    assert len(said) == 1
    assert said[0].startswith(f"error: ran to its end: {victim}: ended by SIGKILL; ")
    log = (out / "logs" / "trainer.log").read_text()
    assert "broken off: not published" in log
    saved = [path.name for path in (out / "checkpoints").iterdir() if path.name.startswith("step-")]
    assert f"newest_checkpoint={max(saved)}" in log
    # A trainer that is started here by itself publishes again.
    assert not (out / "control" / "broken-off").exists()
