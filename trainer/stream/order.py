"""Whose turn it is: which impressions of which partition make up the next batch.

strict: every global batch of B impressions takes a fixed share of each of the topic's P partitions: B // P
impressions, the first B % P partitions one more. What batch t holds then depends on the stream's content
alone: not on timing, kills, or the number of ranks, each of which takes the shares of its own partitions (p
belongs to rank p % world_size). Shares count good impressions; refused ones are passed on the way. Within a
rank's batch the order is partition ascending, then that of the log. A batch waits for its shares, so an idle
partition holds everything up; only where a drain says where each partition ends does one that has come to
its end give what is left of it and then nothing: nobody else gets its share.

loose: what is there, oldest record first (record timestamp, partition, Kafka offset) over the partitions that
have something. An idle partition holds nobody up, and what a batch holds depends on timing.

In both orders nothing at or beyond the ends of a drain is handed out. Refused records that follow each other
are passed together, so positions may pass an end with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trainer.errors import ConfigError
from trainer.stream.buffer import RecordBuffer, Span
from trainer.stream.columns import Impressions

OrderName = Literal["strict", "loose"]


def partition_shares(batch_size: int, *, num_partitions: int) -> list[int]:
    """Impressions of each partition in one global batch of the strict order.

    Raises: ConfigError if there are more partitions than impressions, since some would never be read.
    """
    if batch_size < num_partitions:
        raise ConfigError(
            f"kafka.order = 'strict' takes at least one impression of each partition into a batch: the topic "
            f"has {num_partitions} partitions, train.batch_size is {batch_size}. Raise train.batch_size, or "
            "take kafka.order = 'loose'"
        )
    least, more = divmod(batch_size, num_partitions)
    return [least + (partition < more) for partition in range(num_partitions)]


@dataclass(slots=True)
class Taken:
    """A batch on its way to being whole."""

    parts: list[Impressions] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    dead_letters: dict[str, int] = field(default_factory=dict)
    num: int = 0

    def take(self, buffer: RecordBuffer, partition: int, num_max: int) -> int:
        """Add what the partition's next record has, up to num_max.

        Returns: how many impressions that was.
        """
        got = buffer.take(partition, num_max, dead_letters=self.dead_letters)
        if got is None:
            return 0
        impressions, span = got
        self.parts.append(impressions)
        self.spans.append(span)
        self.num += span.num
        return span.num


class StrictOrder:
    """The same shares in every batch; all of them or none."""

    def __init__(self, batch_size: int, *, num_partitions: int, rank: int, world_size: int) -> None:
        shares = partition_shares(batch_size, num_partitions=num_partitions)
        self.least_room = {p: shares[p] for p in range(num_partitions) if p % world_size == rank}
        """Partition → its share: what the buffer must be able to hold of it."""
        self.least_together = 0
        self.batch_rows = sum(self.least_room.values())

    def ready(self, buffer: RecordBuffer, ends: Mapping[int, int] | None) -> bool:
        """Whether a batch can be handed out without waiting."""
        return all(
            buffer.num_before(partition, _end(ends, partition)) >= share
            or (ends is not None and buffer.has_fetched(partition, ends.get(partition, 0)))
            for partition, share in self.least_room.items()
        )

    def take(self, buffer: RecordBuffer, taken: Taken, ends: Mapping[int, int] | None) -> bool:
        """Returns: whether the batch is whole; as long as it is not, nothing is taken."""
        if not self.ready(buffer, ends):
            return False
        for partition, share in self.least_room.items():
            left = share
            while left and buffer.has_record(partition, _end(ends, partition)):
                left -= taken.take(buffer, partition, left)
        return True


class LooseOrder:
    """Up to an equal part of the batch on every rank, of whatever is there."""

    def __init__(self, batch_size: int, *, world_size: int) -> None:
        self.least_room: dict[int, int] = {}
        self.batch_rows = -(-batch_size // world_size)
        self.least_together = self.batch_rows
        """What the buffer must be able to hold of whichever partitions have something."""

    def ready(self, buffer: RecordBuffer, ends: Mapping[int, int] | None) -> bool:
        """Whether a full batch can be handed out without waiting, or all that can be here before the ends."""
        waiting = sum(buffer.num_before(partition, _end(ends, partition)) for partition in buffer.partitions)
        if waiting >= self.batch_rows:
            return True
        # What lies beyond the ends may have taken the room for the rest.
        return ends is not None and all(
            buffer.has_fetched(partition, ends.get(partition, 0)) or not buffer.has_room(partition)
            for partition in buffer.partitions
        )

    def take(self, buffer: RecordBuffer, taken: Taken, ends: Mapping[int, int] | None) -> bool:
        """Returns: whether the batch is whole; the caller waits as long as it likes for the rest."""
        while taken.num < self.batch_rows:
            partition = buffer.oldest(ends)
            if partition is None:
                return _all_fetched(buffer, ends)
            taken.take(buffer, partition, self.batch_rows - taken.num)
        return True


def make_order(
    name: OrderName, *, batch_size: int, num_partitions: int, rank: int, world_size: int
) -> StrictOrder | LooseOrder:
    """Args: batch_size: impressions of a batch over all ranks; num_partitions: of the whole topic."""
    if name == "strict":
        return StrictOrder(batch_size, num_partitions=num_partitions, rank=rank, world_size=world_size)
    return LooseOrder(batch_size, world_size=world_size)


def _end(ends: Mapping[int, int] | None, partition: int) -> int | None:
    """A partition that has no end in a drain was made after it: it gives nothing."""
    return None if ends is None else ends.get(partition, 0)


def _all_fetched(buffer: RecordBuffer, ends: Mapping[int, int] | None) -> bool:
    return ends is not None and all(
        buffer.has_fetched(partition, ends.get(partition, 0)) for partition in buffer.partitions
    )
