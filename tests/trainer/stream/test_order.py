"""Batches of the strict order depend on the stream's content alone; loose batches take what is there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.stream.buffer import RecordBuffer, make_entry
from trainer.stream.columns import Position
from trainer.stream.order import Taken, make_order, partition_shares
from trainer.stream.record import RecordError, decode_record, encode_record
from trainer.stream.slicing import slice_impressions

PRODUCED_MS = 1_700_000_000_000


@dataclass(frozen=True)
class Record:
    """One record of a made-up log: its impressions' ids, some of them bad, and when it was stamped."""

    ids: tuple[int, ...]
    bad: tuple[int, ...]
    """Ids that cannot be trained. A record without ids is one that does not decode."""
    stamp: int


Log = list[list[Record]]
"""The records of each partition."""


@st.composite
def logs(draw) -> Log:
    """One to five partitions of up to eight records of up to seven impressions, some bad, some not
    decodable."""
    counter, stamps = itertools.count(), itertools.count()
    log: Log = []
    for _ in range(draw(st.integers(1, 5))):
        records = []
        for _ in range(draw(st.integers(0, 8))):
            ids = tuple(next(counter) for _ in range(draw(st.integers(0, 7))))
            spoiled = draw(st.sets(st.integers(0, 20), max_size=2))
            bad = tuple(number for row, number in enumerate(ids) if row in spoiled)
            records.append(Record(ids, bad, next(stamps) + draw(st.integers(0, 5))))
        log.append(records)
    return log


def decoded(record: Record, schema, all_impressions):
    if not record.ids:
        return RecordError("not_decodable", "made up")
    impressions = slice_impressions(all_impressions, record.ids[0], record.ids[-1] + 1)
    event_time_ms_N = impressions.event_time_ms_N.copy()
    event_time_ms_N[[number - record.ids[0] for number in record.bad]] = -1
    changed = {name: getattr(impressions, name) for name in impressions.__dataclass_fields__}
    changed["event_time_ms_N"] = event_time_ms_N
    value = encode_record(type(impressions)(**changed), schema)
    return decode_record(value, schema=schema, produced_ms=PRODUCED_MS)


@pytest.fixture(scope="module")
def all_impressions(make_impressions):
    return make_impressions(300)


def good_ids(records: list[Record]) -> list[int]:
    return [number for record in records for number in record.ids if number not in record.bad]


def strict_reference(log: Log, batch_size: int) -> list[list[list[int]]]:
    """Batch → partition → ids, until everything is handed out: the promise, word by word."""
    queues = [good_ids(records) for records in log]
    shares = [batch_size // len(log) + (p < batch_size % len(log)) for p in range(len(log))]
    batches = []
    while any(queues):
        batches.append([queue[:share] for queue, share in zip(queues, shares, strict=True)])
        queues = [queue[share:] for queue, share in zip(queues, shares, strict=True)]
    return batches


class Feed:
    """Puts a log's partitions of one rank into a buffer, record by record in any order of partitions."""

    def __init__(
        self, log, *, order, rank=0, world_size=1, positions=None, room, schema, all_impressions
    ) -> None:
        self.mine = [p for p in range(len(log)) if p % world_size == rank]
        self.start = {p: (positions or {}).get(p, Position("t", p, 0, 0)) for p in self.mine}
        self.buffer = RecordBuffer(
            self.start.values(),
            impressions_max=room,
            least_room=order.least_room,
            least_together=order.least_together,
        )
        self._log, self._schema, self._all = log, schema, all_impressions
        self._next = {p: self.start[p].kafka_offset for p in self.mine}

    def unread(self) -> list[int]:
        return [p for p in self.mine if self._next[p] < len(self._log[p])]

    def waiting(self) -> list[int]:
        return [p for p in self.unread() if self.buffer.has_room(p)]

    def add(self, partition: int) -> None:
        kafka_offset = self._next[partition]
        self._next[partition] += 1
        record = self._log[partition][kafka_offset]
        start = self.start[partition]
        first_row = start.row if kafka_offset == start.kafka_offset else 0
        outcome = decoded(record, self._schema, self._all)
        self.buffer.add(
            make_entry(
                outcome,
                partition=partition,
                kafka_offset=kafka_offset,
                timestamp_ms=record.stamp,
                first_row=first_row,
            )
        )


def run_rank(
    rng, log, *, order_name, batch_size, rank, world_size, schema, all_impressions
) -> tuple[list[list[int]], dict[str, int]]:
    """Drain one rank's part of the log; arrivals, polls, stops and resumes come as the generator draws them.

    Returns: the ids of each batch, in their order; the dead letters.
    """
    ends = {p: len(records) for p, records in enumerate(log)}
    positions: dict[int, Position] = {}
    batches: list[list[int]] = []
    dead: dict[str, int] = {}
    feed, taken = None, Taken()
    for _ in range(10_000):
        if feed is None:
            order = make_order(
                order_name, batch_size=batch_size, num_partitions=len(log), rank=rank, world_size=world_size
            )
            feed = Feed(
                log,
                order=order,
                rank=rank,
                world_size=world_size,
                positions=positions,
                room=int(rng.integers(1, 21)),
                schema=schema,
                all_impressions=all_impressions,
            )
        if all(position.kafka_offset >= ends[position.partition] for position in feed.buffer.positions()):
            if taken.num:
                batches.append([i for part in taken.parts for i in part.request_ids_N.tolist()])
            return batches, {**dead, **_added(dead, taken.dead_letters)}
        waiting = feed.waiting()
        # Whether the drain is known already must make no difference to what a batch holds.
        known_ends = ends if rng.random() < 0.5 else None
        was_ready = order.ready(feed.buffer, known_ends)
        if feed.unread() and not waiting and (order_name == "loose" or known_ends is not None):
            assert was_ready, "the buffer takes no more, and a batch waits for more"
        before = taken.num
        if rng.random() < 0.5 and order.take(feed.buffer, taken, known_ends):
            assert was_ready or order_name == "loose"
            assert taken.num <= order.batch_rows
            batches.append([i for part in taken.parts for i in part.request_ids_N.tolist()])
            dead = _added(dead, taken.dead_letters)
            taken = Taken()
            positions = {position.partition: position for position in feed.buffer.positions()}
            if rng.random() < 0.25:
                feed = None
        elif order_name == "strict":
            assert taken.num == before == 0, "a strict batch is taken whole or not at all"
        if feed is not None and waiting:
            feed.add(int(rng.choice(waiting)))
    raise AssertionError("the drain stands still")


def _added(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    return {reason: left.get(reason, 0) + right.get(reason, 0) for reason in {*left, *right}}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), log=logs(), spare=st.integers(0, 9))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_strict_batches_are_the_references_whatever_the_timing_the_stops_and_the_number_of_ranks(
    world_size, seed, log, spare, schema, all_impressions
):
    batch_size = len(log) + spare
    expected = strict_reference(log, batch_size)
    dead: dict[str, int] = {}
    for rank in range(world_size):
        found, dead_of_rank = run_rank(
            np.random.default_rng([seed, rank]),
            log,
            order_name="strict",
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            schema=schema,
            all_impressions=all_impressions,
        )
        dead = _added(dead, dead_of_rank)
        # Partition ascending, then the log's order; a batch that only passed bad rows at the end is empty.
        wanted = [
            [number for p in range(rank, len(log), world_size) for number in batch[p]] for batch in expected
        ]
        while wanted and not wanted[-1]:
            wanted.pop()
        while found and not found[-1]:
            found.pop()
        assert found == wanted
    assert dead.get("not_decodable", 0) == sum(not record.ids for records in log for record in records)
    assert dead.get("event_time_not_positive", 0) == sum(len(r.bad) for records in log for r in records)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), log=logs(), batch_size=st.integers(1, 12))
def test_loose_batches_hand_out_each_impression_once_in_its_partitions_order(
    seed, log, batch_size, schema, all_impressions
):
    batches, dead = run_rank(
        np.random.default_rng(seed),
        log,
        order_name="loose",
        batch_size=batch_size,
        rank=0,
        world_size=1,
        schema=schema,
        all_impressions=all_impressions,
    )
    seen = [number for batch in batches for number in batch]
    for records in log:
        mine = set(good_ids(records))
        assert [number for number in seen if number in mine] == good_ids(records)
    assert sorted(seen) == sorted(good_ids([record for records in log for record in records]))
    assert sum(dead.values()) == sum(len(r.bad) + (not r.ids) for records in log for r in records)


@settings(max_examples=40, deadline=None)
@given(log=logs(), batch_size=st.integers(1, 12))
@example(
    log=[
        [Record((), (), stamp=0), Record((), (), stamp=4), Record((0,), (), stamp=2)],
        [Record((1,), (), stamp=3)],
    ],
    batch_size=1,
)
def test_a_loose_batch_is_the_oldest_of_what_is_there(log, batch_size, schema, all_impressions):
    """With everything there, the reference is a plain merge by (stamp, partition, Kafka offset) of the
    heads."""
    order = make_order("loose", batch_size=batch_size, num_partitions=len(log), rank=0, world_size=1)
    feed = Feed(log, order=order, room=10_000, schema=schema, all_impressions=all_impressions)
    while waiting := feed.waiting():
        feed.add(waiting[0])
    heads = [list(enumerate(records)) for records in log]
    expected: list[int] = []
    while any(heads):
        p = min((p for p in range(len(log)) if heads[p]), key=lambda p: (heads[p][0][1].stamp, p))
        record = heads[p].pop(0)[1]
        expected += good_ids([record])
        # A run of records without a good impression is passed at once.
        while not good_ids([record]) and heads[p] and not good_ids([heads[p][0][1]]):
            heads[p].pop(0)
    taken = Taken()
    assert order.take(feed.buffer, taken, None) == (len(expected) >= batch_size)
    assert [i for part in taken.parts for i in part.request_ids_N.tolist()] == expected[:batch_size]


def test_shares_of_a_batch_add_up_and_differ_by_at_most_one():
    assert partition_shares(10, num_partitions=4) == [3, 3, 2, 2]
    assert partition_shares(4, num_partitions=4) == [1, 1, 1, 1]
    for world_size in (1, 2, 3):
        rows = [
            make_order("strict", batch_size=10, num_partitions=4, rank=rank, world_size=world_size).batch_rows
            for rank in range(world_size)
        ]
        assert sum(rows) == 10


def test_more_partitions_than_impressions_in_a_batch_are_refused_in_the_strict_order_only():
    with pytest.raises(ConfigError, match=r"5 partitions, train.batch_size is 4"):
        partition_shares(4, num_partitions=5)
    assert make_order("loose", batch_size=5, num_partitions=9, rank=0, world_size=2).batch_rows == 3


def test_an_idle_partition_holds_the_strict_order_up_and_the_loose_one_not(schema, all_impressions):
    log = [[Record((0, 1, 2), (), 0)], []]
    arguments = {"batch_size": 2, "num_partitions": 2, "rank": 0, "world_size": 1}
    strict, loose = make_order("strict", **arguments), make_order("loose", **arguments)
    feed = Feed(log, order=strict, room=10, schema=schema, all_impressions=all_impressions)
    feed.add(0)
    assert not strict.ready(feed.buffer, None)
    assert strict.ready(feed.buffer, {0: 1, 1: 0})
    assert loose.ready(feed.buffer, None)


def test_a_strict_share_fits_however_small_the_prefetch_and_however_bad_the_rows(schema, all_impressions):
    """Refused records in front of good ones take neither the room nor, in a long run, the memory."""
    order = make_order("strict", batch_size=4, num_partitions=1, rank=0, world_size=1)
    buffer = RecordBuffer([Position("t", 0, 0, 0)], impressions_max=1, least_room=order.least_room)
    for kafka_offset in range(1_000):
        assert buffer.has_room(0)
        error = RecordError("not_decodable", "made up")
        buffer.add(make_entry(error, partition=0, kafka_offset=kafka_offset, timestamp_ms=0))
    assert len(buffer._partitions[0].queue) == 1
    assert not order.ready(buffer, None)
    for number in range(4):
        assert buffer.has_room(0)
        outcome = decoded(Record((number,), (), 0), schema, all_impressions)
        buffer.add(make_entry(outcome, partition=0, kafka_offset=1_000 + number, timestamp_ms=0))
    assert not buffer.has_room(0)
    taken = Taken()
    assert order.take(buffer, taken, None)
    assert taken.num == 4
    assert taken.dead_letters == {"not_decodable": 1_000}
    assert buffer.positions() == (Position("t", 0, 1_004, 0),)


@pytest.mark.parametrize("order_name", ["strict", "loose"])
def test_a_drain_hands_out_nothing_beyond_its_ends(order_name, schema, all_impressions):
    """Also where more is there, and for a partition that was made after the drain began."""
    log = [[Record((0, 1), (), 0), Record((2, 3), (), 1)], [Record((4, 5), (), 2)], [Record((6,), (), 3)]]
    order = make_order(order_name, batch_size=6, num_partitions=3, rank=0, world_size=1)
    feed = Feed(log, order=order, room=10, schema=schema, all_impressions=all_impressions)
    for partition in (0, 0, 1, 2):
        feed.add(partition)
    taken, ends = Taken(), {0: 1, 1: 1}
    assert order.ready(feed.buffer, ends)
    assert order.take(feed.buffer, taken, ends)
    assert [i for part in taken.parts for i in part.request_ids_N.tolist()] == [0, 1, 4, 5]
    rest = Taken()
    assert order.take(feed.buffer, rest, ends), "a drained rank waits for nothing"
    assert rest.num == 0


def test_a_loose_batch_fits_however_little_room_each_partition_has(schema, all_impressions):
    """Else a batch waits for more than the buffer takes: where few of many partitions have records, or
    where a batch is larger than the prefetch."""
    busy = [Record((2 * n, 2 * n + 1), (), n) for n in range(20)]
    order = make_order("loose", batch_size=9, num_partitions=4, rank=0, world_size=1)
    feed = Feed([busy, [], [], []], order=order, room=8, schema=schema, all_impressions=all_impressions)
    for first in (0, 9, 18, 27):
        while feed.waiting():
            assert not order.ready(feed.buffer, None)
            feed.add(0)
        assert order.ready(feed.buffer, None)
        assert feed.buffer.num_buffered <= 10
        taken = Taken()
        assert order.take(feed.buffer, taken, None)
        ids = [i for part in taken.parts for i in part.request_ids_N.tolist()]
        assert ids == list(range(first, first + 9))


def test_a_drain_waits_for_nothing_that_has_no_room(schema, all_impressions):
    """A live producer's records beyond the ends take the room of those before them."""
    busy = [Record((2 * n, 2 * n + 1), (), n) for n in range(4)]
    behind = [Record((8 + 2 * n, 9 + 2 * n), (), n) for n in range(4)]
    order = make_order("loose", batch_size=4, num_partitions=2, rank=0, world_size=1)
    feed = Feed([busy, behind], order=order, room=4, schema=schema, all_impressions=all_impressions)
    ends = {0: 0, 1: 4}
    while feed.buffer.has_room(0):
        feed.add(0)
    assert not order.ready(feed.buffer, ends), "records before the end are on their way"
    while feed.buffer.has_room(1):
        feed.add(1)
    assert feed.buffer.num_before(1, 4) < order.batch_rows
    assert order.ready(feed.buffer, ends)


@pytest.mark.parametrize("order_name", ["strict", "loose"])
def test_a_drain_ends_within_a_run_of_refused_records(order_name):
    """The run is one entry, and a live producer has made it longer than the drain is."""
    order = make_order(order_name, batch_size=4, num_partitions=1, rank=0, world_size=1)
    buffer = RecordBuffer([Position("t", 0, 7, 0)], impressions_max=100)
    for kafka_offset in (7, 8, 9):
        error = RecordError("not_decodable", "made up")
        buffer.add(make_entry(error, partition=0, kafka_offset=kafka_offset, timestamp_ms=0))
    taken = Taken()
    assert order.take(buffer, taken, {0: 8})
    assert taken.num == 0
    assert taken.dead_letters == {"not_decodable": 3}
    assert buffer.positions() == (Position("t", 0, 10, 0),)
