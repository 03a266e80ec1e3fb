"""A trainer that is killed, again and again, ends in the state of one that never was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from trainer.config import Config, preset, to_toml

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_PARTS = 4
PART_IMPRESSIONS = 4_800
BATCH_SIZE = 96
"""A third of each partition; a part's 75 records in turn over three partitions give 50 whole batches."""


def make_config(broker: Any) -> Config:
    config = preset("quickstart")
    topic = broker.new_topic()
    return replace(
        config,
        model=replace(config.model, tower_widths=(16, 8), gate_hidden=8),
        tables=(replace(config.tables[0], bytes_limit=1 << 20),),
        train=replace(config.train, batch_size=BATCH_SIZE, metrics_window=2000),
        kafka=replace(
            config.kafka,
            bootstrap_servers=broker.bootstrap_servers,
            topic=topic,
            dead_letter_topic=f"{topic}-dead",
            num_partitions=3,
            group=topic,
            # What a batch holds depends on the stream alone, and not on when a kill came.
            order="strict",
        ),
        checkpoint=replace(config.checkpoint, interval_s=1, keep=2),
        serving=replace(config.serving, shard_address=""),
        produce=replace(config.produce, impressions_per_s=1_000_000),
    )


UNLIKE = {"files", "created_ms", "crc32c"}
"""In the manifests: files are compared beside, and no two are of one moment."""


def command(name: str, config: Path, run_dir: Path, *more: str) -> list[str]:
    arguments = ["--config", str(config), "--run-dir", str(run_dir), *more]
    return [sys.executable, "-m", "trainer", name, *arguments]


def drained_manifest(config: Path, run_dir: Path) -> dict[str, Any]:
    """Train to the end of the stream; the manifest of the last checkpoint."""
    drain = run_dir / "control" / "drain"
    drain.parent.mkdir(parents=True, exist_ok=True)
    drain.touch()
    done = subprocess.run(
        command("train", config, run_dir),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (stopped,) = [line for line in done.stderr.splitlines() if "go_on=" in line]
    assert "because='the stream is drained'" in stopped
    assert "next_untrained=" in stopped
    newest = max((run_dir / "checkpoints").glob("step-*"))
    manifest: dict[str, Any] = json.loads((newest / "manifest.json").read_text())
    return manifest


def produce(config: Path, run_dir: Path) -> None:
    """Append one more part to the topic."""
    subprocess.run(
        command("produce", config, run_dir, "--impressions", str(PART_IMPRESSIONS)),
        cwd=REPOSITORY,
        check=True,
        timeout=60,
    )


def impressions_trained(run_dir: Path) -> int:
    """As the status says; 0 where there is none yet."""
    status = run_dir / "status" / "trainer.json"
    return json.loads(status.read_text())["impressions_trained"] if status.exists() else 0


def has_trained(run_dir: Path, num: int) -> bool:
    return impressions_trained(run_dir) >= num


def train_and_kill(config: Path, run_dir: Path, *, when: Callable[[], bool]) -> None:
    """Start training and SIGKILL it once it has come so far."""
    (run_dir / "status" / "trainer.json").unlink(missing_ok=True)
    process = subprocess.Popen(command("train", config, run_dir), cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while not when():
        assert process.poll() is None, "the trainer ended by itself"
        trained = impressions_trained(run_dir)
        assert time.monotonic() < deadline_s, f"only {trained} impressions were trained in time"
        time.sleep(0.02)
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_killed_trainer_ends_in_the_same_state_as_one_that_never_was(
    embedded_broker: Any, tmp_path: Path
) -> None:
    """Invariant 3: every gradient once. Every file of the last checkpoint is equal, bit for bit."""
    config = make_config(embedded_broker)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    killed = tmp_path / "killed"
    for part in range(NUM_PARTS):
        produce(path, tmp_path / "producer")
        if part < NUM_PARTS - 1:
            # However fast this machine is, the stream goes on after the kill.
            enough = int((part + 0.3) * PART_IMPRESSIONS)
            train_and_kill(path, killed, when=partial(has_trained, killed, enough))
    found = drained_manifest(path, killed)
    expected = drained_manifest(path, tmp_path / "unbroken")

    num_impressions = NUM_PARTS * PART_IMPRESSIONS
    assert found["counters"]["impressions_trained"] == num_impressions
    assert found["step"] == num_impressions // BATCH_SIZE
    assert len(found["files"]) >= 3
    assert {k: v for k, v in found.items() if k not in UNLIKE} == {
        k: v for k, v in expected.items() if k not in UNLIKE
    }
    assert found["files"] == expected["files"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_that_began_behind_the_newest_record_goes_on_from_there(
    embedded_broker: Any, tmp_path: Path
) -> None:
    """Killed before it has trained anything: what came meanwhile is trained, what was there before is not."""
    config = make_config(embedded_broker)
    kafka = replace(config.kafka, begin="newest")
    config = replace(config, kafka=kafka, checkpoint=replace(config.checkpoint, interval_s=3600))
    path, run_dir = tmp_path / "config.toml", tmp_path / "run"
    path.write_text(to_toml(config))
    produce(path, tmp_path / "producer")
    manifests = run_dir / "checkpoints"
    train_and_kill(path, run_dir, when=lambda: any(manifests.glob("step-*/manifest.json")))
    produce(path, tmp_path / "producer")
    found = drained_manifest(path, run_dir)
    assert found["counters"]["impressions_trained"] == PART_IMPRESSIONS
