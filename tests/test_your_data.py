"""docs/your_data.md does what it says: its files and commands, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import KafkaProducer

from proto.impression_pb2 import ImpressionBatch
from tests.kafka_reading import read_records
from trainer.config import load_config
from trainer.stream.broker import Security, connect_options
from trainer.stream.record import RecordError, decode_record

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENT = (REPOSITORY / "docs" / "your_data.md").read_text()
FILES = re.findall(r"`(\w+\.(?:toml|py))`:\n\n```(?:toml|python)\n(.*?)```", DOCUMENT, re.DOTALL)
COMMANDS = re.findall(r"^\$ (.*)$", DOCUMENT, re.MULTILINE)
WITHIN_S = 200

Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The user's folder with the files that the document shows."""
    assert [name for name, _ in FILES] == ["shop.toml", "produce.py", "ask.py"]
    for name, content in FILES:
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.fixture
def begin(folder: Path, free_port: Callable[[], int]) -> Iterator[Begin]:
    """Start a command in that folder; only the ports are free ones, and KAFKA:9092 is what is given."""
    ports = {"7001": str(free_port()), "7002": str(free_port())}
    started: list[subprocess.Popen[str]] = []
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def start(command: str, *, kafka: str = "") -> subprocess.Popen[str]:
        command = re.sub(r"127\.0\.0\.1:(700\d)", lambda found: f"127.0.0.1:{ports[found[1]]}", command)
        with (folder / f"{len(started)}.log").open("w") as log:
            process = subprocess.Popen(
                shlex.split(command.replace("KAFKA:9092", kafka)),
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        started.append(process)
        return process

    yield start
    for process in reversed(started):
        process.kill()
        process.wait(timeout=20)


@pytest.mark.timeout(290)
def test_a_stream_of_ones_own_is_trained_and_served(begin: Begin, folder: Path) -> None:
    broker, produce, shard, replica, train, ask = COMMANDS
    config = load_config(folder / "shop.toml")
    serving = begin(broker)
    assert serving.stdout is not None
    kafka = serving.stdout.readline().strip()
    begin(shard)
    begin(replica)
    assert begin(produce, kafka=kafka).wait(timeout=120) == 0, (folder / "3.log").read_text()
    options = connect_options(kafka, security=Security(), timeout_s=30)
    records = read_records(config.kafka.topic, options=options, num=120)
    batches = [ImpressionBatch.FromString(record.value) for record in records]
    for batch in batches:
        check_columns(batch)
    produced = sum(batch.num_impressions for batch in batches)
    ids = np.concatenate([np.frombuffer(batch.request_ids, "<u8") for batch in batches])
    assert len(set(ids.tolist())) == produced == 12_000
    with KafkaProducer(**options) as producer:
        producer.send(config.kafka.topic, b"no impressions").get(timeout=30)

    trainer = begin(train, kafka=kafka)

    def status() -> dict[str, Any]:
        assert trainer.poll() is None, (folder / "4.log").read_text()[-3000:]
        file = folder / "run" / "status" / "trainer.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    deadline_s = time.monotonic() + WITHIN_S
    while status().get("impressions_trained", 0) < produced or not status()["dead_letters"]:
        assert time.monotonic() < deadline_s, f"not trained in time: {status()}"
        time.sleep(0.2)
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(timeout=60) == 0
    last = json.loads((folder / "run" / "status" / "trainer.json").read_text())
    assert last["impressions_trained"] == produced
    assert last["dead_letters"] == {"not_decodable": 1}
    check_letter(config.kafka.dead_letter_topic, config.kafka.topic, options)

    answer = answered(begin, ask, version=last["version"])
    [click, buy] = [np.array(row.split("[")[1].rstrip("]").split(), float) for row in answer[1:]]
    assert click[0] > 0.3 > max(click[1:]), "product 3 is clicked in half of its shows, the others in a tenth"
    assert ((buy > 0) & (buy < 1)).all()


def check_columns(batch: ImpressionBatch) -> None:
    """Every column of the document's table has the values and the width that it says."""
    table = re.findall(r"^\| `(\w+)`(?:: `(\w+)`)? \| (\w+) \[(\w)\] \|", DOCUMENT, re.MULTILINE)
    assert len(table) == 9
    num = batch.num_impressions
    for column, part, dtype, length in table:
        found = getattr(batch, column)
        for one in found if part else [found]:
            data = getattr(one, part) if part else one
            if part in ("lengths", "known") and not data:
                continue
            ids = sum(np.frombuffer(one.lengths, "<u2")) if length == "L" and one.lengths else num
            assert len(data) == (ids if length == "L" else num) * np.dtype(dtype).itemsize, (column, part)


def check_letter(dead_letter_topic: str, topic: str, options: dict[str, Any]) -> None:
    [letter] = read_records(dead_letter_topic, options=options, num=1)
    assert letter.value == b"no impressions"
    headers = {name: value.decode() for name, value in letter.headers}
    assert all(f"`{name}`" in DOCUMENT for name in headers)
    assert headers["freshet.reason"] == "not_decodable"
    assert headers["freshet.origin"].startswith(f"{topic}/")


def answered(begin: Begin, ask: str, *, version: str) -> list[str]:
    """The client's lines from that version: what the document says that it prints, but for the numbers."""
    deadline_s = time.monotonic() + 30
    while True:
        process = begin(ask)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        if output.startswith(f"version {version} "):
            break
        assert time.monotonic() < deadline_s, f"version {version} is not served: {output}"
    shown = re.search(r"It prints `(version .*?)`.*?`(click .*?)`, `(buy .*?)`", DOCUMENT)
    assert shown is not None
    assert [shape_of(line) for line in output.splitlines()] == [shape_of(line) for line in shown.groups()]
    return output.splitlines()


def shape_of(line: str) -> list[str]:
    return [re.sub(r"[\d.]+", "0", word) for word in re.findall(r"[\w.]+|\W", line) if word != " "]


def test_the_documents_bad_rows_have_the_reasons_that_it_names(folder: Path) -> None:
    schema = load_config(folder / "shop.toml").schema

    def record() -> ImpressionBatch:
        batch = ImpressionBatch(num_impressions=2, domain_names=["search", "home"], domain_indices=b"\0\1")
        batch.request_ids = batch.user_ids = batch.event_time_ms = np.array([5, 6]).tobytes()
        for name in ("product_id", "recent_products", "brand_id"):
            batch.sparse.add(name=name, ids=np.array([1, 2]).tobytes())
        batch.dense.add(name="price", values=np.array([1, 2], np.float32).tobytes())
        batch.labels.add(task="click", values=b"\0\1")
        return batch

    def reasons(batch: ImpressionBatch) -> list[str]:
        return list(decode_record(batch.SerializeToString(), schema=schema, produced_ms=9).bad_rows.values())

    good = decode_record(record().SerializeToString(), schema=schema, produced_ms=9)
    assert good.impressions.domain_N.tolist() == [1, 0]
    assert good.impressions.known_NT.tolist() == [[True, False], [True, False]]

    domain, one_id, label = record(), record(), record()
    domain.domain_names[0] = "basket"
    one_id.sparse[0].lengths = np.array([0, 2], np.uint16).tobytes()
    label.labels[0].values = b"\0\2"
    found = [reasons(domain), reasons(one_id), reasons(label)]
    assert found == [["unknown_domain"], ["not_one_id:product_id"] * 2, ["label_not_binary:click"]]
    missing, unequal = record(), record()
    del missing.sparse[[column.name for column in missing.sparse].index("brand_id")]
    unequal.user_ids = unequal.user_ids[:8]
    whole = {"missing_column:brand_id": missing, "unequal_columns": unequal}
    for reason, batch in whole.items():
        with pytest.raises(RecordError) as refused:
            reasons(batch)
        assert refused.value.reason == reason
    for named in (*whole, *(reason for some in found for reason in some)):
        assert f"`{named}`" in DOCUMENT
