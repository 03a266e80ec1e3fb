"""One Kafka record ↔ impressions in columns (proto/impression.proto), with its faults by row.

Shapes: N impressions of the record, G good ones of them, T tasks.

Two levels of fault. A record that does not follow the format is bad as a whole (RecordError): no row
of it can be trusted. A row with an impossible value is bad alone; the other rows are trained. Unknown
extra columns are ignored, so that producers may run ahead of the trainer. An absent label column
means that these labels are not known; an absent feature column is a fault of the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from proto.impression_pb2 import DenseColumn, ImpressionBatch, LabelColumn, SparseColumn
from trainer.config.schema import BUILT_IN, DOMAIN_SOURCE, USER_ID_SOURCE, FeatureConfig, SchemaConfig
from trainer.errors import StreamError
from trainer.stream.columns import Impressions, Jagged
from trainer.stream.encodable import check_encodable
from trainer.stream.slicing import select_impressions

RECORD_IMPRESSIONS_MAX = 65_536
"""More in one record is refused, whatever kafka.record_bytes_max allows."""
EVENT_TIME_MS_MAX = (2**32 - 1) * 1000
"""The id tables keep unsigned 32-bit seconds; a later time would make them refuse the clock."""
UNKNOWN_DOMAIN = 255

Column = TypeVar("Column")


class RecordError(StreamError):
    """A whole record is refused.

    reason: one word for counters; num_impressions: how many are lost with it, None where the record does not
    tell.
    """

    def __init__(self, reason: str, text: str, *, num_impressions: int | None = None) -> None:
        super().__init__(text)
        self.reason = reason
        self.num_impressions = num_impressions


@dataclass(frozen=True, slots=True)
class EventTimes:
    """How far an event time may be from its record's Kafka timestamp.

    Compared with the record instead of a clock, so that a replay decodes as the first reading did.
    """

    future_ms_max: int = 3_600_000
    """One later event would move the clock of the id tables, and with it every lifetime."""
    past_ms_max: int = 0
    """0 = as old as it likes: a stream that replays history is legal."""


@dataclass(frozen=True, slots=True)
class DecodedRecord:
    """The good impressions of a record and the reasons why the others are not."""

    impressions: Impressions
    row_numbers_G: npt.NDArray[np.int32]
    """Row of each good impression in the record, ascending."""
    num_impressions: int
    """Of the whole record, bad ones included."""
    bad_rows: dict[int, str]
    """Row → reason, ascending by row."""


def encode_record(impressions: Impressions, schema: SchemaConfig) -> bytes:
    """One record of all the impressions.

    Raises: ValueError if there are none, too many, or an id list is longer than 65535; or as check_encodable
        does.
    """
    num = len(impressions)
    if not 1 <= num <= RECORD_IMPRESSIONS_MAX:
        raise ValueError(f"a record holds 1..{RECORD_IMPRESSIONS_MAX} impressions, found {num}")
    check_encodable(impressions, schema)
    batch = ImpressionBatch(
        num_impressions=num,
        request_ids=impressions.request_ids_N.astype("<u8", copy=False).tobytes(),
        user_ids=impressions.user_ids_N.astype("<i8", copy=False).tobytes(),
        event_time_ms=impressions.event_time_ms_N.astype("<i8", copy=False).tobytes(),
        domain_names=schema.domains,
        domain_indices=impressions.domain_N.astype("u1", copy=False).tobytes(),
    )
    for feature in schema.features:
        if feature.kind == "dense":
            values_N = impressions.dense[feature.name].astype("<f4", copy=False)
            batch.dense.append(DenseColumn(name=feature.name, values=values_N.tobytes()))
        elif feature.name not in BUILT_IN:
            batch.sparse.append(_encode_jagged(feature.name, impressions.sparse[feature.name]))
    for index, task in enumerate(schema.task_names):
        known_N = impressions.known_NT[:, index]
        labels_N = np.where(known_N, impressions.labels_NT[:, index], 0).astype(np.uint8)
        known = b"" if known_N.all() else known_N.astype(np.uint8).tobytes()
        batch.labels.append(LabelColumn(task=task, values=labels_N.tobytes(), known=known))
    return batch.SerializeToString()


def _encode_jagged(name: str, jagged: Jagged) -> SparseColumn:
    longest = int(jagged.lengths_N.max(initial=0))
    if longest > 65_535:
        raise ValueError(
            f"feature '{name}': an id list of {longest}; a record holds at most 65535 ids a list"
        )
    all_ones = bool((jagged.lengths_N == 1).all())
    return SparseColumn(
        name=name,
        lengths=b"" if all_ones else jagged.lengths_N.astype("<u2").tobytes(),
        ids=jagged.ids_L.astype("<i8", copy=False).tobytes(),
    )


def decode_record(
    value: bytes | None,
    *,
    schema: SchemaConfig,
    produced_ms: int,
    record_bytes_max: int = 1 << 20,
    event_times: EventTimes = EventTimes(),
) -> DecodedRecord:
    """Take a record apart; array work only, and a pure function of its arguments.

    Args: produced_ms: the record's Kafka timestamp, unix milliseconds.
    Raises: RecordError with the reason, if the record as a whole does not follow the format.
    """
    batch = _parse(value, record_bytes_max)
    num = batch.num_impressions
    if not 1 <= num <= RECORD_IMPRESSIONS_MAX:
        reason = "no_impressions" if num == 0 else "too_many_impressions"
        raise RecordError(reason, f"a record holds 1..{RECORD_IMPRESSIONS_MAX} impressions, found {num}")
    try:
        if produced_ms < 0:
            raise RecordError("no_timestamp", "the record has no Kafka timestamp to hold event times against")
        impressions, bad = _columns(batch, schema, produced_ms, event_times)
    except RecordError as error:
        raise RecordError(error.reason, str(error), num_impressions=num) from None
    bad_rows = bad.by_row()
    good_N = np.ones(num, np.bool_)
    good_N[list(bad_rows)] = False
    return DecodedRecord(
        impressions=select_impressions(impressions, good_N),
        row_numbers_G=np.flatnonzero(good_N).astype(np.int32),
        num_impressions=num,
        bad_rows=bad_rows,
    )


class _BadRows:
    """Collects the first reason of each bad row."""

    def __init__(self, num: int) -> None:
        self._reason_N = np.zeros(num, np.uint16)
        self._reasons: list[str] = [""]

    def mark(self, bad_N: npt.NDArray[np.bool_], reason: str) -> None:
        if bad_N.any():
            self._reasons.append(reason)
            self._reason_N[bad_N & (self._reason_N == 0)] = len(self._reasons) - 1

    def by_row(self) -> dict[int, str]:
        return {int(row): self._reasons[self._reason_N[row]] for row in np.flatnonzero(self._reason_N)}


def _parse(value: bytes | None, record_bytes_max: int) -> ImpressionBatch:
    if not value:
        raise RecordError("empty_record", "the record has no value; expected an ImpressionBatch")
    if len(value) > record_bytes_max:
        raise RecordError(
            "record_too_large",
            f"the record has {len(value)} bytes; kafka.record_bytes_max allows {record_bytes_max}",
        )
    try:
        return ImpressionBatch.FromString(value)
    except DecodeError as error:
        raise RecordError("not_decodable", f"not an ImpressionBatch: {error}") from error


def _columns(
    batch: ImpressionBatch, schema: SchemaConfig, produced_ms: int, event_times: EventTimes
) -> tuple[Impressions, _BadRows]:
    """Every column of the schema, and the rows that cannot be used."""
    num = batch.num_impressions
    bad = _BadRows(num)
    domain_N = _domains(batch, schema, bad)
    event_time_ms_N = _fixed("event_time_ms", batch.event_time_ms, "<i8", num).astype(np.int64)
    bad.mark(event_time_ms_N <= 0, "event_time_not_positive")
    newest_ms = min(produced_ms + event_times.future_ms_max, EVENT_TIME_MS_MAX)
    bad.mark(event_time_ms_N > newest_ms, "event_time_future")
    if event_times.past_ms_max:
        bad.mark(event_time_ms_N < produced_ms - event_times.past_ms_max, "event_time_past")
    user_ids_N = _fixed("user_ids", batch.user_ids, "<i8", num).astype(np.int64)

    sparse_columns = _by_name("sparse", ((column.name, column) for column in batch.sparse))
    dense_columns = _by_name("dense", ((column.name, column) for column in batch.dense))
    ones_N = np.ones(num, np.int32)
    sparse: dict[str, Jagged] = {}
    dense: dict[str, npt.NDArray[np.float32]] = {}
    for feature in schema.features:
        name = feature.name
        if name == USER_ID_SOURCE:
            sparse[name] = Jagged(user_ids_N, ones_N)
        elif name == DOMAIN_SOURCE:
            sparse[name] = Jagged(domain_N.astype(np.int64), ones_N)
        elif feature.kind == "dense":
            _require(name, dense_columns, "dense")
            values_N = _fixed(f"dense '{name}'", dense_columns[name].values, "<f4", num).astype(np.float32)
            bad.mark(np.isinf(values_N), f"infinite_value:{name}")
            dense[name] = values_N
        else:
            _require(name, sparse_columns, "sparse")
            sparse[name] = _jagged(feature, sparse_columns[name], num, bad)
    labels_NT, known_NT = _labels(batch, schema, bad)
    impressions = Impressions(
        request_ids_N=_fixed("request_ids", batch.request_ids, "<u8", num).astype(np.uint64),
        user_ids_N=user_ids_N,
        event_time_ms_N=event_time_ms_N,
        produced_ms_N=np.full(num, produced_ms, np.int64),
        domain_N=domain_N,
        sparse=sparse,
        dense=dense,
        labels_NT=labels_NT,
        known_NT=known_NT,
    )
    return impressions, bad


def _fixed(what: str, data: bytes, dtype: str, num: int) -> npt.NDArray[np.generic]:
    """A view of `num` fixed-width values; RecordError names the column otherwise."""
    width = np.dtype(dtype).itemsize
    if len(data) != num * width:
        raise RecordError(
            "unequal_columns",
            f"column {what}: expected {num} values of {width} bytes, found {len(data)} bytes",
        )
    return np.frombuffer(data, dtype)


def _by_name(what: str, columns: Iterable[tuple[str, Column]]) -> dict[str, Column]:
    """Columns by name; a repeated name would leave open which one counts."""
    found: dict[str, Column] = {}
    for name, column in columns:
        if name in found:
            raise RecordError("duplicate_column", f"{what} column '{name}' is there twice")
        found[name] = column
    return found


def _require(name: str, columns: Mapping[str, object], what: str) -> None:
    if name not in columns:
        there = ", ".join(sorted(columns)) or "none"
        raise RecordError(
            f"missing_column:{name}", f"{what} column '{name}' is missing; the record has: {there}"
        )


def _domains(batch: ImpressionBatch, schema: SchemaConfig, bad: _BadRows) -> npt.NDArray[np.uint8]:
    """The schema's index of each row's domain, through the record's own dictionary."""
    num = batch.num_impressions
    indices_N = _fixed("domain_indices", batch.domain_indices, "u1", num)
    # 256 entries: every possible index has one, those beyond the record's dictionary stay unknown.
    schema_index = np.full(256, UNKNOWN_DOMAIN, np.uint8)
    position = {name: index for index, name in enumerate(schema.domains)}
    for index, name in enumerate(batch.domain_names[:256]):
        schema_index[index] = position.get(name, UNKNOWN_DOMAIN)
    domain_N: npt.NDArray[np.uint8] = schema_index[indices_N]
    bad.mark(domain_N == UNKNOWN_DOMAIN, "unknown_domain")
    return domain_N


def _jagged(feature: FeatureConfig, column: SparseColumn, num: int, bad: _BadRows) -> Jagged:
    name = feature.name
    if column.lengths:
        lengths_N = _fixed(f"lengths of '{name}'", column.lengths, "<u2", num).astype(np.int32)
    else:
        lengths_N = np.ones(num, np.int32)
    num_ids = int(lengths_N.sum(dtype=np.int64))
    ids_L = _fixed(f"ids of '{name}'", column.ids, "<i8", num_ids).astype(np.int64)
    if feature.kind == "single":
        bad.mark(lengths_N != 1, f"not_one_id:{name}")
    else:
        bad.mark(lengths_N > feature.ids_max, f"too_many_ids:{name}")
    return Jagged(ids_L, lengths_N)


def _labels(
    batch: ImpressionBatch, schema: SchemaConfig, bad: _BadRows
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    num = batch.num_impressions
    columns = _by_name("label", ((column.task, column) for column in batch.labels))
    labels_NT = np.zeros((num, len(schema.tasks)), np.float32)
    known_NT = np.zeros((num, len(schema.tasks)), np.bool_)
    for index, task in enumerate(schema.task_names):
        if task not in columns:
            continue
        values_N = _fixed(f"label '{task}'", columns[task].values, "u1", num).astype(np.uint8)
        known_N = np.ones(num, np.uint8)
        if columns[task].known:
            known_N = _fixed(f"known of '{task}'", columns[task].known, "u1", num).astype(np.uint8)
        bad.mark((values_N > 1) | (known_N > 1), f"label_not_binary:{task}")
        known_NT[:, index] = known_N > 0
        labels_NT[:, index] = np.where(known_N > 0, values_N, 0)
    return labels_NT, known_NT
