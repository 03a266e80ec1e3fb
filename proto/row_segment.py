"""The RowSegment: the only form in which embedding rows travel or rest.

N rows of dim D with their ids, optional columns beside them, and M deleted ids; on the wire a
safetensors blob whose metadata names format, table, dim and row format. An id is a 64-bit key
(feature class << 52 | raw id), one space a table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from proto.row_formats import (
    ROW_DTYPES,
    ROW_FORMATS,
    RowFormat,
    not_finite,
    pack_rows,
    packed_row_bytes,
    packed_width,
    unpack_rows,
)
from proto.tensor_blob import BlobError, crc32c, decode_tensors, encode_tensors

FORMAT = "freshet.row_segment"
FORMAT_VERSION = "1"
DIM_MAX = 4096
CHUNK_BYTES_MAX = 4 << 20
"""A segment that travels is at most this long; `split` cuts to it."""
HEADER_BYTES_ESTIMATE = 1024

_TABLE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}", re.ASCII)
_COLUMN_DTYPES: dict[str, np.dtype[Any]] = {
    "ids_N": np.dtype("<i8"),
    "deleted_ids_M": np.dtype("<i8"),
    "state_N": np.dtype("<f4"),
    "scores_N": np.dtype("<f4"),
    "last_seen_s_N": np.dtype("<i8"),
    "updates_N": np.dtype("<u4"),
}


class NotFiniteError(BlobError):
    """Rows hold a NaN or an infinity; `num_rows` of them."""

    def __init__(self, message: str, *, num_rows: int) -> None:
        super().__init__(message)
        self.num_rows = num_rows


@dataclass(frozen=True, slots=True, eq=False)
class RowSegment:
    """Rows and deletes of one table; an id occurs once, in ids_N or in deleted_ids_M."""

    table: str
    ids_N: npt.NDArray[np.int64]
    rows_ND: npt.NDArray[np.float32]
    deleted_ids_M: npt.NDArray[np.int64]
    state_N: npt.NDArray[np.float32] | None = None
    """Row-wise optimizer state."""
    scores_N: npt.NDArray[np.float32] | None = None
    last_seen_s_N: npt.NDArray[np.int64] | None = None
    updates_N: npt.NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.ids_N)

    @property
    def dim(self) -> int:
        return int(self.rows_ND.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class PackedSegment:
    """A segment whose rows lie in their row format still: what a reader holds that keeps them so."""

    row_format: RowFormat
    dim: int
    rows_NW: npt.NDArray[Any]
    table: str
    ids_N: npt.NDArray[np.int64]
    deleted_ids_M: npt.NDArray[np.int64]
    state_N: npt.NDArray[np.float32] | None = None
    scores_N: npt.NDArray[np.float32] | None = None
    last_seen_s_N: npt.NDArray[np.int64] | None = None
    updates_N: npt.NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.ids_N)

    def unpacked(self) -> RowSegment:
        columns = {name: getattr(self, name) for name in _COLUMN_DTYPES}
        return RowSegment(table=self.table, rows_ND=unpack_rows(self.rows_NW, self.row_format), **columns)


def encode(segment: RowSegment, *, row_format: RowFormat) -> bytes:
    """The segment as a blob; equal segments give equal bytes.

    Raises: BlobError if the segment breaks its own rules or a row does not fit `row_format`.
    """
    where = f"table '{segment.table}'"
    _check(segment, where=where)
    columns: dict[str, npt.NDArray[Any]] = {"rows": pack_rows(segment.rows_ND, row_format, where=where)}
    for name in _COLUMN_DTYPES:
        column = getattr(segment, name)
        if column is not None:
            columns[name] = column
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "table": segment.table,
        "dim": str(segment.dim),
        "row_format": row_format,
    }
    return encode_tensors(columns, metadata=metadata)


def decode(blob: bytes | bytearray | memoryview, *, where: str) -> RowSegment:
    """Read a blob that may come from anyone; rows come back as float32.

    Args: where: the place that errors name, for example "version 1.42: blob 'rows-0'".
    Raises: BlobError on any difference from the format: header, lengths, dtypes, shapes, a doubled id;
        NotFiniteError for rows that are not finite.
    """
    return decode_packed(blob, where=where).unpacked()


def decode_packed(blob: bytes | bytearray | memoryview, *, where: str) -> PackedSegment:
    """Like `decode`, but rows stay as they came: views of the blob, without a copy."""
    tensors, metadata = decode_tensors(blob, where=where)
    found = (metadata.get("format"), metadata.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise BlobError(f"{where}: expected {FORMAT} version {FORMAT_VERSION}, found {found[0]} {found[1]}")
    row_format = metadata.get("row_format", "")
    dim_text = metadata.get("dim", "")
    if row_format not in ROW_FORMATS:
        raise BlobError(f"{where}: expected a row_format of {list(ROW_FORMATS)}, found '{row_format}'")
    if not (dim_text.isascii() and dim_text.isdigit() and len(dim_text) < 6):
        raise BlobError(f"{where}: expected dim in 1..{DIM_MAX}, found '{dim_text[:20]}'")
    unknown = sorted(set(tensors) - set(_COLUMN_DTYPES) - {"rows"})
    if unknown:
        raise BlobError(f"{where}: unknown columns {unknown[:5]}")
    for name in ("rows", "ids_N", "deleted_ids_M"):
        if name not in tensors:
            raise BlobError(f"{where}: column '{name}' is missing")
    segment = PackedSegment(
        row_format=cast(RowFormat, row_format),
        dim=int(dim_text),
        rows_NW=tensors.pop("rows"),
        table=metadata.get("table", ""),
        **tensors,
    )
    _check_columns(segment, where=where)
    _check_packed(segment, where=where)
    return segment


def finite_rows(segment: RowSegment) -> tuple[RowSegment, npt.NDArray[np.int64]]:
    """The segment without the rows that are not finite, and the ids of those: what a writer counts.

    A row counts as not finite if its optimizer state or score is not, too.
    """
    good_N = ~not_finite(segment.rows_ND, "float32")
    for column in (segment.state_N, segment.scores_N):
        if column is not None:
            good_N &= np.isfinite(column)
    if good_N.all():
        return segment, segment.ids_N[:0]
    kept = _pick(segment, good_N)
    return replace(kept, deleted_ids_M=segment.deleted_ids_M), segment.ids_N[~good_N]


def split(
    segment: RowSegment, *, bytes_max: int = CHUNK_BYTES_MAX, row_format: RowFormat = "float32"
) -> list[RowSegment]:
    """Cut a segment into parts that encode to at most `bytes_max` bytes each, order kept.

    An empty segment is one part, so that a table without rows still names its dim.
    Raises: BlobError if not even one row fits.
    """
    id_bytes = 8
    row_bytes = id_bytes + packed_row_bytes(segment.dim, row_format)
    for name in ("state_N", "scores_N", "last_seen_s_N", "updates_N"):
        if getattr(segment, name) is not None:
            row_bytes += _COLUMN_DTYPES[name].itemsize
    room = bytes_max - HEADER_BYTES_ESTIMATE
    if room < row_bytes:
        raise BlobError(
            f"table '{segment.table}': a row takes {row_bytes} bytes beside the header's "
            f"{HEADER_BYTES_ESTIMATE}, bytes_max is {bytes_max}"
        )
    rows_each, deletes_each = room // row_bytes, room // id_bytes
    parts = [_pick(segment, slice(start, start + rows_each)) for start in range(0, len(segment), rows_each)]
    deleted_ids_M = segment.deleted_ids_M
    parts += [
        replace(_pick(segment, slice(0, 0)), deleted_ids_M=deleted_ids_M[start : start + deletes_each])
        for start in range(0, len(deleted_ids_M), deletes_each)
    ]
    return parts or [segment]


def _pick(segment: RowSegment, rows: slice | npt.NDArray[np.bool_]) -> RowSegment:
    """Some of the rows, without the deletes."""
    columns: dict[str, Any] = {
        field.name: None if value is None else value[rows]
        for field in fields(segment)
        if field.name not in ("table", "deleted_ids_M")
        for value in (getattr(segment, field.name),)
    }
    return RowSegment(table=segment.table, deleted_ids_M=segment.deleted_ids_M[:0], **columns)


def _check(segment: RowSegment, *, where: str) -> None:
    num = _check_columns(segment, where=where)
    rows_ND = segment.rows_ND
    if rows_ND.dtype != np.float32 or rows_ND.ndim != 2 or len(rows_ND) != num:
        raise BlobError(
            f"{where}: rows: expected float32 of shape [{num}, dim], "
            f"found {rows_ND.dtype.name} of shape {list(rows_ND.shape)}"
        )
    if not 1 <= segment.dim <= DIM_MAX:
        raise BlobError(f"{where}: expected dim in 1..{DIM_MAX}, found {segment.dim}")
    _check_finite(segment.ids_N, not_finite(rows_ND, "float32"), name="rows", where=where)


def _check_packed(segment: PackedSegment, *, where: str) -> None:
    if not 1 <= segment.dim <= DIM_MAX:
        raise BlobError(f"{where}: expected dim in 1..{DIM_MAX}, found {segment.dim}")
    packed, row_format = segment.rows_NW, segment.row_format
    dtype, expected = ROW_DTYPES[row_format], (len(segment), packed_width(segment.dim, row_format))
    if packed.dtype != dtype or packed.shape != expected:
        raise BlobError(
            f"{where}: {row_format} rows of dim {segment.dim}: expected {dtype.name} of shape "
            f"{list(expected)}, found {packed.dtype.name} of shape {list(packed.shape)}"
        )
    _check_finite(segment.ids_N, not_finite(packed, row_format), name="rows", where=where)


def _check_columns(segment: RowSegment | PackedSegment, *, where: str) -> int:
    """All but the rows themselves; returns N."""
    if not _TABLE_NAME.fullmatch(segment.table):
        raise BlobError(f"{where}: a table name is 1..128 of A-Z a-z 0-9 _ . -, found '{segment.table[:40]}'")
    num = segment.ids_N.shape[0] if segment.ids_N.ndim == 1 else -1
    for name, dtype in _COLUMN_DTYPES.items():
        column = getattr(segment, name)
        if column is None:
            continue
        expected = column.shape[:1] if name == "deleted_ids_M" else (num,)
        if column.dtype != dtype or column.ndim != 1 or column.shape != expected:
            raise BlobError(
                f"{where}: column '{name}': expected {dtype.name} of shape {list(expected)}, "
                f"found {column.dtype.name} of shape {list(column.shape)}"
            )
    _check_unique(segment, where=where)
    for name, values_N in (("state_N", segment.state_N), ("scores_N", segment.scores_N)):
        if values_N is not None:
            _check_finite(segment.ids_N, ~np.isfinite(values_N), name=name, where=where)
    return num


def _check_finite(
    ids_N: npt.NDArray[np.int64], bad_N: npt.NDArray[np.bool_], *, name: str, where: str
) -> None:
    num_bad = int(np.count_nonzero(bad_N))
    if num_bad:
        raise NotFiniteError(
            f"{where}: column '{name}' is not finite at id {int(ids_N[int(bad_N.argmax())])}; "
            f"{num_bad} of {len(ids_N)} rows are not",
            num_rows=num_bad,
        )


def _check_unique(segment: RowSegment | PackedSegment, *, where: str) -> None:
    ids = np.sort(np.concatenate([segment.ids_N, segment.deleted_ids_M]))
    doubled = ids[1:][ids[1:] == ids[:-1]]
    if len(doubled):
        raise BlobError(f"{where}: id {int(doubled[0])} occurs more than once among rows and deletes")


__all__ = [
    "CHUNK_BYTES_MAX",
    "ROW_FORMATS",
    "BlobError",
    "NotFiniteError",
    "PackedSegment",
    "RowFormat",
    "RowSegment",
    "crc32c",
    "decode",
    "decode_packed",
    "encode",
    "finite_rows",
    "split",
]
