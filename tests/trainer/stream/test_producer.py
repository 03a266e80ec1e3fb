"""The producer's process: what it sends, how fast, and that it never outruns the embedded broker."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from kafka import KafkaConsumer, TopicPartition

from trainer.config import Config, preset, to_toml
from trainer.run.status import ProducerStatus, read_status
from trainer.stream.broker import Security, connect_options
from trainer.stream.embedded_broker import PARTITION_BYTES_MAX
from trainer.stream.producer import EMBEDDED_SHARE
from trainer.stream.source import KafkaSource

STOP_GRACE_S = 20.0
"""What a run gives its producer between SIGTERM and SIGKILL."""
REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from pathlib import Path
from trainer.config import load_config
from trainer.data.synthetic import SyntheticStream
from trainer.stream.producer import run_producer
config = load_config(Path(sys.argv[1]))
run_producer(
    config,
    source=SyntheticStream(config).batches(config.produce.record_impressions),
    status_file=Path(sys.argv[2]),
    impressions=int(sys.argv[3]),
    rate=int(sys.argv[4]),
    embedded=sys.argv[5] == "embedded",
)
"""


@pytest.fixture
def produce(tmp_path):
    """`produce(config, impressions, rate, kind)` → (process, status file)"""
    started = []

    def start(config: Config, impressions: int, rate: int, kind: str):
        (tmp_path / "config.toml").write_text(to_toml(config))
        status_file = tmp_path / "producer.json"
        arguments = [str(tmp_path / "config.toml"), str(status_file), str(impressions), str(rate), kind]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], cwd=REPOSITORY, stderr=subprocess.PIPE
        )
        started.append(process)
        return process, status_file

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


def _config(broker, topic: str, **changes) -> Config:
    base = preset("quickstart")
    kafka = msgspec.structs.replace(
        base.kafka, bootstrap_servers=broker.bootstrap_servers, topic=topic, group=f"group-{topic}"
    )
    return msgspec.structs.replace(base, kafka=kafka, **({"impressions": 20_000} | changes))


def _status(path: Path) -> ProducerStatus:
    status = read_status(path, ProducerStatus)
    assert status is not None
    return status


def test_everything_arrives_and_the_truth_is_judged(broker, produce):
    config = _config(broker, broker.new_topic())
    process, status_file = produce(config, 5_000, 0, "kafka")
    assert process.wait(timeout=60) == 0, process.stderr.read().decode()
    status = _status(status_file)
    assert (status.state, status.impressions_produced, status.records_produced) == ("done", 5_000, 79)
    assert 0.75 < status.best_possible_auc["slide"]["click"] < 0.9
    assert 0.6 < status.best_possible_gauc["slide"]["click"] < 0.9

    source = KafkaSource(config.kafka, schema=config.schema, batch_size=1_000)
    ends = source.end_offsets()
    assert max(ends.values()) - min(ends.values()) <= 1
    request_ids, produced_ms = [], []
    while not source.drained(ends):
        batch = source.poll_batch(0.5)
        assert not batch.dead_letters
        request_ids += batch.impressions.request_ids_N.tolist()
        produced_ms += batch.impressions.produced_ms_N.tolist()
    source.close()
    assert len(set(request_ids)) == len(request_ids) == 5_000
    assert abs(produced_ms[-1] - time.time() * 1_000) < 600_000


def test_the_pace_is_kept(embedded_broker, produce):
    config = _config(embedded_broker, embedded_broker.new_topic())
    start_s = time.monotonic()
    process, status_file = produce(config, 2_560, 1_280, "kafka")
    assert process.wait(timeout=60) == 0, process.stderr.read().decode()
    # 40 records at 20 a second, the first at once: no machine can make that faster, if it is kept.
    assert time.monotonic() - start_s > 39 / 20
    assert _status(status_file).impressions_produced == 2_560


def test_sigterm_ends_it_in_order_with_everything_stored(embedded_broker, produce):
    config = _config(embedded_broker, embedded_broker.new_topic(), impressions=1_000_000)
    process, status_file = produce(config, 0, 2_000, "embedded")
    _wait(lambda: status_file.exists() and _status(status_file).impressions_produced > 500)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, process.stderr.read().decode()
    status = _status(status_file)
    assert status.state == "done"
    assert status.told_to_stop
    assert sum(_ends(config).values()) == status.records_produced


def test_dead_broker_does_not_keep_it_beyond_the_grace_of_a_stop(start_embedded_broker, produce):
    broker = start_embedded_broker({"dying": 3})
    config = _config(broker, "dying", impressions=1_000_000)
    process, status_file = produce(config, 0, 2_000, "kafka")
    _wait(lambda: status_file.exists() and _status(status_file).impressions_produced > 500)
    broker.process.kill()
    broker.process.wait()
    time.sleep(0.5)  # in which it sends a dozen records
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=STOP_GRACE_S) != 0
    assert b"the broker did not take a record" in process.stderr.read()


def test_what_the_broker_has_not_confirmed_does_not_count_as_produced(start_embedded_broker, produce):
    """A producer that is killed leaves a number that the broker has stored."""
    broker = start_embedded_broker({"stopped": 3})
    process, status_file = produce(_config(broker, "stopped", impressions=1_000_000), 0, 2_000, "kafka")
    _wait(lambda: status_file.exists() and _status(status_file).impressions_produced > 500)
    broker.process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(1.0)  # the status is written twice a second
        assert _still(status_file)
        confirmed = _status(status_file).records_produced
    finally:
        broker.process.send_signal(signal.SIGCONT)
    _wait(lambda: _status(status_file).records_produced > confirmed + 10)
    assert process.poll() is None


def test_the_embedded_broker_is_never_overrun_and_commits_let_it_go_on(embedded_broker, produce):
    config = _config(
        embedded_broker,
        embedded_broker.new_topic(),
        produce=msgspec.structs.replace(preset("quickstart").produce, record_impressions=2_000),
        impressions=120_000,
    )
    process, status_file = produce(config, 120_000, 0, "embedded")
    source = KafkaSource(config.kafka, schema=config.schema, batch_size=2_000)
    _wait(lambda: _still(status_file))
    waiting = _status(status_file)
    assert waiting.state == "producing"
    assert waiting.bytes_produced <= 3 * EMBEDDED_SHARE * PARTITION_BYTES_MAX
    num = 0
    while num < 120_000:
        assert process.poll() in (None, 0), process.stderr.read().decode()
        num += len(source.poll_batch(0.5).impressions)
        source.commit(source.positions())
    source.close()
    assert process.wait(timeout=60) == 0
    assert _status(status_file).impressions_produced == num == 120_000


def test_records_that_dropped_out_unread_are_an_error(embedded_broker, produce):
    """A second writer overruns the partition behind the guarded one's back."""
    config = _config(embedded_broker, embedded_broker.new_topic(), impressions=1_000_000)
    process, status_file = produce(config, 0, 500, "embedded")
    _wait(lambda: status_file.exists() and _status(status_file).records_produced > 3)
    from kafka import KafkaProducer

    other = KafkaProducer(**_options(config), acks="all")
    for _ in range(60):
        other.send(config.kafka.topic, value=b"x" * 100_000, partition=0).get(timeout=20)
    other.close()
    assert process.wait(timeout=60) != 0
    assert b"dropped records" in process.stderr.read()


def _options(config: Config):
    return connect_options(config.kafka.bootstrap_servers, security=Security(), timeout_s=10)


def _ends(config: Config) -> dict[TopicPartition, int]:
    consumer = KafkaConsumer(**_options(config))
    ends = consumer.end_offsets([TopicPartition(config.kafka.topic, p) for p in range(3)])
    consumer.close()
    return ends


def _still(status_file: Path) -> bool:
    """Whether something was produced, and nothing more within a second."""
    before = read_status(status_file, ProducerStatus)
    time.sleep(1.5)
    after = read_status(status_file, ProducerStatus)
    return bool(
        before and after and before.records_produced and before.records_produced == after.records_produced
    )


def _wait(condition) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
