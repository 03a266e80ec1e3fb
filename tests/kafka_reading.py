"""Reading what a topic holds, for tests that look at the records a program wrote."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kafka import KafkaConsumer, TopicPartition

READ_TIMEOUT_S = 60.0
FRESH_CONSUMER_S = 10.0
"""A consumer that has brought nothing for so long is replaced: one that met a partition without a leader may
wait for ever."""


def read_records(topic: str, *, options: Mapping[str, Any], num: int) -> list[Any]:
    """The topic's records from the beginning of every partition, once there are at least `num`.

    Args: options: of a kafka-python client.
    Raises: AssertionError with what was found, after a minute.
    """
    deadline_s = time.monotonic() + READ_TIMEOUT_S
    records: list[Any] = []
    while len(records) < num:
        assert time.monotonic() < deadline_s, f"{topic}: {len(records)} records of {num}: {records}"
        records = _read_once(topic, options=options, num=num)
    return records


def _read_once(topic: str, *, options: Mapping[str, Any], num: int) -> list[Any]:
    consumer = KafkaConsumer(**options, group_id=None, enable_auto_commit=False)
    try:
        partitions = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
        if not partitions:
            return []
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        until_s = time.monotonic() + FRESH_CONSUMER_S
        records: list[Any] = []
        while len(records) < num and time.monotonic() < until_s:
            records += [record for found in consumer.poll(500).values() for record in found]
        return records
    finally:
        consumer.close()
