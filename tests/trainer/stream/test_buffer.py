"""Positions follow what was taken, and room is bounded. What is taken when: test_order.py."""

from __future__ import annotations

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


def test_offsets_without_records_are_passed(schema, make_impressions):
    buffer = _buffer(1)
    buffer.set_end(0, 7)
    buffer.add(_entry(0, 2, 1, schema, make_impressions))
    buffer.advance(0, 7)
    assert buffer.positions() == (Position("t", 0, 0, 0),), "a record that waits was passed"
    buffer.take(0, ROWS, dead_letters={})
    assert buffer.positions() == (Position("t", 0, 7, 0),)
    assert buffer.lag_impressions() == 0


def test_room_ends_at_the_partitions_share(schema, make_impressions):
    buffer = _buffer(2, impressions_max=2 * ROWS)
    assert buffer.has_room(0)
    buffer.add(_entry(0, 0, 1, schema, make_impressions))
    assert not buffer.has_room(0)
    assert buffer.has_room(1)
    assert buffer.num_buffered == ROWS
    buffer.take(0, 1, dead_letters={})
    assert buffer.has_room(0)


def test_a_refused_record_is_counted_when_it_is_passed_with_all_it_held():
    buffer = _buffer(1)
    error = RecordError("missing_column", "why", num_impressions=64)
    buffer.add(make_entry(error, partition=0, kafka_offset=0, timestamp_ms=1))
    assert buffer.positions() == (Position("t", 0, 0, 0),)
    dead: dict[str, int] = {}
    assert buffer.has_record(0, None)
    assert buffer.take(0, 5, dead_letters=dead) is None
    assert dead == {"missing_column": 64}
    assert buffer.positions() == (Position("t", 0, 1, 0),)
    assert not buffer.has_record(0, None)


def test_what_lies_beyond_an_end_does_not_count_and_is_nobodys_turn(schema, make_impressions):
    buffer = _buffer(1)
    for kafka_offset in range(3):
        buffer.add(_entry(0, kafka_offset, kafka_offset, schema, make_impressions))
    assert [buffer.num_before(0, end) for end in (0, 1, 2, 3, None)] == [
        0,
        ROWS,
        2 * ROWS,
        3 * ROWS,
        3 * ROWS,
    ]
    buffer.take(0, ROWS, dead_letters={})
    assert not buffer.has_record(0, 1)
    assert buffer.has_record(0, 2)
    assert buffer.oldest({0: 1}) is None
    assert buffer.oldest({0: 2}) == 0
    assert buffer.has_fetched(0, 3)
    assert not buffer.has_fetched(0, 4)


def test_bad_rows_of_mixed_records_take_room_and_give_it_back(schema, make_impressions):
    impressions = make_impressions(20)
    impressions.event_time_ms_N[1:19] = -1
    record = decode_record(encode_record(impressions, schema), schema=schema, produced_ms=1_700_000_000_000)
    buffer = _buffer(1, impressions_max=10)
    buffer.add(make_entry(record, partition=0, kafka_offset=0, timestamp_ms=0))
    assert buffer.num_buffered == 2
    assert not buffer.has_room(0)
    dead: dict[str, int] = {}
    buffer.take(0, 1, dead_letters=dead)
    assert dead == {"event_time_not_positive": 18}
    assert buffer.has_room(0)
