"""Partitions that are added while two ranks train are read from their first record, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient

from tests.test_killed_trainer import REPOSITORY, command, make_config
from trainer.config import to_toml

NUM_IMPRESSIONS = 9_600


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    deadline_s = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline_s, log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_partitions_added_under_two_ranks_are_trained_to_their_last_impression(
    kafka_broker: Any, tmp_path: Path
) -> None:
    config = make_config(kafka_broker)
    path, run_dir, log = tmp_path / "config.toml", tmp_path / "run", tmp_path / "log"
    path.write_text(to_toml(config))

    def produce(name: str) -> None:
        arguments = command("produce", path, tmp_path / name, "--impressions", str(NUM_IMPRESSIONS))
        subprocess.run(arguments, cwd=REPOSITORY, check=True, timeout=60)

    def trained() -> int:
        status = run_dir / "status" / "trainer.json"
        return int(json.loads(status.read_text())["impressions_trained"]) if status.exists() else 0

    produce("first")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    train = [sys.executable, *torchrun, *command("train", path, run_dir)[2:]]
    with log.open("w") as file:
        process = subprocess.Popen(
            train, cwd=REPOSITORY, stderr=file, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        wait_until(lambda: trained() >= NUM_IMPRESSIONS // 4, process, log)
        admin = KafkaAdminClient(bootstrap_servers=kafka_broker.bootstrap_servers)
        admin.create_partitions({config.kafka.topic: 5})
        admin.close()
        wait_until(lambda: "partitions were added" in log.read_text(), process, log)
        produce("second")
        (run_dir / "control" / "drain").touch()
        assert process.wait(timeout=120) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    manifest = json.loads((max((run_dir / "checkpoints").glob("step-*")) / "manifest.json").read_text())
    assert manifest["counters"]["impressions_trained"] == 2 * NUM_IMPRESSIONS
    assert sorted(position[1] for position in manifest["positions"]) == [0, 1, 2, 3, 4]
    assert all(position[2] > 0 for position in manifest["positions"])
