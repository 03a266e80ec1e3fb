"""How a row's D numbers lie in bytes: float32, float16, or fused int8; packing, unpacking, gathering.

An int8 row is D codes of one byte and then its float32 scale and bias (value = code * scale + bias): the
fused row-wise layout of fbgemm. Shapes: N rows, D numbers a row, W columns of a packed row.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from proto.tensor_blob import BlobError

RowFormat = Literal["float32", "float16", "int8"]
ROW_FORMATS: tuple[str, ...] = get_args(RowFormat)

INT8_ABS_MAX = 1e38
"""Largest magnitude that int8 rows may hold: their range must itself be a float32."""
INT8_TAIL_BYTES = 8

ROW_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("u1"),
}

Floats = npt.NDArray[np.float32]
Packed = npt.NDArray[Any]


def packed_width(dim: int, row_format: str) -> int:
    """W: columns of a packed row, of the format's dtype."""
    return dim + INT8_TAIL_BYTES if row_format == "int8" else dim


def packed_row_bytes(dim: int, row_format: str) -> int:
    return packed_width(dim, row_format) * ROW_DTYPES[row_format].itemsize


def pack_rows(rows_ND: Floats, row_format: str, *, where: str) -> Packed:
    """Rows in a format, [N, W]; float32 rows are handed back as they are.

    Raises: BlobError if a number is beyond the format's range, or the format is unknown.
    """
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
    packed = np.empty((len(rows_ND), packed_width(rows_ND.shape[1], row_format)), dtype=np.uint8)
    packed[:, :-INT8_TAIL_BYTES] = codes_ND
    tail_N2 = np.stack([scale_N, bias_N], axis=1).astype("<f4")
    packed[:, -INT8_TAIL_BYTES:] = tail_N2.view(np.uint8).reshape(-1, INT8_TAIL_BYTES)
    return packed


def unpack_rows(packed_NW: Packed, row_format: str) -> Floats:
    """Rows as float32 [N, D]; float32 rows are handed back as they are."""
    if row_format == "float32":
        return packed_NW
    if row_format == "float16":
        return packed_NW.astype(np.float32)
    tail_N2 = _tail(packed_NW)
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale: not_finite tells
        rows_ND = packed_NW[:, :-INT8_TAIL_BYTES].astype(np.float32)
        rows_ND *= tail_N2[:, :1]
        rows_ND += tail_N2[:, 1:]
    return rows_ND


def not_finite(packed_NW: Packed, row_format: str) -> npt.NDArray[np.bool_]:
    """Which rows hold a NaN or an infinity, [N]; an int8 row whose range is not finite counts, too.

    Nothing is unpacked: code * scale + bias grows or falls with the code, so both ends bound a row.
    """
    if row_format != "int8":
        return np.asarray(~np.isfinite(packed_NW).all(axis=1))
    scale_N, bias_N = _tail(packed_NW).T
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(~(np.isfinite(bias_N) & np.isfinite(scale_N * np.float32(255) + bias_N)))


def _tail(packed_NW: Packed) -> Floats:
    """Scale and bias of int8 rows, float32 [N, 2]."""
    tail_N2: Floats = np.ascontiguousarray(packed_NW[:, -INT8_TAIL_BYTES:]).view("<f4")
    return tail_N2
