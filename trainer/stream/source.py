"""The trainer's input: batches of impressions from Kafka, with exact positions.

Partitions are assigned, not balanced: partition p belongs to rank p % world_size. Positions come from the
caller's checkpoint; committed offsets are written for lag displays and pacing, and never read. What a batch
takes of which partition, kafka.order says (trainer/stream/order.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from trainer.config.config import KafkaConfig
from trainer.config.schema import SchemaConfig
from trainer.errors import StreamError
from trainer.stream.broker import Security, connect_options, ensure_topic
from trainer.stream.buffer import RecordBuffer, Span
from trainer.stream.columns import Impressions, Position
from trainer.stream.dead_letters import DeadLetterWriter, letters_of
from trainer.stream.fetch import FetchThread, Shared, out_of_range_text
from trainer.stream.order import Taken, make_order
from trainer.stream.slicing import concat_impressions, empty_impressions
from trainer.stream.topic_watch import (
    ANEW_CHOICES,
    METADATA_AGE_S,
    TopicWatch,
    check_topic_id,
    watch_topic,
)

REQUEST_TIMEOUT_S = 30.0
WAIT_S = 0.1


@dataclass(frozen=True, slots=True)
class Batch:
    """Impressions to train; `len(impressions)` is at most the source's batch_rows, and may be 0."""

    impressions: Impressions
    spans: tuple[Span, ...]
    """Where they come from, in their order."""
    dead_letters: dict[str, int]
    """Impressions that the positions passed untrained since the batch before, by reason."""
    positions: tuple[Position, ...]
    """Where this batch ends: the positions of whoever has trained it and those before it, and none after
    it."""


class KafkaSource:
    """Reads this rank's partitions of kafka.topic, in the order that kafka.order names.

    Use: poll_batch → train → positions and topic_id into the checkpoint → commit(positions). Once
    partitions_grew, close it and make another from its positions: the new partitions then begin at their
    oldest record.
    Raises: StreamError if no broker answers, the topic is not usable or not the expected one, or a position
    is not in the log; ConfigError if the strict order has more partitions than impressions in a batch.
    """

    def __init__(
        self,
        kafka: KafkaConfig,
        *,
        schema: SchemaConfig,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        positions: Iterable[Position] = (),
        expected_topic_id: str = "",
        security: Security | None = None,
    ) -> None:
        """Args: batch_size: impressions of one batch over all ranks. positions: of any ranks (those of other
        partitions are ignored); a partition without one starts at its oldest record, or, where there are none
        at all, where kafka.begin says. expected_topic_id: the topic_id of the source that the positions come
        from; "" = not known."""
        self._kafka = kafka
        self._schema = schema
        options = connect_options(
            kafka.bootstrap_servers, security=security or Security(), timeout_s=kafka.start_timeout_s
        )
        known = {p.partition: p for p in positions if p.topic == kafka.topic}
        everything = ensure_topic(
            kafka.topic, num_partitions=kafka.num_partitions, options=options, may_create=not known
        )
        self.num_partitions = len(everything)
        """Of the whole topic, as it was when this was made."""
        num = self.num_partitions
        self._order = make_order(
            kafka.order, batch_size=batch_size, num_partitions=num, rank=rank, world_size=world_size
        )
        mine = [partition for partition in everything if partition % world_size == rank]
        _check_partitions(kafka.topic, everything, known)
        consumer = _consumer(kafka, options)
        watch, start, ends = _place(
            consumer, kafka, num, expected_topic_id=expected_topic_id, mine=mine, given=known
        )
        self.topic_id = watch.topic_id
        """The id that the broker gave the topic when it was made; "" where the broker has no such ids."""
        buffer = RecordBuffer(
            start,
            impressions_max=kafka.prefetch_impressions_max,
            least_room=self._order.least_room,
            least_together=self._order.least_together,
        )
        for partition, end in ends.items():
            buffer.set_end(partition, end)
        self._shared = Shared(changed=threading.Condition(), buffer=buffer)
        self._thread = FetchThread(
            consumer,
            kafka=kafka,
            schema=schema,
            start=start,
            shared=self._shared,
            letters=DeadLetterWriter(kafka.dead_letter_topic, options=options),
            watch=watch,
        )
        self._letters = DeadLetterWriter(kafka.dead_letter_topic, options=options)
        """The caller's own, since a writer belongs to one thread."""
        self._thread.start()

    @property
    def batch_rows(self) -> int:
        """The most impressions that a batch of this rank can have; in the strict order it follows from the
        topic's number of partitions."""
        return self._order.batch_rows

    @property
    def partitions_grew(self) -> bool:
        """Whether the topic has more partitions by now than when this was made; noticed within seconds."""
        with self._shared.changed:
            return self._shared.partitions_grew

    def ready(self, *, timeout_s: float = 0.0, end_offsets: Mapping[int, int] | None = None) -> bool:
        """Whether poll_batch has a whole batch right now; waits up to timeout_s for that.

        Several ranks stay in step in the strict order if all of them are ready before any of them polls. A
        rank without partitions is always ready there, and never in the loose order.
        Raises: StreamError with what stopped the fetching.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._shared.changed:
            while not self._order.ready(self._buffer_or_raise(), end_offsets):
                now_s = time.monotonic()
                if now_s >= deadline_s:
                    return False
                self._shared.changed.wait(min(WAIT_S, deadline_s - now_s))
        return True

    def poll_batch(self, timeout_s: float | None, *, end_offsets: Mapping[int, int] | None = None) -> Batch:
        """The next batch, of batch_rows impressions if they come within timeout_s (None: no limit).

        Otherwise a batch of the strict order is empty, one of the loose order holds what there is. Records
        are split where a batch is full; the rest comes first in a later batch.
        Args: end_offsets: of a drain: nothing at or beyond them is handed out, and no batch waits for more.
        Raises: StreamError with what stopped the fetching.
        """
        deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        taken = Taken()
        with self._shared.changed:
            while not self._order.take(self._buffer_or_raise(), taken, end_offsets):
                now_s = time.monotonic()
                if now_s >= deadline_s:
                    break
                # What was taken has made room.
                self._shared.changed.notify_all()
                self._shared.changed.wait(min(WAIT_S, deadline_s - now_s))
            self._shared.changed.notify_all()
            positions = self._shared.buffer.positions()
        joined = concat_impressions(taken.parts) if taken.parts else empty_impressions(self._schema)
        return Batch(joined, tuple(taken.spans), taken.dead_letters, positions)

    def _buffer_or_raise(self) -> RecordBuffer:
        if self._shared.error is not None:
            raise self._shared.error
        return self._shared.buffer

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
        """Decoded impressions that wait: at most prefetch_impressions_max, a batch and a record a partition
        together; without the batch where every partition's part of the prefetch holds one."""
        with self._shared.changed:
            return self._shared.buffer.num_buffered

    def refuse(self, batch: Batch, *, reason: str, text: str) -> None:
        """Write the batch's impressions to the dead-letter topic, each with its id and where it came from.

        They are stored when this returns, so that no checkpoint passes them before.
        Raises: StreamError if they could not be stored.
        """
        letters = letters_of(
            batch.impressions,
            spans=batch.spans,
            schema=self._schema,
            topic=self._kafka.topic,
            reason=reason,
            text=text,
        )
        for letter in letters:
            self._letters.write(letter)
        self._letters.flush()

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
        try:
            self._letters.close()
        finally:
            self._thread.join(timeout=REQUEST_TIMEOUT_S)


def _place(
    consumer: KafkaConsumer,
    kafka: KafkaConfig,
    num_partitions: int,
    *,
    expected_topic_id: str,
    mine: list[int],
    given: Mapping[int, Position],
) -> tuple[TopicWatch, tuple[Position, ...], dict[int, int]]:
    """Make sure of the topic and seek; a consumer that cannot be placed is closed.

    Returns: the watch over the topic, where each partition starts, where each ends by now.
    """
    try:
        watch = watch_topic(consumer, kafka.topic, num_partitions=num_partitions)
        check_topic_id(kafka.topic, expected=expected_topic_id, found=watch.topic_id)
        # A rank that had no partition before the topic grew has no position either, and is not new.
        is_new = not given and not expected_topic_id
        behind_all = is_new and kafka.begin == "newest"
        start = _seek(consumer, topic=kafka.topic, partitions=mine, given=given, behind_all=behind_all)
        return watch, start, _ends(consumer, kafka.topic, mine)
    except BaseException:
        consumer.close(autocommit=False)
        raise


def _check_partitions(topic: str, everything: list[int], known: Mapping[int, Position]) -> None:
    lost = sorted(set(known) - set(everything))
    if lost:
        raise StreamError(
            f"topic '{topic}' has no partition {lost[0]}, for which there is a position; it has "
            f"{len(everything)} partitions. The topic was made anew. {ANEW_CHOICES}"
        )


def _consumer(kafka: KafkaConfig, options: Mapping[str, Any]) -> KafkaConsumer:
    return KafkaConsumer(
        **options,
        group_id=kafka.group,
        enable_auto_commit=False,
        auto_offset_reset="none",
        isolation_level="read_committed",
        fetch_max_bytes=kafka.fetch_bytes_max,
        max_partition_fetch_bytes=kafka.record_bytes_max,
        fetch_max_wait_ms=100,
        metadata_max_age_ms=int(METADATA_AGE_S * 1_000),
    )


def _seek(
    consumer: KafkaConsumer,
    *,
    topic: str,
    partitions: list[int],
    given: Mapping[int, Position],
    behind_all: bool,
) -> tuple[Position, ...]:
    """Assign and seek; a position outside of the log is refused before anything is read.

    Args: behind_all: a partition that is not among the given ones starts behind its newest record, and not
        at its oldest.
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
        first = ends[tp.partition] if behind_all else int(oldest[tp])
        position = given.get(tp.partition, Position(topic, tp.partition, first, 0))
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
