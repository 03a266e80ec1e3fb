"""Batches that are not finite, in a whole trainer: kept by id, counted once, bounded, as after a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace as with_columns
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from kafka import KafkaProducer
from msgspec.structs import replace

from feature_eviction import make_keys
from tests.kafka_reading import read_records
from tests.spoilt_records import with_label
from trainer.config import Config, to_toml
from trainer.stream.broker import Security, connect_options
from trainer.stream.columns import Impressions
from trainer.stream.record import decode_record, encode_record

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_PARTITIONS = 3
RECORD = 16
BATCH_SIZE = NUM_PARTITIONS * RECORD
"""A record of each partition, as records are dealt in turn and the order is strict."""
NUM_BATCHES = 240
STRANGE_ITEM = 77_000_111
"""An id of no impression but those that are changed; its row is enormous."""


def train(
    config: Path, run_dir: Path, *, num_ranks: int = 1, failpoint: str = ""
) -> subprocess.CompletedProcess[str]:
    """To the end of the stream."""
    (run_dir / "control").mkdir(parents=True, exist_ok=True)
    (run_dir / "control" / "drain").touch()
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m")
    command = [sys.executable, "-m", *(launcher if num_ranks > 1 else ()), "trainer", "train"]
    return subprocess.run(
        [*command, "--config", str(config), "--run-dir", str(run_dir)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=os.environ | {"FRESHET_FAILPOINT": failpoint, "OMP_NUM_THREADS": "1"},
    )


def newest_manifest(run_dir: Path) -> dict[str, Any]:
    newest = max((run_dir / "checkpoints").glob("step-*"))
    manifest: dict[str, Any] = json.loads((newest / "manifest.json").read_text())
    return manifest


def ledger_ids(run_dir: Path) -> list[int]:
    """Each impression as often as it was applied, on whichever rank."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    ids: list[int] = []
    for path in newest.glob("rank*.safetensors"):
        columns = safetensors.numpy.load_file(path)
        ids += np.repeat(columns["part/ledger/ids"], columns["part/ledger/counts"]).tolist()
    return sorted(ids)


@pytest.fixture
def config(embedded_broker: Any, make_config: Callable[..., Config]) -> Config:
    made = make_config(batch_size=BATCH_SIZE)
    topic = embedded_broker.new_topic()
    kafka = replace(
        made.kafka,
        bootstrap_servers=embedded_broker.bootstrap_servers,
        topic=topic,
        dead_letter_topic=f"{topic}-dead",
        num_partitions=NUM_PARTITIONS,
        group=topic,
        order="strict",
    )
    return replace(
        made,
        kafka=kafka,
        serving=replace(made.serving, shard_address=""),
        # Warm-up and the tasks' rates are a part of what a killed trainer must find again.
        train=replace(made.train, ledger=True, warm_up_steps=150, task_scaling="by_positives"),
        checkpoint=replace(made.checkpoint, interval_s=1),
    )


@pytest.fixture
def records(config: Config, make_batches: Callable[..., list[Impressions]]) -> list[Impressions]:
    num = NUM_BATCHES * NUM_PARTITIONS
    return make_batches(replace(config, train=replace(config.train, batch_size=RECORD)), num)


def send(config: Config, records: list[Impressions]) -> dict[str, Any]:
    options = connect_options(config.kafka.bootstrap_servers, security=Security(), timeout_s=30)
    producer = KafkaProducer(**options)
    for number, record in enumerate(records):
        value = encode_record(record, config.schema)
        if number == LAST_RECORD:
            value = with_label(value, row=REFUSED_ROW, value=2)
        producer.send(config.kafka.topic, value, partition=number % NUM_PARTITIONS)
    producer.close()
    return options


def with_strange_item(record: Impressions, row: int) -> Impressions:
    items = record.sparse["item_id"]
    ids_L = items.ids_L.copy()
    ids_L[row] = STRANGE_ITEM
    return with_columns(record, sparse=record.sparse | {"item_id": with_columns(items, ids_L=ids_L)})


def import_enormous_row(config: Config, path: Path, run_dir: Path, *, event_time_s: int) -> None:
    """A model as a batch trainer may hand it over: every number is finite, and one row is absurd."""
    given = run_dir / "given"
    given.mkdir(parents=True)
    class_id = next(feature.class_id for feature in config.schema.features if feature.name == "item_id")
    ids, _ = make_keys(np.array([STRANGE_ITEM]), class_id=class_id)
    columns = {"ids": ids, "rows": np.full((1, 16), 3e38, np.float32)}
    safetensors.numpy.save_file(columns, given / "t.safetensors")
    description = {
        "format": "freshet.export.1",
        "tables": {"dim16": {"dim": 16, "files": ["t.safetensors"]}},
        "event_time_s": event_time_s,
    }
    (given / "export.json").write_text(json.dumps(description))
    command = [sys.executable, "-m", "trainer", "checkpoints", "import", str(given)]
    command += [str(run_dir / "checkpoints"), "--config", str(path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=60)


BAD_BATCHES = (5, 100, 101)
LAST_BAD = 200
"""In it a refused row lies between: its batch takes a row of the partition's next record."""
LAST_RECORD, REFUSED_ROW = NUM_PARTITIONS * LAST_BAD, 4


def spoil(records: list[Impressions]) -> set[tuple[int, int]]:
    """Put the strange item into four batches, of which three have it in partition 1.

    Returns: (record, row) of all impressions of these batches.
    """
    for batch in BAD_BATCHES:
        records[NUM_PARTITIONS * batch + 1] = with_strange_item(records[NUM_PARTITIONS * batch + 1], row=9)
    records[LAST_RECORD] = with_strange_item(records[LAST_RECORD], row=7)
    numbers = [NUM_PARTITIONS * batch + part for batch in (*BAD_BATCHES, LAST_BAD) for part in (0, 1, 2)]
    skipped = {(number, row) for number in numbers for row in range(RECORD)}
    return skipped - {(LAST_RECORD, REFUSED_ROW)} | {(LAST_RECORD + NUM_PARTITIONS, 0)}


def check_letters(
    config: Config, records: list[Impressions], skipped: set[tuple[int, int]], options: dict[str, Any]
) -> None:
    """One letter for each record that took part; what they name and hold is what was skipped."""
    found = []
    letters = read_records(config.kafka.dead_letter_topic, options=options, num=14)
    assert len(letters) == 14, "13 records took part, and one has the refused row"
    for letter in letters:
        headers = dict(letter.headers)
        if headers["freshet.reason"] == b"bad_rows":
            continue
        assert headers["freshet.reason"] == b"non_finite_loss"
        assert b"of its batch is not finite" in headers["freshet.text"]
        topic, partition, kafka_offset = headers["freshet.origin"].decode().split("/")
        assert topic == config.kafka.topic
        record = int(kafka_offset) * NUM_PARTITIONS + int(partition)
        rows = json.loads(headers["freshet.origin_rows"])
        ids = json.loads(headers["freshet.request_ids"])
        assert ids == records[record].request_ids_N[rows].tolist()
        again = decode_record(letter.value, schema=config.schema, produced_ms=letter.timestamp)
        assert again.impressions.request_ids_N.tolist() == ids
        np.testing.assert_array_equal(again.impressions.labels_NT, records[record].labels_NT[rows])
        found += [(record, row) for row in rows]
    assert len(found) == len(skipped)
    assert set(found) == skipped


def check_counts(run_dir: Path, records: list[Impressions], skipped: set[tuple[int, int]]) -> None:
    """What was trained is what was produced but for the dead letters, each impression once."""
    manifest = newest_manifest(run_dir)
    num = NUM_BATCHES * BATCH_SIZE
    assert manifest["dead_letters"] == {"non_finite_loss": len(skipped), "label_not_binary:like": 1}
    assert manifest["counters"]["impressions_trained"] == num - len(skipped) - 1
    ends = [[partition, NUM_BATCHES, 0] for partition in range(NUM_PARTITIONS)]
    assert sorted(position[1:] for position in manifest["positions"]) == ends
    status = json.loads((run_dir / "status" / "trainer.json").read_text())
    assert status["dead_letters"] == manifest["dead_letters"]
    passed = {*skipped, (LAST_RECORD, REFUSED_ROW)}
    assert ledger_ids(run_dir) == sorted(
        request_id
        for number, record in enumerate(records)
        for row, request_id in enumerate(record.request_ids_N.tolist())
        if (number, row) not in passed
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_skipped_batches_are_kept_by_id_and_counted_once(
    config: Config, records: list[Impressions], tmp_path: Path, num_ranks: int
) -> None:
    """With two ranks, only one of them has the strange item in three of the batches. With one, a trainer that
    is killed twice ends in the same state, bit for bit."""
    skipped = spoil(records)
    options = send(config, records)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    import_enormous_row(config, path, unbroken, event_time_s=int(records[0].event_time_ms_N.min()) // 1000)
    shutil.copytree(unbroken, killed)
    done = train(path, unbroken, num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("batch skipped") == 4 * num_ranks
    check_letters(config, records, skipped, options)
    check_counts(unbroken, records, skipped)
    if num_ranks > 1:
        return
    for failpoint in ("after_step:120:kill", "checkpoint.after_pointer:1:kill"):
        assert train(path, killed, failpoint=failpoint).returncode == -9
    assert train(path, killed).returncode == 0
    check_counts(killed, records, skipped)
    assert newest_manifest(killed)["files"] == newest_manifest(unbroken)["files"]


@pytest.mark.slow
def test_a_model_that_has_gone_wrong_stops_the_run_and_says_how_to_go_on(
    config: Config, records: list[Impressions], tmp_path: Path
) -> None:
    config = replace(
        config,
        optimizer=replace(config.optimizer, dense_learning_rate=1e30),
        train=replace(config.train, non_finite_window=20 * BATCH_SIZE, non_finite_share_max=0.1),
    )
    send(config, records[: 3 * 20])
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    stopped = train(path, tmp_path / "run")
    assert stopped.returncode == 1
    error = stopped.stderr.splitlines()[-1]
    assert error.startswith(
        "error: training: 144 of the newest 960 impressions cannot be trained (15.0%; "
        "train.non_finite_share_max allows 10.0%). Most often: non_finite_loss 144 (the last at step 4)."
    )
    assert "start again with lower learning rates" in error
    (line,) = [line for line in stopped.stderr.splitlines() if "go_on=" in line]
    assert "step=4" in line
    assert f"impressions_trained={BATCH_SIZE}" in line

    path.write_text(to_toml(replace(config, train=replace(config.train, non_finite_share_max=1.0))))
    done = train(path, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = newest_manifest(tmp_path / "run")
    assert manifest["counters"]["impressions_trained"] == BATCH_SIZE
    assert manifest["dead_letters"] == {"non_finite_loss": 19 * BATCH_SIZE}
    assert manifest["step"] == 20
