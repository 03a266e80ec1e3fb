"""The whole path as a user starts it: real processes, a broker over TCP, gRPC, files.

The runs are short; `make run` is the same thing with the preset's 200,000 impressions.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CONTRACT = {
    *("impressions_produced", "impressions_trained", "dead_letters", "samples_per_s", "auc", "gauc"),
    *("best_possible_auc", "table", "versions", "rows_changed", "rows_pushed", "rows_held_back"),
    *("bytes_pushed", "replicas", "freshness_ms", "seed", "config_hash"),
}


def run(*arguments: str, timeout_s: int = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", "run", "--no-live", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def printed_config() -> str:
    """The quickstart as `config` prints it."""
    command = [sys.executable, "-m", "trainer", "config", "--preset", "quickstart"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout


def check_summary(out: Path, *, impressions: int, domains: set[str]) -> dict[str, Any]:
    """What every run that ends well has in common."""
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert set(summary) >= CONTRACT
    assert summary["impressions_produced"] == impressions
    assert summary["impressions_trained"] == impressions - summary["dead_letters"]
    assert set(summary["auc"]) == domains
    table = summary["table"]
    assert 0 < table["rows"] <= table["capacity"]
    assert 0 < table["bytes"] <= table["bytes_limit"]
    assert summary["versions"]["published"] == summary["versions"]["full"] + summary["versions"]["delta"]
    assert summary["versions"]["full"] >= 2
    assert len(summary["replicas"]) == 2
    for replica in summary["replicas"]:
        assert replica["version"] == summary["version"]
        assert replica["predictions_checked"] > 1000
        assert replica["max_abs_diff"] <= 1e-6
    assert 0 < summary["freshness_ms"]["p50"] <= summary["freshness_ms"]["p99"]
    report = (out / "report.html").read_text()
    assert report.count("<svg") >= 5
    assert not re.search(r"(src|href)\s*=\s*[\"']https?:", report)
    return summary


@pytest.mark.timeout(240)
def test_impressions_become_served_predictions(tmp_path: Path) -> None:
    done = run("--preset", "quickstart", "--impressions", "9000", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = check_summary(
        tmp_path / "run", impressions=9000, domains={"discovery", "featured_video", "slide"}
    )
    assert set(summary["best_possible_auc"]) == set(summary["auc"])
    assert summary["best_possible_auc"]["slide"]["click"] > 0.75


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whole_path_on_real_kafka_goes_on_in_a_second_run(kafka_broker: Any, tmp_path: Path) -> None:
    """Two runs on one broker: the second resumes the first one's checkpoint and topic."""
    out = tmp_path / "run"
    servers = ("--bootstrap-servers", kafka_broker.bootstrap_servers)
    done = run("--preset", "quickstart", "--impressions", "5000", "--out", str(out), *servers)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    first = check_summary(out, impressions=5000, domains={"discovery", "featured_video", "slide"})
    done = run("--preset", "quickstart", "--impressions", "3000", "--out", str(out), "--resume", *servers)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    second = check_summary(out, impressions=8000, domains={"discovery", "featured_video", "slide"})
    assert second["generation"] > first["generation"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_real_feedback_streams_through_the_path(tmp_path: Path) -> None:
    directory = os.environ.get("KUAIRAND_DIR")
    if not directory:
        pytest.skip("KUAIRAND_DIR is not set: no recorded feedback to stream")
    trace = Path(directory) / "trace_0408_0417.csv.gz"
    out = tmp_path / "run"
    done = run("--data", str(trace), "--impressions", "12000", "--rate", "3000", "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = check_summary(out, impressions=12_000, domains={"main"})
    assert summary["best_possible_auc"] == {}


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_quickstart_reaches_its_goals(tmp_path: Path) -> None:
    """The preset as `make run` starts it: quality, budget and evictions at its full length."""
    out = tmp_path / "run"
    done = run("--preset", "quickstart", "--out", str(out), timeout_s=550)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    domains = {"discovery", "featured_video", "slide"}
    summary = check_summary(out, impressions=200_000, domains=domains)
    for domain in domains:
        assert summary["best_possible_auc"][domain]["click"] > 0.75
        assert summary["auc"][domain]["click"] > 0.70
    assert summary["table"]["evicted"]["score"] > 0
    assert summary["table"]["evicted"]["expired"] > 0
    assert summary["rows_held_back"]["update_limit"] > 0
    said = (out / "logs" / "trainer.log").read_text()
    assert said.count("training begins") == 1
    # A line each ten seconds; the stream alone takes a hundred.
    assert 8 <= said.count("lag_impressions=") <= 40


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_of_the_recorded_feedback_streams_through_the_path(tmp_path: Path) -> None:
    directory = os.environ.get("KUAIRAND_DIR")
    if not directory:
        pytest.skip("KUAIRAND_DIR is not set: no recorded feedback to stream")
    out = tmp_path / "run"
    done = run("--data", str(Path(directory) / "trace_0408_0417.csv.gz"), "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = check_summary(out, impressions=33_485, domains={"main"})
    assert sum(summary["table"]["evicted"].values()) > 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_strict_order_and_two_shards_take_the_whole_path(tmp_path: Path) -> None:
    """The producer deals its records to all partitions in turn, so every batch finds its shares; the rows of
    every version lie with the shard that owns their ids."""
    path = tmp_path / "config.toml"
    path.write_text(printed_config().replace("num_shards = 1\n", "num_shards = 2\n"))
    assert "num_shards = 2\n" in path.read_text()
    out = tmp_path / "run"
    done = run("--config", str(path), "--order", "strict", "--impressions", "9000", "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    check_summary(out, impressions=9000, domains={"discovery", "featured_video", "slide"})
    assert 'order = "strict"' in (out / "config.toml").read_text()
    segments = [list((out / "version-log" / "segments" / f"shard-{number}").iterdir()) for number in range(2)]
    assert all(segments), segments


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_ranks_take_the_whole_path_with_data_for_one(tmp_path: Path) -> None:
    """One partition: the second rank never has data and takes part in every step."""
    printed = printed_config()
    path = tmp_path / "config.toml"
    path.write_text(printed.replace("num_partitions = 8", "num_partitions = 1"))
    assert "num_partitions = 1\n" in path.read_text()
    out = tmp_path / "run"
    done = run("--config", str(path), "--impressions", "8000", "--ranks", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    check_summary(out, impressions=8000, domains={"discovery", "featured_video", "slide"})


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_interrupt_stops_every_process_cleanly(tmp_path: Path) -> None:
    """A Ctrl-C in the terminal: SIGINT to the whole foreground group, in the middle of training."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "run", "--no-live", "--preset", "quickstart", "--out", str(out)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: trained(out) > 500, process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 6
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output[-3000:]
    assert [child for child in children if child.is_running()] == []
    assert json.loads((out / "summary.json").read_text())["impressions_trained"] > 0


def trained(out: Path) -> int:
    status = out / "status" / "trainer.json"
    return int(json.loads(status.read_text())["impressions_trained"]) if status.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 80
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline_s, "the run did not get there in time"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--preset", "quikstart"), r"unknown preset 'quikstart' .did you mean 'quickstart'"),
        (("--data", "nowhere.csv"), r"nowhere\.csv"),
        (("--config", "nowhere.toml"), r"nowhere\.toml: cannot be read"),
        (("--impressions", "0"), r"expected a number of at least 1"),
        (("--seconds", "-1"), r"expected seconds above 0"),
        (("--preset", "quickstart", "--config", "x.toml"), r"not allowed with argument"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(
    arguments: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    done = run(*arguments, "--out", str(tmp_path / "run"), timeout_s=60)
    assert done.returncode != 0
    assert re.search(named, done.stderr.strip().splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_key_in_a_configuration_file_is_refused(tmp_path: Path) -> None:
    printed = printed_config()
    path = tmp_path / "config.toml"
    path.write_text(printed.replace("batch_size", "batch_sise"))
    done = run("--config", str(path), "--out", str(tmp_path / "run"), timeout_s=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path}: Object contains unknown field `batch_sise`")


@pytest.mark.timeout(120)
def test_broker_that_does_not_answer_is_named(tmp_path: Path, free_port: Callable[[], int]) -> None:
    printed = printed_config()
    address = f"127.0.0.1:{free_port()}"
    path = tmp_path / "config.toml"
    path.write_text(
        printed.replace("127.0.0.1:9092", address)
        .replace("start_timeout_s = 30", "start_timeout_s = 2")
        .replace('shard_address = "127.0.0.1:0"', 'shard_address = ""')
    )
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", "--config", str(path), "--run-dir", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert address in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
