"""Bad records and bad impressions between good ones: counted, kept with their reason, nothing else lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kafka import KafkaProducer
from msgspec.structs import replace

from proto.impression_pb2 import ImpressionBatch
from tests.kafka_reading import read_records
from tests.spoilt_records import with_label
from trainer.config import Config, to_toml
from trainer.stream.broker import Security, connect_options
from trainer.stream.columns import Impressions
from trainer.stream.record import encode_record

REPOSITORY = Path(__file__).resolve().parents[2]


def spoiled(record: bytes) -> bytes:
    """The record with two impossible impressions: a domain that is none, and a label of 2."""
    batch = ImpressionBatch.FromString(with_label(record, row=5, value=2))
    batch.domain_indices = batch.domain_indices[:3] + bytes([200]) + batch.domain_indices[4:]
    return batch.SerializeToString()


def test_bad_input_is_counted_and_kept_and_the_rest_is_trained(
    broker: Any,
    make_config: Callable[..., Config],
    make_batches: Callable[..., list[Impressions]],
    tmp_path: Path,
) -> None:
    config = make_config(batch_size=64)
    topic = broker.new_topic()
    kafka = replace(
        config.kafka,
        bootstrap_servers=broker.bootstrap_servers,
        topic=topic,
        dead_letter_topic=f"{topic}-dead",
        num_partitions=3,
        group=topic,
    )
    config = replace(config, kafka=kafka, serving=replace(config.serving, shard_address=""))
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))

    options = connect_options(broker.bootstrap_servers, security=Security(), timeout_s=30)
    producer = KafkaProducer(**options)
    batches = make_batches(config, 4)
    batches[0].sparse["item_id"].ids_L[:2] = [1 << 52, -1]
    records = [encode_record(batch, config.schema) for batch in batches[:3]]
    records.insert(1, b"\xff\x00 no record at all")
    records.insert(3, spoiled(encode_record(batches[3], config.schema)))
    for number, record in enumerate(records):
        producer.send(topic, record, partition=number % 3)
    producer.close()

    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "drain").touch()
    command = [sys.executable, "-m", "trainer", "train", "--config", str(path), "--run-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (begins,) = [line for line in done.stderr.splitlines() if "training begins" in line]
    assert f"topic={topic}" in begins
    assert "it publishes nothing" in begins

    newest = max((tmp_path / "checkpoints").glob("step-*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["counters"]["impressions_trained"] == 4 * 64 - 2
    assert sum(manifest["dead_letters"].values()) == 3
    assert len(manifest["dead_letters"]) == 3
    status = json.loads((tmp_path / "status" / "trainer.json").read_text())
    assert status["dead_letters"] == manifest["dead_letters"]
    assert status["ids_folded"] == 2, "ids of 53 bits and more are counted, and trained"

    letters = read_records(f"{topic}-dead", options=options, num=2)
    assert sorted(letter.value for letter in letters) == sorted([records[1], records[3]])
    headers = [dict(letter.headers) for letter in letters]
    assert all(header["freshet.origin"].startswith(topic.encode()) for header in headers)
    rows = [json.loads(header["freshet.bad_rows"]) for header in headers]
    assert sorted(row for by_reason in rows for found in by_reason.values() for row in found) == [3, 5]
