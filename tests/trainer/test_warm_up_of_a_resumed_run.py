"""A trainer that resumes with `warm_up = "resume"` moves its dense weights little at first; others go on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from kafka import KafkaProducer
from msgspec.structs import replace

from trainer.config import Config, to_toml
from trainer.stream.broker import Security, connect_options
from trainer.stream.columns import Impressions
from trainer.stream.record import encode_record

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_BATCHES = 20


def send(config: Config, batches: list[Impressions]) -> None:
    options = connect_options(config.kafka.bootstrap_servers, security=Security(), timeout_s=30)
    producer = KafkaProducer(**options)
    for number, batch in enumerate(batches):
        producer.send(config.kafka.topic, encode_record(batch, config.schema), partition=number % 3)
    producer.close()


def trained(config: Config, run_dir: Path) -> dict[str, np.ndarray]:
    """The dense parameters when the topic is drained."""
    (run_dir / "control").mkdir(parents=True, exist_ok=True)
    (run_dir / "control" / "drain").touch()
    (run_dir / "config.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "trainer", "train", "--config", str(run_dir / "config.toml")]
    command += ["--run-dir", str(run_dir)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    newest = max((run_dir / "checkpoints").glob("step-*"))
    dense = safetensors.numpy.load_file(newest / "dense.safetensors")
    return {name: value for name, value in dense.items() if name.startswith("param/")}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_only_the_run_that_asks_for_it_begins_small_after_a_resume(
    embedded_broker: Any,
    make_config: Callable[..., Config],
    make_batches: Callable[..., list[Impressions]],
    tmp_path: Path,
) -> None:
    config = make_config(batch_size=48)
    topic = embedded_broker.new_topic()
    kafka = replace(
        config.kafka,
        bootstrap_servers=embedded_broker.bootstrap_servers,
        topic=topic,
        dead_letter_topic=f"{topic}-dead",
        num_partitions=3,
        order="strict",
    )
    config = replace(config, kafka=kafka, serving=replace(config.serving, shard_address=""))
    batches = make_batches(config, 2 * NUM_BATCHES)
    send(config, batches[:NUM_BATCHES])
    first = trained(config, tmp_path / "plain")
    for name in ("start", "resume"):
        shutil.copytree(tmp_path / "plain", tmp_path / name)
    send(config, batches[NUM_BATCHES:])
    ends = {"plain": trained(config, tmp_path / "plain")}
    # So long that the rest of the stream is a twentieth of it; "start" was over before that run stopped.
    for name, num_steps in (("start", NUM_BATCHES), ("resume", 20 * NUM_BATCHES)):
        train = replace(config.train, warm_up=name, warm_up_steps=num_steps)
        ends[name] = trained(replace(config, train=train), tmp_path / name)
    moved = {
        name: max(float(np.abs(end[key] - first[key]).max()) for key in first) for name, end in ends.items()
    }
    assert moved["plain"] > 0.005
    assert moved["resume"] < 0.1 * moved["plain"]
    for key, value in ends["plain"].items():
        np.testing.assert_array_equal(ends["start"][key], value, err_msg=key)
