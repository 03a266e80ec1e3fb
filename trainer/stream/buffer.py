"""Decoded records waiting to be trained: one queue a partition, in the order of the log.

Whose turn it is, trainer/stream/order.py says. The buffer keeps the positions: they move when impressions are
taken, past refused ones as well, and never by themselves past a record that waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.stream.columns import Impressions, Position
from trainer.stream.record import DecodedRecord, RecordError
from trainer.stream.slicing import slice_impressions


class Span(NamedTuple):
    """Good impressions of one record that follow each other in a batch."""

    partition: int
    kafka_offset: int
    rows_N: npt.NDArray[np.int32]
    """Row of each in the record, ascending: refused ones between them are left out."""

    @property
    def num(self) -> int:
        return len(self.rows_N)


@dataclass(slots=True)
class Entry:
    """What is left of one record; `record` is None where the record was refused as a whole.

    A run of records without a good impression is one entry, with the first one's turn.
    """

    partition: int
    kafka_offset: int
    last_offset: int
    """Of such a run; else kafka_offset again."""
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
        dead_rows = deque([(0, outcome.reason, outcome.num_impressions or 1)])
        return Entry(partition, kafka_offset, kafka_offset, timestamp_ms, None, dead_rows)
    dead_rows = deque((row, reason, 1) for row, reason in outcome.bad_rows.items() if row >= first_row)
    next_good = int(np.searchsorted(outcome.row_numbers_G, first_row))
    return Entry(partition, kafka_offset, kafka_offset, timestamp_ms, outcome, dead_rows, next_good)


@dataclass(slots=True)
class _Partition:
    position: Position
    """The next untrained impression."""
    queue: deque[Entry]
    room: int
    least_good: int
    num_good: int
    """Impressions in the queue that can be trained."""
    num_dead: int
    """Refused rows in the queue; a run of refused records counts as a handful."""
    fetched_to: int
    """Every record before this Kafka offset has entered the queue."""
    end: int
    """The partition's end as last heard."""


class RecordBuffer:
    """One owner at a time: the source guards it with its lock.

    Args: positions: where each partition begins; impressions_max: shared by the partitions in equal parts,
        each of which may be passed by less than one record; least_room: partition → impressions that it must
        be able to hold whatever its part is; least_together: impressions that any of the partitions must be
        able to hold together.
    """

    def __init__(
        self,
        positions: Iterable[Position],
        *,
        impressions_max: int,
        least_room: Mapping[int, int] | None = None,
        least_together: int = 0,
    ) -> None:
        given = tuple(positions)
        self._partitions = {
            position.partition: _Partition(
                position,
                queue=deque(),
                room=max(1, impressions_max // len(given)),
                least_good=(least_room or {}).get(position.partition, 1),
                num_good=0,
                num_dead=0,
                fetched_to=position.kafka_offset,
                end=position.kafka_offset,
            )
            for position in sorted(given)
        }
        self._least_together = least_together
        self.num_buffered = 0
        """Impressions of all partitions that can be trained."""
        self.num_records = 0
        self.num_impressions = 0
        """Of all records that entered, for the mean size of a record."""

    @property
    def partitions(self) -> list[int]:
        """Ascending."""
        return list(self._partitions)

    def has_room(self, partition: int) -> bool:
        state = self._partitions[partition]
        return (
            state.num_good + state.num_dead < state.room
            or state.num_good < state.least_good
            or self.num_buffered < self._least_together
        )

    def add(self, entry: Entry) -> None:
        """Append a record; it must follow those of its partition that are here."""
        state = self._partitions[entry.partition]
        if not entry.num_left:
            # They are fetched even where nothing may be taken yet (a batch waits for a good one behind them),
            # so a run of them has to be one small entry.
            last = state.queue[-1] if state.queue else None
            if last is not None and not last.num_left:
                state.num_dead -= len(last.dead_rows)
                entry.dead_rows.extendleft(reversed(last.dead_rows))
                # The run's turn is its first record's: stamps need not ascend, what is behind it waits, and a
                # drain may end within it.
                entry.timestamp_ms, entry.kafka_offset = last.timestamp_ms, last.kafka_offset
                state.queue.pop()
            _compact(entry)
        state.queue.append(entry)
        state.num_good += entry.num_left
        state.num_dead += len(entry.dead_rows)
        self.num_buffered += entry.num_left
        state.fetched_to = entry.last_offset + 1
        state.end = max(state.end, state.fetched_to)
        self.num_records += 1
        self.num_impressions += entry.num_left

    def advance(self, partition: int, kafka_offset: int) -> None:
        """Offsets below this one that never came hold no records (transaction marks, compaction)."""
        state = self._partitions[partition]
        state.fetched_to = max(state.fetched_to, kafka_offset)

    def set_end(self, partition: int, end: int) -> None:
        self._partitions[partition].end = end

    def num_before(self, partition: int, end: int | None) -> int:
        """Good impressions that wait in records before Kafka offset `end` (None: all of them)."""
        state = self._partitions[partition]
        if end is None or state.fetched_to <= end:
            return state.num_good
        return sum(entry.num_left for entry in state.queue if entry.kafka_offset < end)

    def is_behind(self, partition: int) -> bool:
        """Whether there may be records that have not entered."""
        state = self._partitions[partition]
        return state.fetched_to < state.end

    def has_fetched(self, partition: int, end: int) -> bool:
        """Whether every record before Kafka offset `end` is here or has been taken."""
        return self._partitions[partition].fetched_to >= end

    def oldest(self, ends: Mapping[int, int] | None) -> int | None:
        """The partition whose next record is the oldest, of those before `ends`; None if there is none."""
        waiting = [
            state.queue[0]
            for partition, state in self._partitions.items()
            if state.queue and (ends is None or state.queue[0].kafka_offset < ends.get(partition, 0))
        ]
        return min(waiting, key=_age).partition if waiting else None

    def has_record(self, partition: int, end: int | None) -> bool:
        """Whether a record, good or bad, waits before Kafka offset `end`."""
        queue = self._partitions[partition].queue
        return bool(queue) and (end is None or queue[0].kafka_offset < end)

    def take(
        self, partition: int, num_max: int, *, dead_letters: dict[str, int]
    ) -> tuple[Impressions, Span] | None:
        """Up to num_max impressions of the partition's next record; None if it has no good ones left.

        The caller has looked at `has_record` first. Refused impressions are counted into dead_letters as the
        position passes them.
        """
        state = self._partitions[partition]
        entry = state.queue[0]
        record, start = entry.record, entry.next_good
        num = min(num_max, entry.num_left)
        if record is None or num == 0:
            _finish(state, dead_letters)
            return None
        rows_N = record.row_numbers_G[start : start + num]
        span = Span(entry.partition, entry.kafka_offset, rows_N)
        entry.next_good += num
        state.num_good -= num
        self.num_buffered -= num
        if entry.num_left:
            next_row = int(record.row_numbers_G[entry.next_good])
            state.position = state.position._replace(kafka_offset=entry.kafka_offset, row=next_row)
            _count_dead(state, entry, dead_letters, before_row=next_row)
        else:
            _finish(state, dead_letters)
        return slice_impressions(record.impressions, start, start + num), span

    def positions(self) -> tuple[Position, ...]:
        """The next untrained impression of every partition, ascending by partition."""
        return tuple(_position(state) for state in self._partitions.values())

    def lag_impressions(self) -> int:
        """Records between the positions and the ends, times the impressions of a mean record."""
        mean = self.num_impressions / self.num_records if self.num_records else 1.0
        num_records = sum(
            max(0, state.end - _position(state).kafka_offset) for state in self._partitions.values()
        )
        return round(num_records * mean)


def _position(state: _Partition) -> Position:
    if state.queue or state.fetched_to <= state.position.kafka_offset:
        return state.position
    return state.position._replace(kafka_offset=state.fetched_to, row=0)


def _finish(state: _Partition, dead_letters: dict[str, int]) -> None:
    entry = state.queue.popleft()
    _count_dead(state, entry, dead_letters, before_row=None)
    state.position = state.position._replace(kafka_offset=entry.last_offset + 1, row=0)


def _age(entry: Entry) -> tuple[int, int, int]:
    return entry.timestamp_ms, entry.partition, entry.kafka_offset


def _compact(entry: Entry) -> None:
    """Keep the counts alone of an entry that has no good impression left."""
    counts: dict[str, int] = {}
    for _, reason, num in entry.dead_rows:
        counts[reason] = counts.get(reason, 0) + num
    entry.record, entry.next_good = None, 0
    entry.dead_rows = deque((0, reason, num) for reason, num in counts.items())


def _count_dead(
    state: _Partition, entry: Entry, dead_letters: dict[str, int], *, before_row: int | None
) -> None:
    while entry.dead_rows and (before_row is None or entry.dead_rows[0][0] < before_row):
        _, reason, num = entry.dead_rows.popleft()
        state.num_dead -= 1
        dead_letters[reason] = dead_letters.get(reason, 0) + num
