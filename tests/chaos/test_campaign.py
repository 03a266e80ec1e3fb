"""The campaign as it is started: kills at every failpoint, and a campaign that must fail does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.__main__ import main
from tests.chaos.processes import REPOSITORY, Zygote
from tests.chaos.stream import make_config, write_config
from trainer.failpoints import FAILPOINTS

KILLS = 40
SEED = 20_261_124


def campaign(*arguments: str, timeout_s: int) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run one; returns what it printed and its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    last = next((line for line in reversed(lines) if line.startswith("{")), "{}")
    return done, json.loads(last)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_whatever_is_killed_when_the_model_is_the_same(tmp_path: Path) -> None:
    """Invariants 3 and 5 over all families of faults, every failpoint among them."""
    done, last = campaign(
        *("--kills", str(KILLS), "--seed", str(SEED), "--keep", str(tmp_path / "campaign")), timeout_s=1_150
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert last["ok"] is True
    assert last["kills"] >= KILLS
    assert set(last["failpoints"]) == set(FAILPOINTS)
    assert min(last["failpoints"].values()) >= 1
    assert last["failures"] == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_one_scenario_is_killed_and_judged(tmp_path: Path) -> None:
    """One alone, as a failed campaign says to repeat it."""
    arguments = ("--scenario", "failpoints#0", "--seed", "1", "--keep", str(tmp_path / "campaign"))
    done, last = campaign(*arguments, timeout_s=230)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert last["kills"] >= 1
    assert last["scenarios"] == 1
    assert sum(last["failpoints"].values()) == last["kills"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills", "0"], "--kills must be at least 1"),
        (["--seed", "-1"], "--seed at least 0"),
        (["--scenario", "earthquake"], "no scenario 'earthquake'; families: failpoints"),
        (["--keep", "."], "is not empty; name a new directory"),
    ],
)
def test_a_campaign_that_cannot_begin_says_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_zygotes_children_end_as_processes_end(tmp_path: Path) -> None:
    """An operator's error is exit code 1 and one line; a signal is a signal; nobody outlives the zygote."""
    import psutil

    config = write_config(tmp_path / "config.toml", make_config(1))
    with Zygote(config, tmp_path / "program.onnx", tmp_path / "zygote.log") as zygote:
        wrong = zygote.start(
            "wrong",
            "trainer",
            ["train", "--config", str(tmp_path / "missing.toml"), "--run-dir", str(tmp_path)],
            log=tmp_path / "wrong.log",
        )
        broker = ["broker", "--config", str(config), "--ready-file", str(tmp_path / "ready.json")]
        killed = zygote.start("killed", "trainer", broker, log=tmp_path / "killed.log")
        left = zygote.start("left", "trainer", broker, log=tmp_path / "left.log")
        assert wrong.wait(20) == 1
        assert wrong.tail().startswith("error: ")
        assert "Traceback" not in wrong.tail()
        assert killed.running()
        killed.kill()
        assert killed.code == -9
        killed.kill()  # once more is nothing
        assert left.running()
        process = psutil.Process(left.pid)
    process.wait(timeout=20)
    assert not process.is_running()
