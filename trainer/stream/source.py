"""The trainer's input: batches of impressions from Kafka, with exact positions.

Partitions are assigned, not balanced: partition p belongs to rank p % world_size. Positions come from the
caller's checkpoint; committed offsets are written for lag displays and pacing, and never read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from trainer.config.config import KafkaConfig
from trainer.config.schema import SchemaConfig
from trainer.errors import StreamError
from trainer.stream.broker import Security, connect_options, ensure_topic
from trainer.stream.buffer import RecordBuffer, Span
from trainer.stream.columns import Impressions, Position
from trainer.stream.dead_letters import DeadLetterWriter
from trainer.stream.fetch import FetchThread, Shared, out_of_range_text
from trainer.stream.slicing import concat_impressions, empty_impressions

ORDER_WAIT_S = 10.0
"""How long the oldest-first order waits for a partition that has records but does not deliver them."""
REQUEST_TIMEOUT_S = 30.0
WAIT_S = 0.1


@dataclass(frozen=True, slots=True)
class Batch:
    """Impressions to train; `len(impressions)` may be below what was asked, and 0."""

    impressions: Impressions
    spans: tuple[Span, ...]
    """Where they come from, in their order."""
    dead_letters: dict[str, int]
    """Impressions that the positions passed untrained since the batch before, by reason."""


class KafkaSource:
    """Reads this rank's partitions of kafka.topic, oldest record first over all of them.

    Use: poll_batch → train → positions() into the checkpoint → commit(positions).
    Raises: StreamError if no broker answers, the topic is not usable, or a position is not in the log.
    """

    def __init__(
        self,
        kafka: KafkaConfig,
        *,
        schema: SchemaConfig,
        rank: int = 0,
        world_size: int = 1,
        positions: Iterable[Position] = (),
        security: Security | None = None,
    ) -> None:
        """Args: positions: of any ranks (those of other partitions are ignored); a partition without
        one starts at its oldest record."""
        self._kafka = kafka
        self._schema = schema
        options = connect_options(
            kafka.bootstrap_servers, security=security or Security(), timeout_s=kafka.start_timeout_s
        )
        everything = ensure_topic(kafka.topic, num_partitions=kafka.num_partitions, options=options)
        mine = [partition for partition in everything if partition % world_size == rank]
        given = {
            p.partition: p for p in positions if p.topic == kafka.topic and p.partition % world_size == rank
        }
        lost = sorted(set(given) - set(mine))
        if lost:
            raise StreamError(
                f"topic '{kafka.topic}' has no partition {lost[0]}, for which there is a position; it has "
                f"{len(everything)} partitions. The topic was made anew: use the one that the run began with"
            )
        consumer = KafkaConsumer(
            **options,
            group_id=kafka.group,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            fetch_max_bytes=kafka.fetch_bytes_max,
            max_partition_fetch_bytes=kafka.record_bytes_max,
            fetch_max_wait_ms=100,
        )
        try:
            start = _seek(consumer, topic=kafka.topic, partitions=mine, given=given)
        except BaseException:
            consumer.close(autocommit=False)
            raise
        self._shared = Shared(
            changed=threading.Condition(),
            buffer=RecordBuffer(start, impressions_max=kafka.prefetch_impressions_max),
        )
        for partition, end in _ends(consumer, kafka.topic, mine).items():
            self._shared.buffer.set_end(partition, end)
        self._stalled: set[int] = set()
        self._blocked_since_s: float | None = None
        self._thread = FetchThread(
            consumer,
            kafka=kafka,
            schema=schema,
            start=start,
            shared=self._shared,
            letters=DeadLetterWriter(kafka.dead_letter_topic, options=options),
        )
        self._thread.start()

    def poll_batch(self, num: int, timeout_s: float | None) -> Batch:
        """At most `num` impressions; fewer only when they did not come within timeout_s (None: no limit).

        Records are split where a batch is full; the rest comes first in a later batch.
        Raises: StreamError with what stopped the fetching; ValueError if num is below 1.
        """
        if num < 1:
            raise ValueError(f"a batch has at least 1 impression, found {num}")
        deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        parts: list[Impressions] = []
        spans: list[Span] = []
        dead_letters: dict[str, int] = {}
        left = num
        with self._shared.changed:
            while left:
                if self._shared.error is not None:
                    raise self._shared.error
                now_s = time.monotonic()
                taken = None
                if self._in_order(now_s):
                    taken = self._shared.buffer.take(left, dead_letters=dead_letters)
                if taken is None:
                    if now_s >= deadline_s:
                        break
                    self._shared.changed.wait(min(WAIT_S, deadline_s - now_s))
                    continue
                impressions, span = taken
                if impressions is not None:
                    parts.append(impressions)
                    spans.append(span)
                    left -= span.num
                self._shared.changed.notify_all()
        joined = concat_impressions(parts) if parts else empty_impressions(self._schema)
        return Batch(joined, tuple(spans), dead_letters)

    def _in_order(self, now_s: float) -> bool:
        """Whether the oldest record here is the oldest there is, or the wait for that was too long.

        A partition that did not deliver in time is left out until it delivers again.
        """
        missing = self._shared.buffer.missing()
        self._stalled &= missing
        if missing <= self._stalled:
            self._blocked_since_s = None
            return True
        if self._blocked_since_s is None:
            self._blocked_since_s = now_s
        if now_s < self._blocked_since_s + ORDER_WAIT_S:
            return False
        self._stalled |= missing
        return True

    def positions(self) -> tuple[Position, ...]:
        """The next untrained impression of each of this rank's partitions, counting every batch that was
        handed out as trained: to be called at a step boundary."""
        with self._shared.changed:
            return self._shared.buffer.positions()

    def end_offsets(self) -> dict[int, int]:
        """Partition → the Kafka offset that the next record will get.

        Raises: StreamError if the broker does not answer.
        """
        request: Future[dict[int, int]] = Future()
        with self._shared.changed:
            if self._shared.error is not None:
                raise self._shared.error
            if self._shared.end_request is not None:
                request = self._shared.end_request
            self._shared.end_request = request
            self._shared.changed.notify_all()
        try:
            return request.result(timeout=REQUEST_TIMEOUT_S)
        except FutureTimeoutError as error:
            raise StreamError(
                f"topic '{self._kafka.topic}': no end offsets within {REQUEST_TIMEOUT_S:g} s"
            ) from error

    def drained(self, end_offsets: Mapping[int, int]) -> bool:
        """Whether everything before these ends was handed out."""
        return all(p.kafka_offset >= end_offsets.get(p.partition, 0) for p in self.positions())

    def lag_impressions(self) -> int:
        """An estimate of what waits: records behind the ends, times the mean impressions of a record."""
        with self._shared.changed:
            return self._shared.buffer.lag_impressions()

    @property
    def num_buffered(self) -> int:
        """Decoded impressions that wait: at most prefetch_impressions_max and a record a partition."""
        with self._shared.changed:
            return self._shared.buffer.num_buffered

    def commit(self, positions: Iterable[Position]) -> None:
        """Tell the consumer group how far a checkpoint has come; returns at once, the newest call wins."""
        with self._shared.changed:
            self._shared.to_commit = tuple(positions)
            self._shared.changed.notify_all()

    def close(self) -> None:
        """Stop fetching, store the last commit, disconnect."""
        with self._shared.changed:
            self._shared.stopping = True
            self._shared.changed.notify_all()
        self._thread.join(timeout=REQUEST_TIMEOUT_S)


def _seek(
    consumer: KafkaConsumer, *, topic: str, partitions: list[int], given: Mapping[int, Position]
) -> tuple[Position, ...]:
    """Assign and seek; a position outside of the log is refused before anything is read.

    Returns: where each partition starts.
    """
    assigned = [TopicPartition(topic, partition) for partition in partitions]
    consumer.assign(assigned)
    try:
        oldest = consumer.beginning_offsets(assigned) if assigned else {}
    except KafkaError as error:
        raise StreamError(f"topic '{topic}': no beginning offsets ({error}); is the broker up?") from error
    ends = _ends(consumer, topic, partitions)
    start = []
    for tp in assigned:
        position = given.get(tp.partition, Position(topic, tp.partition, int(oldest[tp]), 0))
        if not oldest[tp] <= position.kafka_offset <= ends[tp.partition]:
            where = (
                f"partition {tp.partition} at Kafka offset {position.kafka_offset} "
                f"(the log has {oldest[tp]}..{ends[tp.partition]})"
            )
            raise StreamError(out_of_range_text(topic, where))
        consumer.seek(tp, position.kafka_offset)
        start.append(position)
    return tuple(start)


def _ends(consumer: KafkaConsumer, topic: str, partitions: list[int]) -> dict[int, int]:
    try:
        ends = consumer.end_offsets([TopicPartition(topic, partition) for partition in partitions])
    except KafkaError as error:
        raise StreamError(f"topic '{topic}': no end offsets ({error}); is the broker up?") from error
    return {tp.partition: int(end) for tp, end in ends.items()}
