"""A whole run over small real processes: its end, its interruption, a child's death, no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.run.plan import RunOptions
from trainer.run.run_all import run_all

DRIVER = """
import json, sys
from pathlib import Path
import msgspec
from trainer.config import preset
from trainer.run.plan import RunOptions, RunPlan
from trainer.run.processes import ChildSpec
from trainer.run.run_all import run_all

script, out, modes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def spec(name, mode, directory, **more):
    mode, *rest = mode.split()
    argv = (sys.executable, script, mode, name, str(directory.root), *rest)
    return ChildSpec(name=name, argv=argv, stop_grace_s=modes.get("stop_grace_s", 1.0), **more)

def plan(config, options, directory):
    ends = {"ends_itself": True, "ready_timeout_s": None}
    return RunPlan(
        services=tuple(
            spec(name, mode, directory, ready_timeout_s=modes.get("ready_timeout_s", 60.0))
            for name, mode in modes["services"].items()
        ),
        trainer=spec("trainer", modes.get("trainer", "trainer"), directory, **ends),
        producer=spec("producer", modes.get("producer", "producer"), directory, **ends),
        replicas=(),
    )

config = preset("quickstart")
config = msgspec.structs.replace(config, serving=msgspec.structs.replace(config.serving, num_replicas=0))
options = RunOptions(out_dir=out, impressions=1000, seconds=modes.get("seconds"), live=False)
sys.exit(run_all(config, options, make_plan=plan))
"""

SERVICES = {"broker": "service", "shard": "service", "replica-0": "service"}
Drive = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def drive(child_script: Path, tmp_path: Path, import_from_repository: None) -> Drive:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def begin(**modes: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(driver), str(child_script), str(tmp_path / "run"), json.dumps(modes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


@pytest.fixture
def nothing_runs(tmp_path: Path, is_running: Callable[[int], bool]) -> Callable[[], bool]:
    def look() -> bool:
        files = list((tmp_path / "run" / "pids").iterdir())
        assert files, "no child ever ran"
        return not any(is_running(int(path.read_text())) for path in files)

    return look


def test_run_ends_with_summary_report_and_exit_code_0(
    drive: Drive, tmp_path: Path, nothing_runs: Callable[[], bool]
) -> None:
    process = drive(services=SERVICES)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["impressions_trained"] == summary["impressions_produced"] == 1000
    assert summary["ended"] == "completed"
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
    assert "\x1b" not in out
    assert "1,000 trained of 1,000 produced" in out
    assert "report.html" in out
    assert nothing_runs()


def test_services_end_after_what_needs_them_and_in_reverse(drive: Drive, tmp_path: Path) -> None:
    process = drive(services=SERVICES)
    process.communicate(timeout=120)
    assert (tmp_path / "run" / "order").read_text().split() == ["replica-0", "shard", "broker"]


def test_lost_impression_is_one_clear_line_and_exit_code_1(drive: Drive) -> None:
    process = drive(services=SERVICES, trainer="trainer 999")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err == (
        "error: every impression trained once: 999 trained, 1000 produced, 0 dead letters: 1 too few\n"
    )


def test_trainer_that_ends_before_the_stream_is_named(
    drive: Drive, tmp_path: Path, nothing_runs: Callable[[], bool], wait_for: Callable[..., None]
) -> None:
    process = drive(services=SERVICES, producer="endless")
    wait_for((tmp_path / "run" / "pids" / "producer").exists)
    os.kill(int((tmp_path / "run" / "pids" / "trainer").read_text()), signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: ran to its end: trainer: exit code 0 before the stream had ended; its log ")
    assert nothing_runs()


def test_producer_that_ends_before_it_has_produced_everything_fails_by_name(drive: Drive) -> None:
    process = drive(services=SERVICES, producer="producer 400", trainer="trainer 400")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err == "error: producer produced what was asked: 400 of 1000: the producer ended early\n"


def test_drain_is_not_left_for_a_later_trainer(drive: Drive, tmp_path: Path) -> None:
    drive(services=SERVICES).communicate(timeout=120)
    assert (tmp_path / "run" / "verify.safetensors").exists()  # it was drained
    assert not (tmp_path / "run" / "control" / "drain").exists()


def test_producer_is_stopped_when_its_time_is_up(drive: Drive, tmp_path: Path) -> None:
    # The child in the producer's place never ends by itself.
    process = drive(services=SERVICES | {"extra": "service"}, producer="endless", seconds=0.5)
    process.communicate(timeout=120)
    assert (tmp_path / "run" / "order").read_text().split()[0] == "producer"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ended"] == "completed"


def test_child_that_is_never_ready_is_named_with_its_last_lines(
    drive: Drive, nothing_runs: Callable[[], bool]
) -> None:
    process = drive(services=SERVICES | {"shard": "never-ready"}, ready_timeout_s=2.0)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "shard: not ready within 2 s" in err
    assert "  | still looking for my port" in err
    assert nothing_runs()


def test_dead_child_is_named_with_its_last_lines_and_the_others_are_stopped(
    drive: Drive, tmp_path: Path, nothing_runs: Callable[[], bool]
) -> None:
    process = drive(services=SERVICES | {"late": "dies"}, trainer="trainer", producer="endless")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: ran to its end: late: exit code 3; the end of ")
    assert "  | line 99\n" in err
    assert "  | the disk is full\n" in err
    assert err.count("error:") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ended"].startswith(
        "late: exit code 3"
    )
    assert nothing_runs()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_everything_cleanly(
    drive: Drive,
    tmp_path: Path,
    nothing_runs: Callable[[], bool],
    wait_for: Callable[..., None],
    number: signal.Signals,
    code: int,
) -> None:
    process = drive(services=SERVICES, producer="endless")
    wait_for((tmp_path / "run" / "pids" / "producer").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert err == f"error: ran to its end: interrupted by {number.name}\n"
    order = (tmp_path / "run" / "order").read_text().split()
    assert sorted(order[:2]) == ["producer", "trainer"]
    assert order[2:] == ["replica-0", "shard", "broker"]
    assert (tmp_path / "run" / "summary.json").exists()
    assert nothing_runs()


def test_signal_before_anything_is_ready_ends_everything(
    drive: Drive, tmp_path: Path, nothing_runs: Callable[[], bool], wait_for: Callable[..., None]
) -> None:
    process = drive(services={"broker": "never-ready"})
    wait_for((tmp_path / "run" / "pids" / "broker").exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert nothing_runs()


def test_second_signal_kills_what_will_not_end(
    drive: Drive, tmp_path: Path, nothing_runs: Callable[[], bool], wait_for: Callable[..., None]
) -> None:
    # Without the second signal the run would wait for as long as the test may last.
    process = drive(services=SERVICES, producer="deaf", stop_grace_s=600.0)
    wait_for((tmp_path / "run" / "pids" / "producer-worker").exists)
    process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "run" / "order").exists)  # the stop has begun: the trainer has gone
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert nothing_runs()


def test_killed_supervisor_leaves_no_orphans(
    drive: Drive, tmp_path: Path, nothing_runs: Callable[[], bool], wait_for: Callable[..., None]
) -> None:
    process = drive(services=SERVICES | {"stubborn": "deaf"}, producer="deaf")
    wait_for((tmp_path / "run" / "pids" / "producer-worker").exists)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    wait_for(nothing_runs)
    assert len(list((tmp_path / "run" / "pids").iterdir())) == 8


def test_foreign_directory_is_refused_before_anything_starts(
    options: RunOptions, small_config: object
) -> None:
    options.out_dir.mkdir()
    (options.out_dir / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"not an earlier run's directory"):
        run_all(small_config, options)  # type: ignore[arg-type]
    assert [path.name for path in options.out_dir.iterdir()] == ["thesis.txt"]
