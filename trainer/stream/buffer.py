"""Decoded records waiting to be trained, merged over partitions oldest first.

The order (record timestamp, partition, Kafka offset) depends on nothing but the log, so a run that was
killed and resumed sees its backlog in the order in which an unbroken run does. A partition that is known to
have more records is therefore waited for, up to the caller's patience.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.stream.columns import Impressions, Position
from trainer.stream.record import DecodedRecord, RecordError
from trainer.stream.slicing import slice_impressions


class Span(NamedTuple):
    """`num` good impressions of one record, from row `row` on."""

    partition: int
    kafka_offset: int
    row: int
    num: int


@dataclass(slots=True)
class Entry:
    """What is left of one record; `record` is None where the record was refused as a whole."""

    partition: int
    kafka_offset: int
    timestamp_ms: int
    record: DecodedRecord | None
    dead_rows: deque[tuple[int, str, int]]
    """(row, reason, impressions), ascending by row."""
    next_good: int = 0
    """Index into the record's good impressions."""

    @property
    def num_left(self) -> int:
        return 0 if self.record is None else len(self.record.impressions) - self.next_good


def make_entry(
    outcome: DecodedRecord | RecordError,
    *,
    partition: int,
    kafka_offset: int,
    timestamp_ms: int,
    first_row: int = 0,
) -> Entry:
    """Args: first_row: rows before it were trained by an earlier run."""
    if isinstance(outcome, RecordError):
        dead_rows = deque([(0, outcome.reason, outcome.num_impressions)])
        return Entry(partition, kafka_offset, timestamp_ms, None, dead_rows)
    dead_rows = deque((row, reason, 1) for row, reason in outcome.bad_rows.items() if row >= first_row)
    next_good = int(np.searchsorted(outcome.row_numbers_G, first_row))
    return Entry(partition, kafka_offset, timestamp_ms, outcome, dead_rows, next_good)


@dataclass(slots=True)
class _Partition:
    position: Position
    """The next untrained impression."""
    queue: deque[Entry]
    num_buffered: int
    fetched_to: int
    """Every record before this Kafka offset has entered the queue."""
    end: int
    """The partition's end as last heard."""


class RecordBuffer:
    """One owner at a time: the source guards it with its lock.

    Args: positions: where each partition begins; impressions_max: shared by the partitions in equal
        parts, each of which may be passed by less than one record.
    """

    def __init__(self, positions: Iterable[Position], *, impressions_max: int) -> None:
        self._partitions = {
            position.partition: _Partition(position, deque(), 0, position.kafka_offset, position.kafka_offset)
            for position in positions
        }
        self._share = max(1, impressions_max // max(1, len(self._partitions)))
        self.num_records = 0
        self.num_impressions = 0
        """Of all records that entered, for the mean size of a record."""

    @property
    def num_buffered(self) -> int:
        return sum(state.num_buffered for state in self._partitions.values())

    def has_room(self, partition: int) -> bool:
        return self._partitions[partition].num_buffered < self._share

    def add(self, entry: Entry) -> None:
        state = self._partitions[entry.partition]
        state.queue.append(entry)
        state.num_buffered += entry.num_left
        state.fetched_to = entry.kafka_offset + 1
        state.end = max(state.end, state.fetched_to)
        self.num_records += 1
        self.num_impressions += entry.num_left

    def advance(self, partition: int, kafka_offset: int) -> None:
        """Offsets below this one that never came hold no records (transaction marks, compaction)."""
        state = self._partitions[partition]
        state.fetched_to = max(state.fetched_to, kafka_offset)

    def set_end(self, partition: int, end: int) -> None:
        self._partitions[partition].end = end

    def missing(self) -> set[int]:
        """Partitions with nothing here that are known to have more: the order waits for them."""
        return {
            partition
            for partition, state in self._partitions.items()
            if not state.queue and state.fetched_to < state.end
        }

    def take(self, num_max: int, *, dead_letters: dict[str, int]) -> tuple[Impressions | None, Span] | None:
        """Up to num_max impressions of the oldest record; None if no record waits.

        The caller has looked at `missing` first. A record without good impressions gives a span of 0.
        Refused impressions are counted into dead_letters as the position passes them.
        """
        waiting = [state for state in self._partitions.values() if state.queue]
        if not waiting:
            return None
        state = min(waiting, key=_age)
        entry = state.queue[0]
        record, start = entry.record, entry.next_good
        num = min(num_max, entry.num_left)
        if record is None or num == 0:
            self._finish(state, dead_letters)
            return None, Span(entry.partition, entry.kafka_offset, 0, 0)
        span = Span(entry.partition, entry.kafka_offset, int(record.row_numbers_G[start]), num)
        entry.next_good += num
        state.num_buffered -= num
        if entry.num_left:
            next_row = int(record.row_numbers_G[entry.next_good])
            state.position = state.position._replace(kafka_offset=entry.kafka_offset, row=next_row)
            _count_dead(entry, dead_letters, before_row=next_row)
        else:
            self._finish(state, dead_letters)
        return slice_impressions(record.impressions, start, start + num), span

    def positions(self) -> tuple[Position, ...]:
        """The next untrained impression of every partition, ascending by partition."""
        return tuple(self._position(state) for _, state in sorted(self._partitions.items()))

    def lag_impressions(self) -> int:
        """Records between the positions and the ends, times the impressions of a mean record."""
        mean = self.num_impressions / self.num_records if self.num_records else 1.0
        num_records = sum(
            max(0, state.end - self._position(state).kafka_offset) for state in self._partitions.values()
        )
        return round(num_records * mean)

    @staticmethod
    def _position(state: _Partition) -> Position:
        if state.queue or state.fetched_to <= state.position.kafka_offset:
            return state.position
        return state.position._replace(kafka_offset=state.fetched_to, row=0)

    @staticmethod
    def _finish(state: _Partition, dead_letters: dict[str, int]) -> None:
        entry = state.queue.popleft()
        _count_dead(entry, dead_letters, before_row=None)
        state.position = state.position._replace(kafka_offset=entry.kafka_offset + 1, row=0)


def _age(state: _Partition) -> tuple[int, int, int]:
    entry = state.queue[0]
    return entry.timestamp_ms, entry.partition, entry.kafka_offset


def _count_dead(entry: Entry, dead_letters: dict[str, int], *, before_row: int | None) -> None:
    while entry.dead_rows and (before_row is None or entry.dead_rows[0][0] < before_row):
        _, reason, num = entry.dead_rows.popleft()
        dead_letters[reason] = dead_letters.get(reason, 0) + num
