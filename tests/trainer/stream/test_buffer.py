"""The order of the stream depends on the log alone, and positions follow what was taken."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.stream.buffer import RecordBuffer, make_entry
from trainer.stream.columns import Position
from trainer.stream.record import RecordError, decode_record, encode_record

ROWS = 3


def _entry(partition, kafka_offset, timestamp_ms, schema, make_impressions, **arguments):
    value = encode_record(make_impressions(ROWS, first=timestamp_ms * ROWS), schema)
    record = decode_record(value, schema=schema, produced_ms=1_700_000_000_000)
    return make_entry(
        record, partition=partition, kafka_offset=kafka_offset, timestamp_ms=timestamp_ms, **arguments
    )


def _buffer(num_partitions: int, impressions_max: int = 1_000) -> RecordBuffer:
    return RecordBuffer(
        [Position("t", p, 0, 0) for p in range(num_partitions)], impressions_max=impressions_max
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_order_does_not_depend_on_when_records_arrive(data, schema, make_impressions):
    """Record n is in partition n % 3 with timestamp n; arrivals and takes come in any order."""
    num = 12
    buffer = _buffer(3)
    for partition in range(3):
        buffer.set_end(partition, num // 3)
    arrived = [0, 0, 0]
    taken: list[int] = []
    while len(taken) < num * ROWS:
        waiting = [p for p in range(3) if arrived[p] < num // 3]
        if waiting and (buffer.missing() or data.draw(st.booleans())):
            partition = data.draw(st.sampled_from(waiting))
            number = arrived[partition] * 3 + partition
            buffer.add(_entry(partition, arrived[partition], number, schema, make_impressions))
            arrived[partition] += 1
        elif not buffer.missing():
            got = buffer.take(data.draw(st.integers(1, 4)), dead_letters={})
            assert got is not None
            assert got[0] is not None
            taken += got[0].request_ids_N.tolist()
            assert sum(p.kafka_offset * ROWS + p.row for p in buffer.positions()) == len(taken)
    assert taken == list(range(num * ROWS))


def test_a_partition_known_to_have_more_is_missed_until_it_delivers(schema, make_impressions):
    buffer = _buffer(2)
    buffer.set_end(1, 1)
    buffer.add(_entry(0, 0, 5, schema, make_impressions))
    assert buffer.missing() == {1}
    buffer.add(_entry(1, 0, 4, schema, make_impressions))
    assert buffer.missing() == set()
    taken = buffer.take(9, dead_letters={})
    assert taken is not None
    assert taken[1].partition == 1


def test_offsets_without_records_are_passed(schema, make_impressions):
    buffer = _buffer(1)
    buffer.set_end(0, 7)
    buffer.add(_entry(0, 2, 1, schema, make_impressions))
    buffer.advance(0, 7)
    assert buffer.positions() == (Position("t", 0, 0, 0),), "a record that waits was passed"
    buffer.take(ROWS, dead_letters={})
    assert buffer.positions() == (Position("t", 0, 7, 0),)
    assert buffer.lag_impressions() == 0


def test_room_ends_at_the_partitions_share(schema, make_impressions):
    buffer = _buffer(2, impressions_max=2 * ROWS)
    assert buffer.has_room(0)
    buffer.add(_entry(0, 0, 1, schema, make_impressions))
    assert not buffer.has_room(0)
    assert buffer.has_room(1)
    assert buffer.num_buffered == ROWS
    buffer.take(1, dead_letters={})
    assert buffer.has_room(0)


def test_a_refused_record_is_counted_when_it_is_passed_with_all_it_held():
    buffer = _buffer(1)
    error = RecordError("missing_column", "why", num_impressions=64)
    buffer.add(make_entry(error, partition=0, kafka_offset=0, timestamp_ms=1))
    assert buffer.positions() == (Position("t", 0, 0, 0),)
    dead: dict[str, int] = {}
    taken = buffer.take(5, dead_letters=dead)
    assert taken is not None
    assert taken[0] is None
    assert dead == {"missing_column": 64}
    assert buffer.positions() == (Position("t", 0, 1, 0),)
    assert buffer.take(5, dead_letters=dead) is None
