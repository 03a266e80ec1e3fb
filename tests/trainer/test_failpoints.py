"""Failpoints stop a process where they are told to, leave their mark first, and refuse what is not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.failpoints import FAILPOINTS, arm_from_environment, reach

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import os
from trainer.failpoints import arm_from_environment, reach
arm_from_environment(os.environ)
for step in range(5):
    reach("after_fetch")
    print(step, flush=True)
    reach("after_map")
"""


def start(failpoint: str, log: Path, **more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"FRESHET_FAILPOINT": failpoint, "FRESHET_FAILPOINT_LOG": str(log)} | more
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )


def test_process_is_killed_at_the_named_place_and_time_and_the_log_says_so(tmp_path: Path) -> None:
    process = start("after_map:3:kill", tmp_path / "fired")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert printed.split() == ["0", "1", "2"]
    assert (tmp_path / "fired").read_text() == "after_map:3\n"


def test_stopped_process_goes_on_when_it_is_told_to(tmp_path: Path) -> None:
    process = start("after_fetch:2:stop", tmp_path / "fired")
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "fired").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    os.waitpid(process.pid, os.WUNTRACED)
    process.send_signal(signal.SIGCONT)
    printed, _ = process.communicate(timeout=60)
    assert printed.split() == ["0", "1", "2", "3", "4"]


def test_only_the_named_rank_is_hit(tmp_path: Path) -> None:
    process = start("after_map:1:kill:1", tmp_path / "fired", RANK="0")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(printed.split()) == 5
    other = start("after_map:1:kill:1", tmp_path / "fired", RANK="1")
    other.communicate(timeout=60)
    assert other.returncode == -signal.SIGKILL


@pytest.mark.parametrize("text", ["after_lunch:1:kill", "after_map:x:kill", "after_map:1:maim", "after_map"])
def test_what_does_not_exist_is_refused_with_the_names_that_do(text: str) -> None:
    with pytest.raises(ConfigError, match=r"FRESHET_FAILPOINT must be NAME:HIT:kill\|stop.*after_backward"):
        arm_from_environment({"FRESHET_FAILPOINT": text})


def test_nothing_happens_where_nothing_is_armed() -> None:
    arm_from_environment({})
    for name in FAILPOINTS:
        reach(name)
