"""Refused records go to a topic of their own, with the reason beside them.

The value is the original record's, or, of impressions that were refused only when they were trained, a record
of these alone; headers say what was wrong and where it came from. Letters are written
before the position passes their record, so none is lost; after a crash, or when partitions are added, one may
be there twice (freshet.origin tells).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError

from trainer.config.schema import SchemaConfig
from trainer.errors import StreamError
from trainer.stream.broker import ensure_topic
from trainer.stream.buffer import Span
from trainer.stream.columns import Impressions
from trainer.stream.record import encode_record
from trainer.stream.slicing import slice_impressions

PENDING_MAX = 256
"""Letters sent but not yet confirmed; one more waits for them."""
WRITE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One refused record, or a record with refused rows."""

    value: bytes | None
    topic: str
    partition: int
    kafka_offset: int
    reason: str
    """The record's reason, or "bad_rows"."""
    text: str
    bad_rows: Mapping[int, str]
    """Row → reason; empty where the value was refused as a whole."""
    impressions: tuple[tuple[int, int], ...] = ()
    """(request id, row in the original record) of each, where the value is a record of some of its rows."""

    def headers(self) -> list[tuple[str, bytes]]:
        rows: dict[str, list[int]] = {}
        for row, reason in self.bad_rows.items():
            rows.setdefault(reason, []).append(row)
        headers = [
            ("freshet.reason", self.reason.encode()),
            ("freshet.text", self.text.encode()),
            ("freshet.origin", f"{self.topic}/{self.partition}/{self.kafka_offset}".encode()),
            ("freshet.bad_rows", json.dumps(rows).encode()),
        ]
        if self.impressions:
            ids, origin_rows = zip(*self.impressions, strict=True)
            headers.append(("freshet.request_ids", json.dumps(ids).encode()))
            headers.append(("freshet.origin_rows", json.dumps(origin_rows).encode()))
        return headers


def letters_of(
    impressions: Impressions,
    *,
    spans: Sequence[Span],
    schema: SchemaConfig,
    topic: str,
    reason: str,
    text: str,
) -> Iterator[DeadLetter]:
    """One letter for each record that the impressions come from; its value is a record of these alone.

    Args: spans: where the impressions come from, in their order.
    """
    start = 0
    for span in spans:
        some = slice_impressions(impressions, start, start + span.num)
        yield DeadLetter(
            value=encode_record(some, schema),
            topic=topic,
            partition=span.partition,
            kafka_offset=span.kafka_offset,
            reason=reason,
            text=text,
            bad_rows={},
            impressions=tuple(zip(some.request_ids_N.tolist(), span.rows_N.tolist(), strict=True)),
        )
        start += span.num


class DeadLetterWriter:
    """Writes letters; connects at the first one. Used by one thread."""

    def __init__(self, topic: str, *, options: Mapping[str, Any]) -> None:
        self._topic = topic
        self._options = options
        self._producer: KafkaProducer | None = None
        self._pending: list[tuple[DeadLetter, Any]] = []

    def write(self, letter: DeadLetter) -> None:
        """Send a letter; it is safe once flush has returned.

        Raises: StreamError if the topic cannot be used, or an earlier letter was refused.
        """
        if self._producer is None:
            ensure_topic(self._topic, num_partitions=1, options=self._options)
            # Not idempotent: such a producer is unusable after the first refused record, and a letter
            # may be there twice anyway.
            self._producer = KafkaProducer(
                **self._options, acks="all", enable_idempotence=False, max_request_size=1 << 26
            )
        if len(self._pending) >= PENDING_MAX:
            self.flush()
        try:
            sent = self._producer.send(self._topic, value=letter.value, headers=letter.headers())
        except KafkaError as error:
            raise self._failure(letter, error) from error
        self._pending.append((letter, sent))

    def flush(self) -> None:
        """Wait until every letter is stored.

        Raises: StreamError naming the record whose letter was not.
        """
        pending, self._pending = self._pending, []
        for letter, sent in pending:
            try:
                try:
                    sent.get(timeout=WRITE_TIMEOUT_S)
                except MessageSizeTooLargeError:
                    self._send_without_value(letter)
            except KafkaError as error:
                raise self._failure(letter, error) from error

    def close(self) -> None:
        """Flush and disconnect."""
        try:
            self.flush()
        finally:
            if self._producer is not None:
                self._producer.close(timeout=WRITE_TIMEOUT_S)

    def _send_without_value(self, letter: DeadLetter) -> None:
        """Headers add bytes to a record that already had the topic's full size; the origin still has it."""
        assert self._producer is not None
        headers = [header for header in letter.headers() if header[0] != "freshet.bad_rows"]
        headers = [*headers, ("freshet.value_omitted", str(len(letter.value or b"")).encode())]
        self._producer.send(self._topic, value=b"", headers=headers).get(timeout=WRITE_TIMEOUT_S)

    def _failure(self, letter: DeadLetter, error: KafkaError) -> StreamError:
        return StreamError(
            f"dead-letter topic '{self._topic}': the letter of {letter.topic}, partition {letter.partition}, "
            f"Kafka offset {letter.kafka_offset} could not be stored ({error}); training stops here rather "
            "than lose it. Make the topic writable and start again"
        )
