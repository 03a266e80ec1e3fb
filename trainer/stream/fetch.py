"""The fetch thread: polls Kafka, decodes, writes dead letters, fills the buffer.

It alone touches the consumer, which is not safe for two threads.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import structlog
from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError, LogTruncationError, OffsetOutOfRangeError

from trainer.config.config import KafkaConfig
from trainer.config.schema import SchemaConfig
from trainer.errors import FreshetError, StreamError
from trainer.stream.bad_budget import BadBudget, allowance_of_stream
from trainer.stream.buffer import Entry, RecordBuffer, make_entry
from trainer.stream.columns import Position
from trainer.stream.dead_letters import DeadLetter, DeadLetterWriter
from trainer.stream.record import DecodedRecord, EventTimes, RecordError, decode_record
from trainer.stream.topic_watch import TopicWatch

POLL_RECORDS = 1 << 30
"""All that was fetched: kafka-python 3.0.12 forgets a fetch that was read in part when its partition is
paused and resumed (the partition then stands still). Memory stays bounded by fetch_bytes_max."""
POLL_IDLE_MS = 100
POLL_BUSY_MS = 5
"""While a partition waits for room: it must be looked at again soon."""
END_REFRESH_S = 1.0
REQUEST_TIMEOUT_MS = 10_000

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Shared:
    """What the fetch thread and the source share, all of it under `changed`."""

    changed: threading.Condition
    buffer: RecordBuffer
    error: FreshetError | None = None
    stopping: bool = False
    to_commit: tuple[Position, ...] | None = None
    """The newest wish replaces an older one."""
    end_request: Future[dict[int, int]] | None = None
    partitions_grew: bool = False


class FetchThread(threading.Thread):
    """Runs until stopped or until a fault, which the source raises to its caller."""

    def __init__(
        self,
        consumer: KafkaConsumer,
        *,
        kafka: KafkaConfig,
        schema: SchemaConfig,
        start: tuple[Position, ...],
        shared: Shared,
        letters: DeadLetterWriter,
        watch: TopicWatch,
    ) -> None:
        super().__init__(name="stream-fetch", daemon=True)
        self._consumer = consumer
        self._kafka = kafka
        self._schema = schema
        self._first_row = {(p.partition, p.kafka_offset): p.row for p in start if p.row}
        self._partitions = [TopicPartition(kafka.topic, p.partition) for p in start]
        self._shared = shared
        self._letters = letters
        self._watch = watch
        self._budget = BadBudget(allowance_of_stream(kafka))
        self._event_times = EventTimes(
            future_ms_max=1_000 * kafka.event_time_future_s_max,
            past_ms_max=1_000 * kafka.event_time_past_s_max,
        )
        self._raw: dict[int, deque[Any]] = {p.partition: deque() for p in start}
        """Polled but not decoded: a partition is not polled again before its part is empty."""
        self._ends_at_s = float("-inf")

    def run(self) -> None:
        try:
            while not self._stopping():
                self._serve_requests()
                self._watch_topic()
                self._refresh_ends()
                self._fill()
                self._poll()
            self._serve_requests()
        except FreshetError as error:
            self._fail(error)
        except KafkaError as error:
            self._fail(self._explained(error))
        except Exception as error:
            self._fail(StreamError(f"topic '{self._kafka.topic}': the fetch thread failed: {error!r}"))
            raise
        finally:
            self._close()

    def _stopping(self) -> bool:
        with self._shared.changed:
            return self._shared.stopping

    def _close(self) -> None:
        """Disconnect; letters on their way are waited for, whatever ended the thread."""
        try:
            self._letters.close()
        except (FreshetError, KafkaError) as error:
            # Their records are behind no position yet, so the next start meets them again.
            log.warning("dead_letters_not_stored", topic=self._kafka.topic, error=str(error))
        self._consumer.close(autocommit=False, timeout_ms=5_000)

    def _fail(self, error: FreshetError) -> None:
        with self._shared.changed:
            self._shared.error = error
            if self._shared.end_request is not None:
                self._shared.end_request.set_exception(error)
                self._shared.end_request = None
            self._shared.changed.notify_all()

    def _serve_requests(self) -> None:
        with self._shared.changed:
            to_commit, self._shared.to_commit = self._shared.to_commit, None
            end_request, self._shared.end_request = self._shared.end_request, None
        if to_commit is not None:
            offsets = {
                TopicPartition(p.topic, p.partition): OffsetAndMetadata(p.kafka_offset, "", -1)
                for p in to_commit
            }
            try:
                self._consumer.commit(offsets, timeout_ms=REQUEST_TIMEOUT_MS)
            except KafkaError as error:
                # Training never reads committed offsets; the next checkpoint commits again.
                log.warning("commit_failed", group=self._kafka.group, error=str(error))
        if end_request is not None:
            try:
                end_request.set_result(self._ends())
            except KafkaError as error:
                end_request.set_exception(
                    StreamError(f"topic '{self._kafka.topic}': no end offsets ({error}); is the broker up?")
                )

    def _ends(self) -> dict[int, int]:
        ends = self._consumer.end_offsets(self._partitions, timeout_ms=REQUEST_TIMEOUT_MS)
        with self._shared.changed:
            for tp, end in ends.items():
                self._shared.buffer.set_end(tp.partition, int(end))
            self._shared.changed.notify_all()
        return {tp.partition: int(end) for tp, end in ends.items()}

    def _watch_topic(self) -> None:
        if self._watch.look(time.monotonic()):
            with self._shared.changed:
                self._shared.partitions_grew = True

    def _refresh_ends(self) -> None:
        now_s = time.monotonic()
        if now_s < self._ends_at_s + END_REFRESH_S or not self._partitions:
            return
        self._ends_at_s = now_s
        try:
            self._ends()
        except KafkaError as error:
            if not error.retriable:
                raise
            log.warning("end_offsets_failed", topic=self._kafka.topic, error=str(error))

    def _poll(self) -> None:
        """Fetch for the partitions that have room; the others are paused, which is the back-pressure."""
        with self._shared.changed:
            full = {p for p, raw in self._raw.items() if raw or not self._shared.buffer.has_room(p)}
            if len(full) == len(self._raw):
                if not self._shared.stopping:
                    self._shared.changed.wait((POLL_BUSY_MS if full else POLL_IDLE_MS) / 1_000)
                return
        for tp in self._partitions:
            if tp.partition in full:
                self._consumer.pause(tp)
            else:
                self._consumer.resume(tp)
        try:
            timeout_ms = POLL_BUSY_MS if full else POLL_IDLE_MS
            polled = self._consumer.poll(timeout_ms=timeout_ms, max_records=POLL_RECORDS)
        except KafkaError as error:
            if not error.retriable:
                raise
            # The broker is away or its leader moves; kafka-python reconnects by itself.
            log.warning("poll_failed", topic=self._kafka.topic, error=str(error))
            time.sleep(POLL_IDLE_MS / 1_000)
            return
        for tp, records in polled.items():
            self._raw[tp.partition].extend(records)
        self._fill()
        self._pass_gaps()

    def _fill(self) -> None:
        """Decode while there is room; dead letters are stored before their records enter the buffer."""
        while True:
            with self._shared.changed:
                room = [p for p, raw in self._raw.items() if raw and self._shared.buffer.has_room(p)]
            decoded = [self._decode(self._raw[partition].popleft()) for partition in room]
            if any(letter_sent for _, letter_sent in decoded):
                self._letters.flush()
                self._budget.check()
            with self._shared.changed:
                for entry, _ in decoded:
                    self._shared.buffer.add(entry)
                if decoded:
                    self._shared.changed.notify_all()
            if not decoded:
                return

    def _pass_gaps(self) -> None:
        """Kafka offsets below the client's position that never came hold no records.

        Asked only where records may be missing: the client looks at all its partitions for each answer.
        """
        with self._shared.changed:
            behind = [
                tp
                for tp in self._partitions
                if not self._raw[tp.partition] and self._shared.buffer.is_behind(tp.partition)
            ]
        passed = [(tp.partition, self._consumer.position(tp)) for tp in behind]
        with self._shared.changed:
            for partition, kafka_offset in passed:
                self._shared.buffer.advance(partition, kafka_offset)
            if passed:
                self._shared.changed.notify_all()

    def _decode(self, raw: Any) -> tuple[Entry, bool]:
        """The record as an entry, and whether a dead letter was sent for it."""
        first_row = self._first_row.pop((raw.partition, raw.offset), 0)
        outcome: DecodedRecord | RecordError
        try:
            outcome = decode_record(
                raw.value,
                schema=self._schema,
                produced_ms=raw.timestamp,
                record_bytes_max=self._kafka.record_bytes_max,
                event_times=self._event_times,
            )
        except RecordError as error:
            outcome = error
        entry = make_entry(
            outcome,
            partition=raw.partition,
            kafka_offset=raw.offset,
            timestamp_ms=raw.timestamp,
            first_row=first_row,
        )
        bad: Counter[str] = Counter()
        for _, reason, num in entry.dead_rows:
            bad[reason] += num
        self._budget.add(outcome.num_impressions, bad, origin=f"{raw.topic}/{raw.partition}/{raw.offset}")
        if not entry.dead_rows:
            return entry, False
        whole = isinstance(outcome, RecordError)
        self._letters.write(
            DeadLetter(
                value=raw.value,
                topic=raw.topic,
                partition=raw.partition,
                kafka_offset=raw.offset,
                reason=outcome.reason if isinstance(outcome, RecordError) else "bad_rows",
                text=str(outcome) if whole else f"{len(entry.dead_rows)} rows cannot be used",
                bad_rows={} if whole else {row: reason for row, reason, _ in entry.dead_rows},
            )
        )
        return entry, True

    def _explained(self, error: KafkaError) -> FreshetError:
        """What an operator can do about an error that the client does not get over by itself."""
        try:
            # The client may know already that the topic is another one, which then is the cause of the rest.
            self._watch.look(time.monotonic())
        except StreamError as cause:
            return cause
        topic = self._kafka.topic
        if isinstance(error, OffsetOutOfRangeError):
            asked = error.args[0] if error.args and isinstance(error.args[0], Mapping) else {}
            places = [f"partition {tp.partition} at Kafka offset {offset}" for tp, offset in asked.items()]
            return StreamError(out_of_range_text(topic, ", ".join(places) or str(error)))
        if isinstance(error, LogTruncationError):
            return StreamError(truncated_text(topic, str(error)))
        return StreamError(f"topic '{topic}': {error}")


def out_of_range_text(topic: str, where: str) -> str:
    """What an operator can do about a position that the log no longer (or not yet) has."""
    return (
        f"topic '{topic}': {where} is not in the log: retention has removed it, or the topic was made "
        "anew. Impressions in between would be lost silently, so training stops. Choices: restore the "
        "data; or start from a checkpoint whose positions exist; or accept the gap and start with a fresh "
        "run directory, which begins at the oldest record there is; and give the topic a longer retention"
    )


def truncated_text(topic: str, what: str) -> str:
    """What an operator can do about a log that lost records after they were read."""
    return (
        f"topic '{topic}': the log was cut off below the position ({what}): a replica with fewer records "
        "became leader, or the topic was made anew. What was trained of the lost records cannot be taken "
        "back, so training stops. Choices: go back to a checkpoint whose positions exist; or start with a "
        "fresh run directory; and forbid unclean leader elections on this topic"
    )
