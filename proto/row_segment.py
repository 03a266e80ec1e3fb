"""The RowSegment: the only form in which embedding rows travel or rest.

N rows of dim D with their ids, optional columns beside them, and M deleted ids; on the wire a
safetensors blob whose metadata names format, table, dim and row format. An id is a 64-bit key
(feature class << 52 | raw id), one space a table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from proto.tensor_blob import BlobError, crc32c, decode_tensors, encode_tensors

RowFormat = Literal["float32", "float16", "int8"]
ROW_FORMATS: tuple[str, ...] = get_args(RowFormat)

FORMAT = "freshet.row_segment"
FORMAT_VERSION = "1"
DIM_MAX = 4096
INT8_ABS_MAX = 1e38
"""Largest magnitude that int8 rows may hold: their range must itself be a float32."""
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
_ROW_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("u1"),
}
_INT8_TAIL_BYTES = 8
"""Each int8 row ends with its float32 scale and bias: the fused row-wise layout of fbgemm."""


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


def encode(segment: RowSegment, *, row_format: RowFormat) -> bytes:
    """The segment as a blob; equal segments give equal bytes.

    Raises: BlobError if the segment breaks its own rules or a row does not fit `row_format`.
    """
    where = f"table '{segment.table}'"
    _check(segment, where=where)
    columns: dict[str, npt.NDArray[Any]] = {"rows": _pack_rows(segment.rows_ND, row_format, where=where)}
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
    Raises: BlobError on any difference from the format: header, lengths, dtypes, shapes, a doubled id,
        a row that is not finite.
    """
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
    packed = tensors.pop("rows")
    segment = RowSegment(
        table=metadata.get("table", ""),
        rows_ND=_unpack_rows(packed, row_format, dim=int(dim_text), where=where),
        **tensors,
    )
    _check(segment, where=where)
    return segment


def split(segment: RowSegment, *, bytes_max: int, row_format: RowFormat = "float32") -> list[RowSegment]:
    """Cut a segment into parts that encode to at most `bytes_max` bytes each, order kept.

    An empty segment is one part, so that a table without rows still names its dim.
    Raises: BlobError if not even one row fits.
    """
    id_bytes = 8
    row_bytes = id_bytes + _packed_width(segment.dim, row_format) * _ROW_DTYPES[row_format].itemsize
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
    parts = [_part(segment, start, start + rows_each) for start in range(0, len(segment), rows_each)]
    deleted_ids_M = segment.deleted_ids_M
    parts += [
        replace(_part(segment, 0, 0), deleted_ids_M=deleted_ids_M[start : start + deletes_each])
        for start in range(0, len(deleted_ids_M), deletes_each)
    ]
    return parts or [segment]


def _part(segment: RowSegment, start: int, end: int) -> RowSegment:
    columns: dict[str, Any] = {
        field.name: None if value is None else value[start:end]
        for field in fields(segment)
        if field.name not in ("table", "deleted_ids_M")
        for value in (getattr(segment, field.name),)
    }
    return RowSegment(table=segment.table, deleted_ids_M=segment.deleted_ids_M[:0], **columns)


def _check(segment: RowSegment, *, where: str) -> None:
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
    rows_ND = segment.rows_ND
    if rows_ND.dtype != np.float32 or rows_ND.ndim != 2 or len(rows_ND) != num:
        raise BlobError(
            f"{where}: rows: expected float32 of shape [{num}, dim], "
            f"found {rows_ND.dtype.name} of shape {list(rows_ND.shape)}"
        )
    if not 1 <= segment.dim <= DIM_MAX:
        raise BlobError(f"{where}: expected dim in 1..{DIM_MAX}, found {segment.dim}")
    _check_unique(segment, where=where)
    for name, values in (("rows", rows_ND), ("state_N", segment.state_N), ("scores_N", segment.scores_N)):
        if values is not None and not np.isfinite(values).all():
            first = int(np.argwhere(~np.isfinite(values))[0][0])
            raise BlobError(f"{where}: column '{name}' is not finite at id {int(segment.ids_N[first])}")


def _check_unique(segment: RowSegment, *, where: str) -> None:
    ids = np.sort(np.concatenate([segment.ids_N, segment.deleted_ids_M]))
    doubled = ids[1:][ids[1:] == ids[:-1]]
    if len(doubled):
        raise BlobError(f"{where}: id {int(doubled[0])} occurs more than once among rows and deletes")


def _packed_width(dim: int, row_format: str) -> int:
    return dim + _INT8_TAIL_BYTES if row_format == "int8" else dim


def _pack_rows(rows_ND: npt.NDArray[np.float32], row_format: str, *, where: str) -> npt.NDArray[Any]:
    if row_format == "float32":
        return rows_ND
    largest = float(np.abs(rows_ND).max(initial=0.0))
    limit = float(np.finfo(np.float16).max) if row_format == "float16" else INT8_ABS_MAX
    if largest > limit:
        raise BlobError(f"{where}: a row holds {largest:g}; {row_format} rows reach {limit:g}")
    if row_format == "float16":
        return rows_ND.astype(np.float16)
    if row_format != "int8":
        raise BlobError(f"{where}: expected a row_format of {list(ROW_FORMATS)}, found '{row_format}'")
    bias_N = rows_ND.min(axis=1)
    scale_N = (rows_ND.max(axis=1) - bias_N) / np.float32(255)
    # A row of one value, or of a range too small for float32, has scale 0: every code is then 0.
    divisor_N = np.where(scale_N > 0, scale_N, np.float32(1))
    codes_ND = np.rint((rows_ND - bias_N[:, None]) / divisor_N[:, None]).clip(0, 255)
    packed = np.empty((len(rows_ND), _packed_width(rows_ND.shape[1], row_format)), dtype=np.uint8)
    packed[:, :-_INT8_TAIL_BYTES] = codes_ND
    tail_N2 = np.stack([scale_N, bias_N], axis=1).astype("<f4")
    packed[:, -_INT8_TAIL_BYTES:] = tail_N2.view(np.uint8).reshape(-1, _INT8_TAIL_BYTES)
    return packed


def _unpack_rows(
    packed: npt.NDArray[Any], row_format: str, *, dim: int, where: str
) -> npt.NDArray[np.float32]:
    dtype, width = _ROW_DTYPES[row_format], _packed_width(dim, row_format)
    if packed.dtype != dtype or packed.ndim != 2 or packed.shape[1] != width:
        raise BlobError(
            f"{where}: {row_format} rows of dim {dim}: expected {dtype.name} of shape [N, {width}], "
            f"found {packed.dtype.name} of shape {list(packed.shape)}"
        )
    if row_format == "float32":
        return packed
    if row_format == "float16":
        return packed.astype(np.float32)
    tail_N2 = np.ascontiguousarray(packed[:, -_INT8_TAIL_BYTES:]).view("<f4")
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale: _check refuses what comes of it
        rows_ND = packed[:, :-_INT8_TAIL_BYTES].astype(np.float32)
        rows_ND *= tail_N2[:, :1]
        rows_ND += tail_N2[:, 1:]
    return rows_ND


__all__ = [
    "ROW_FORMATS",
    "BlobError",
    "RowFormat",
    "RowSegment",
    "crc32c",
    "decode",
    "encode",
    "split",
]
