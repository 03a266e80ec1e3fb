"""A Kafka broker for trying things out: librdkafka's mock cluster, in a process of its own.

Real TCP and Kafka's real protocol, memory only. It ships inside the confluent-kafka wheel, whose bundled
library is driven through ctypes here. It has no transactions and no admin API; beyond its limits it drops the
oldest records of a partition, so a producer has to stay within them (trainer/stream/producer.py does).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import confluent_kafka

from trainer.errors import StreamError

PARTITION_BYTES_MAX = 5 << 20
PARTITION_RECORDS_MAX = 100_000
"""Limits of one partition: what lies beyond them drops out of the log at its old end."""

RD_KAFKA_PRODUCER = 0
PR_SET_PDEATHSIG = 1
PARENT_CHECK_S = 0.5


def run_embedded_broker(*, topics: Mapping[str, int], ready_file: Path | None) -> None:
    """Serve until SIGTERM, SIGINT or the parent's end; must run in the process's main thread.

    Prints host:port, a line of its own, once it listens.
    Args: topics: name → partitions. ready_file: gets {"bootstrap_servers": host:port, "pid": number}.
    Raises: StreamError if the bundled library is missing or refuses a topic.
    """
    stop = threading.Event()
    parent = os.getppid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    _die_with_parent()
    servers, close = _start_cluster(topics)
    if ready_file is not None:
        temporary = ready_file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"bootstrap_servers": servers, "pid": os.getpid()}))
        os.replace(temporary, ready_file)
    sys.stdout.write(f"{servers}\n")
    sys.stdout.flush()
    # The parent is watched as well, since the kernel's signal exists on Linux only.
    while not stop.wait(PARENT_CHECK_S) and os.getppid() == parent:
        pass
    close()


def _die_with_parent() -> None:
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    except (OSError, AttributeError):
        return


def _start_cluster(topics: Mapping[str, int]) -> tuple[str, Callable[[], None]]:
    """Returns: host:port, and what ends the cluster."""
    library = _library()
    message = ctypes.create_string_buffer(512)
    config = library.rd_kafka_conf_new()
    # The client handle only carries the cluster; it would log that it has no servers of its own.
    library.rd_kafka_conf_set(config, b"log_level", b"0", message, len(message))
    client = library.rd_kafka_new(RD_KAFKA_PRODUCER, config, message, len(message))
    if not client:
        raise StreamError(f"embedded broker: librdkafka does not start ({message.value.decode()})")
    cluster = library.rd_kafka_mock_cluster_new(client, 1)
    if not cluster:
        raise StreamError("embedded broker: no cluster; are loopback ports free?")
    for topic, num_partitions in topics.items():
        failed = library.rd_kafka_mock_topic_create(cluster, topic.encode(), num_partitions, 1)
        if failed:
            raise StreamError(
                f"embedded broker: topic '{topic}' with {num_partitions} partitions is refused ({failed})"
            )

    def close() -> None:
        library.rd_kafka_mock_cluster_destroy(cluster)
        library.rd_kafka_destroy(client)

    return library.rd_kafka_mock_cluster_bootstraps(cluster).decode(), close


def _library() -> ctypes.CDLL:
    """The librdkafka that the confluent-kafka wheel brings, with the signatures used here."""
    folder = Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs"
    found = sorted(folder.glob("librdkafka*"))
    if not found:
        raise StreamError(
            f"embedded broker: no librdkafka in {folder}; install the confluent-kafka wheel, or use Kafka"
        )
    # Loaded once by name, so the wheel's own extension and this share one copy.
    library = ctypes.CDLL(str(found[0]))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("rd_kafka_conf_new", pointer, []),
        ("rd_kafka_conf_set", number, [pointer, text, text, text, ctypes.c_size_t]),
        ("rd_kafka_new", pointer, [number, pointer, text, ctypes.c_size_t]),
        ("rd_kafka_destroy", None, [pointer]),
        ("rd_kafka_mock_cluster_new", pointer, [pointer, number]),
        ("rd_kafka_mock_cluster_bootstraps", text, [pointer]),
        ("rd_kafka_mock_cluster_destroy", None, [pointer]),
        ("rd_kafka_mock_topic_create", number, [pointer, text, number, number]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
