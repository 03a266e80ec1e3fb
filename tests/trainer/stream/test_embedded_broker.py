"""The embedded broker's process, and its limits as the producer counts on them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from trainer.stream.broker import Security, connect_options
from trainer.stream.embedded_broker import PARTITION_BYTES_MAX

REPOSITORY = Path(__file__).resolve().parents[3]


def _accepts(servers: str) -> bool:
    host, _, port = servers.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_topics_have_their_partitions_and_sigterm_ends_it_in_order(start_embedded_broker):
    broker = start_embedded_broker({"a": 2, "b": 5})
    options = connect_options(broker.bootstrap_servers, security=Security(), timeout_s=10)
    consumer = KafkaConsumer(**options)
    assert consumer.partitions_for_topic("a") == {0, 1}
    assert consumer.partitions_for_topic("b") == {0, 1, 2, 3, 4}
    consumer.close()
    assert broker.stop() == 0
    assert not _accepts(broker.bootstrap_servers)


def test_it_ends_with_its_parent(tmp_path):
    ready_file = tmp_path / "ready.json"
    child = (
        "from pathlib import Path\n"
        "from trainer.stream.embedded_broker import run_embedded_broker\n"
        f"run_embedded_broker(topics={{'a': 1}}, ready_file=Path({str(ready_file)!r}))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"],
        cwd=REPOSITORY,
    )
    _wait(ready_file.exists)
    pid = int(ready_file.read_text().split('"pid": ')[1].rstrip("}"))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait(lambda: not _runs(pid))


def test_the_oldest_records_drop_out_beyond_the_stated_bytes(embedded_broker):
    topic = embedded_broker.new_topic()
    options = connect_options(embedded_broker.bootstrap_servers, security=Security(), timeout_s=10)
    producer = KafkaProducer(**options, acks="all")
    consumer = KafkaConsumer(**options)
    partition = TopicPartition(topic, 0)
    size = 100_000
    num_kept = PARTITION_BYTES_MAX // size

    def begins_after(num: int) -> int:
        for _ in range(num):
            producer.send(topic, value=b"x" * size, partition=0).get(timeout=20)
        return int(consumer.beginning_offsets([partition])[partition])

    assert begins_after(num_kept - 2) == 0
    assert begins_after(10) > 0
    producer.close()
    consumer.close()


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    # A zombie has ended; nobody has asked for its exit status yet.
    return state != "Z" and os.path.exists(f"/proc/{pid}")


def _wait(condition) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
