"""A record comes back as it was sent, and every fault is found at its level."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.impression_pb2 import ImpressionBatch
from trainer.config import preset
from trainer.config.schema import SchemaConfig
from trainer.data.synthetic import SyntheticStream
from trainer.stream.record import (
    EVENT_TIME_MS_MAX,
    EventTimes,
    RecordError,
    decode_record,
    encode_record,
)
from trainer.stream.slicing import (
    concat_impressions,
    empty_impressions,
    slice_impressions,
)

PRODUCED_MS = 1_700_000_000_000
NUM = 6


def _equal(left, right) -> None:
    assert len(left) == len(right)
    for name in (
        "request_ids_N",
        "user_ids_N",
        "event_time_ms_N",
        "produced_ms_N",
        "domain_N",
        "labels_NT",
        "known_NT",
    ):
        found, expected = getattr(left, name), getattr(right, name)
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert left.sparse.keys() == right.sparse.keys()
    for name, jagged in left.sparse.items():
        assert (jagged.ids_L.dtype, jagged.lengths_N.dtype) == (np.int64, np.int32), name
        np.testing.assert_array_equal(jagged.ids_L, right.sparse[name].ids_L, err_msg=name)
        np.testing.assert_array_equal(jagged.lengths_N, right.sparse[name].lengths_N, err_msg=name)
    assert left.dense.keys() == right.dense.keys()
    for name, values_N in left.dense.items():
        np.testing.assert_array_equal(values_N, right.dense[name], err_msg=name)


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 70), first=st.integers(0, 10_000))
def test_a_record_round_trips(num, first, schema, make_impressions):
    sent = make_impressions(num, first=first, produced_ms=PRODUCED_MS)
    decoded = decode_record(encode_record(sent, schema), schema=schema, produced_ms=PRODUCED_MS)
    _equal(decoded.impressions, sent)
    assert decoded.num_impressions == num
    assert decoded.row_numbers_G.tolist() == list(range(num))
    assert decoded.bad_rows == {}


def test_the_synthetic_stream_round_trips():
    config = msgspec.structs.replace(preset("quickstart"), impressions=300)
    for impressions, _ in SyntheticStream(config).batches(64):
        decoded = decode_record(
            encode_record(impressions, config.schema), schema=config.schema, produced_ms=PRODUCED_MS
        )
        assert not decoded.bad_rows
        stamped = dataclasses.replace(
            impressions, produced_ms_N=np.full(len(impressions), PRODUCED_MS, np.int64)
        )
        _equal(decoded.impressions, stamped)


@pytest.mark.parametrize("num", [0, 65_537])
def test_encoding_refuses_what_no_record_may_hold(num, schema, make_impressions):
    with pytest.raises(ValueError, match=r"1\.\.65536"):
        encode_record(make_impressions(num), schema)


Change = Callable[[ImpressionBatch], None]


def _set(name: str, value: object) -> Change:
    return lambda batch: setattr(batch, name, value)


def _append_label(batch: ImpressionBatch) -> None:
    batch.labels.append(batch.labels[0])


STRUCTURAL: list[tuple[str, str, Change]] = [
    ("no_impressions", "found 0", _set("num_impressions", 0)),
    ("too_many_impressions", "found 70000", _set("num_impressions", 70_000)),
    ("unequal_columns", "request_ids", _set("request_ids", b"\0" * 8)),
    ("unequal_columns", "user_ids", _set("user_ids", b"\0" * (4 * NUM))),
    ("unequal_columns", "event_time_ms", _set("event_time_ms", b"")),
    ("unequal_columns", "domain_indices", _set("domain_indices", b"\0" * (NUM + 1))),
    ("unequal_columns", "ids of 'tags'", lambda b: setattr(b.sparse[1], "ids", b.sparse[1].ids[:-1])),
    (
        "unequal_columns",
        "ids of 'item_id'",
        lambda b: setattr(b.sparse[0], "ids", b.sparse[0].ids + b"\0" * 8),
    ),
    ("unequal_columns", "lengths of 'tags'", lambda b: setattr(b.sparse[1], "lengths", b"\0\0")),
    ("unequal_columns", "dense 'age_h'", lambda b: setattr(b.dense[0], "values", b"\0" * 4)),
    ("unequal_columns", "label 'click'", lambda b: setattr(b.labels[0], "values", b"\0")),
    ("unequal_columns", "known of 'click'", lambda b: setattr(b.labels[0], "known", b"\1")),
    ("missing_column:item_id", "'item_id'", lambda b: setattr(b.sparse[0], "name", "other")),
    ("missing_column:age_h", "'age_h'", lambda b: b.ClearField("dense")),
    ("duplicate_column", "'tags'", lambda b: setattr(b.sparse[0], "name", "tags")),
    ("duplicate_column", "'click'", _append_label),
]


@pytest.mark.parametrize(
    ("reason", "text", "change"), STRUCTURAL, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_fault_of_the_format_refuses_the_whole_record(reason, text, change, schema, make_impressions):
    batch = _batch(schema, make_impressions)
    change(batch)
    with pytest.raises(RecordError, match=text) as caught:
        decode_record(batch.SerializeToString(), schema=schema, produced_ms=PRODUCED_MS)
    assert caught.value.reason == reason
    lost_is_known = reason not in ("no_impressions", "too_many_impressions")
    assert caught.value.num_impressions == (NUM if lost_is_known else None)


@pytest.mark.parametrize(
    ("reason", "value"), [("empty_record", None), ("empty_record", b""), ("not_decodable", b"\xff\xff\xff")]
)
def test_bytes_that_are_no_record_are_refused(reason, value, schema):
    with pytest.raises(RecordError) as caught:
        decode_record(value, schema=schema, produced_ms=PRODUCED_MS)
    assert caught.value.reason == reason


def test_a_record_above_the_limit_is_refused_before_it_is_parsed(schema):
    with pytest.raises(RecordError, match="allows 100") as caught:
        decode_record(b"\xff" * 101, schema=schema, produced_ms=PRODUCED_MS, record_bytes_max=100)
    assert caught.value.reason == "record_too_large"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(data, schema, make_impressions):
    value = bytearray(encode_record(make_impressions(4), schema))
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    del value[data.draw(st.integers(1, len(value))) :]
    try:
        decoded = decode_record(bytes(value), schema=schema, produced_ms=PRODUCED_MS)
    except RecordError:
        return
    assert len(decoded.impressions) + len(decoded.bad_rows) == decoded.num_impressions


def _row_faults() -> list[tuple[str, Change]]:
    def times(value: int) -> Change:
        def change(batch: ImpressionBatch) -> None:
            times_N = np.frombuffer(batch.event_time_ms, "<i8").copy()
            times_N[2] = value
            batch.event_time_ms = times_N.tobytes()

        return change

    def patch(get: Callable[[ImpressionBatch], object], name: str, dtype: str, value: float) -> Change:
        def change(batch: ImpressionBatch) -> None:
            owner = get(batch)
            values_N = np.frombuffer(getattr(owner, name), dtype).copy()
            values_N[2] = value
            setattr(owner, name, values_N.tobytes())

        return change

    def lengths(index: int, value: int) -> Change:
        def change(batch: ImpressionBatch) -> None:
            column = batch.sparse[index]
            lengths_N = np.ones(NUM, "<u2")
            lengths_N[2] = value
            column.lengths = lengths_N.tobytes()
            column.ids = np.arange(lengths_N.sum(), dtype="<i8").tobytes()

        return change

    return [
        ("event_time_not_positive", times(0)),
        ("event_time_not_positive", times(-5)),
        ("event_time_future", times(PRODUCED_MS + EventTimes().future_ms_max + 1)),
        ("unknown_domain", patch(lambda b: b, "domain_indices", "u1", 7)),
        ("infinite_value:age_h", patch(lambda b: b.dense[0], "values", "<f4", np.inf)),
        ("label_not_binary:like", patch(lambda b: b.labels[1], "values", "u1", 2)),
        ("label_not_binary:click", patch(lambda b: b.labels[0], "known", "u1", 3)),
        ("not_one_id:item_id", lengths(0, 0)),
        ("not_one_id:item_id", lengths(0, 2)),
        ("too_many_ids:tags", lengths(1, 5)),
    ]


@pytest.mark.parametrize(("reason", "change"), _row_faults(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_row_is_refused_alone(reason, change, schema, make_impressions):
    batch = _batch(schema, make_impressions)
    change(batch)
    decoded = decode_record(batch.SerializeToString(), schema=schema, produced_ms=PRODUCED_MS)
    assert decoded.bad_rows == {2: reason}
    assert decoded.row_numbers_G.tolist() == [0, 1, 3, 4, 5]
    assert decoded.impressions.request_ids_N.tolist() == [0, 1, 3, 4, 5]
    for jagged in decoded.impressions.sparse.values():
        assert jagged.lengths_N.sum() == len(jagged.ids_L)


def test_event_times_are_held_against_the_records_timestamp(schema, make_impressions):
    """Exactly at a limit is within it; 0 lets the past be as old as it likes."""
    batch = _batch(schema, make_impressions)
    times_N = PRODUCED_MS + np.array([0, 5_000, 5_001, -7_000, -7_001, -PRODUCED_MS + 1], "<i8")
    batch.event_time_ms = times_N.tobytes()

    def reasons(**limits: int) -> dict[int, str]:
        return decode_record(
            batch.SerializeToString(),
            schema=schema,
            produced_ms=PRODUCED_MS,
            event_times=EventTimes(**limits),
        ).bad_rows

    assert reasons(future_ms_max=5_000) == {2: "event_time_future"}
    assert reasons(future_ms_max=5_000, past_ms_max=7_000) == {
        2: "event_time_future",
        4: "event_time_past",
        5: "event_time_past",
    }


def test_a_record_without_a_kafka_timestamp_is_refused(schema, make_impressions):
    value = encode_record(make_impressions(NUM), schema)
    with pytest.raises(RecordError, match="no Kafka timestamp") as caught:
        decode_record(value, schema=schema, produced_ms=-1)
    assert (caught.value.reason, caught.value.num_impressions) == ("no_timestamp", NUM)


@pytest.mark.parametrize("produced_ms", [EVENT_TIME_MS_MAX, 2**62])
def test_a_time_beyond_the_tables_clock_is_a_bad_row_whatever_the_record_says(
    produced_ms, schema, make_impressions
):
    """A producer in a wrong unit stamps record and rows alike; the table could not hold such a time."""
    batch = _batch(schema, make_impressions)
    times_N = np.frombuffer(batch.event_time_ms, "<i8").copy()
    times_N[1:3] = EVENT_TIME_MS_MAX, EVENT_TIME_MS_MAX + 1
    batch.event_time_ms = times_N.tobytes()
    decoded = decode_record(batch.SerializeToString(), schema=schema, produced_ms=produced_ms)
    assert decoded.bad_rows == {2: "event_time_future"}


def test_a_domain_of_a_newer_producer_costs_only_its_rows(schema, make_impressions):
    batch = _batch(schema, make_impressions)
    batch.domain_names[:] = ["slide", "moon", "home"]
    batch.domain_indices = bytes([0, 1, 2, 2, 1, 0])
    decoded = decode_record(batch.SerializeToString(), schema=schema, produced_ms=PRODUCED_MS)
    assert decoded.bad_rows == {1: "unknown_domain", 4: "unknown_domain"}
    assert decoded.impressions.domain_N.tolist() == [1, 0, 0, 1]


def test_unknown_columns_are_ignored_and_an_absent_label_is_unknown(schema, make_impressions):
    batch = _batch(schema, make_impressions)
    batch.sparse.add(name="of_tomorrow", ids=b"odd")
    batch.labels[1].task = "share"
    decoded = decode_record(batch.SerializeToString(), schema=schema, produced_ms=PRODUCED_MS)
    assert not decoded.bad_rows
    assert not decoded.impressions.known_NT[:, 1].any()
    assert decoded.impressions.known_NT[:, 0].any()


def test_nan_stays_unknown(schema, make_impressions):
    sent = make_impressions(NUM)
    sent.dense["age_h"][3] = np.nan
    decoded = decode_record(encode_record(sent, schema), schema=schema, produced_ms=PRODUCED_MS)
    assert np.flatnonzero(np.isnan(decoded.impressions.dense["age_h"])).tolist() == [3]


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=6))
def test_cutting_and_joining_gives_the_same_back(cuts, schema, make_impressions):
    whole = make_impressions(40)
    edges = [0, *sorted(cuts), 40]
    parts = [slice_impressions(whole, a, b) for a, b in itertools.pairwise(edges)]
    _equal(concat_impressions([empty_impressions(schema), *parts]), whole)


def _batch(schema: SchemaConfig, make_impressions) -> ImpressionBatch:
    """Sparse 0 is item_id, 1 is tags; labels 0 is click (with a known column), 1 is like (all known)."""
    impressions = make_impressions(NUM)
    impressions.known_NT[:] = [[True, True]] * NUM
    impressions.known_NT[0, 0] = False
    return ImpressionBatch.FromString(encode_record(impressions, schema))
