"""Named arrays in one blob: the safetensors format, read as if an enemy had written it.

Layout (https://github.com/huggingface/safetensors): uint64 header length, JSON header, data. Our own
reader, since ours hands out views without a copy, bounds every size before it allocates and names the
place in its errors; our own writer, since equal input must give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import crc32c as crc32c_package
import msgspec
import numpy as np
import numpy.typing as npt

HEADER_BYTES_MAX = 1 << 20
NUM_TENSORS_MAX = 4096
NUM_DIMS_MAX = 8

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class BlobError(ValueError):
    """A blob is not what its format says; the message names the place, what was expected and found."""


class _TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_HEADER_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_INFO_DECODER = msgspec.json.Decoder(_TensorInfo)
_METADATA_DECODER = msgspec.json.Decoder(dict[str, str])


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC32C (Castagnoli) of the bytes, 0 .. 2^32-1."""
    return int(crc32c_package.crc32c(data))


def encode_tensors(tensors: Mapping[str, npt.NDArray[Any]], *, metadata: Mapping[str, str]) -> bytes:
    """A safetensors blob; equal arguments give equal bytes.

    Args: tensors: arrays of a dtype in DTYPES, written widest dtype first so that each stays aligned.
    Raises: BlobError if a dtype is not in DTYPES or the header grows past HEADER_BYTES_MAX.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    pieces: list[bytes] = []
    end = 0
    for name, array in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        little = array.dtype.newbyteorder("<") if array.dtype.itemsize > 1 else array.dtype
        if little not in DTYPE_NAMES:
            raise BlobError(f"tensor '{name}': expected a dtype of {sorted(DTYPES)}, found {array.dtype}")
        pieces.append(np.ascontiguousarray(array, dtype=little).tobytes())
        start, end = end, end + len(pieces[-1])
        header[name] = {
            "dtype": DTYPE_NAMES[little],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_BYTES_MAX:
        raise BlobError(f"the header takes {len(text)} bytes, at most {HEADER_BYTES_MAX} are allowed")
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def decode_tensors(
    blob: bytes | bytearray | memoryview, *, where: str
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """The arrays, as read-only views of `blob`, and the metadata.

    Args: where: the place that errors name.
    Raises: BlobError if anything differs from the format: lengths, dtypes, shapes, holes or overlaps.
    """
    view = memoryview(blob).toreadonly()
    header = _header(view, where=where)
    raw_metadata = header.pop("__metadata__", None)
    try:
        metadata = _METADATA_DECODER.decode(raw_metadata) if raw_metadata is not None else {}
        infos = {name: _INFO_DECODER.decode(raw) for name, raw in header.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BlobError(f"{where}: safetensors header: {error}") from error
    data = view[8 + int.from_bytes(view[:8], "little") :]
    tensors: dict[str, npt.NDArray[Any]] = {}
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: item[1].data_offsets):
        if info.data_offsets[0] != end:
            raise BlobError(
                f"{where}: tensor '{name}' starts at byte {info.data_offsets[0]}, expected {end}: "
                "data must follow each other without a hole or an overlap"
            )
        end = info.data_offsets[1]
        tensors[name] = _tensor(data, info, where=f"{where}: tensor '{name}'")
    if end != len(data):
        raise BlobError(f"{where}: tensors cover {end} bytes of data, found {len(data)}")
    return tensors, metadata


def _header(view: memoryview, *, where: str) -> dict[str, msgspec.Raw]:
    if len(view) < 8:
        raise BlobError(f"{where}: expected a safetensors blob of at least 8 bytes, found {len(view)}")
    num_bytes = int.from_bytes(view[:8], "little")
    if num_bytes > min(HEADER_BYTES_MAX, len(view) - 8):
        raise BlobError(
            f"{where}: the header says {num_bytes} bytes; the blob has {len(view) - 8} after its first 8 "
            f"and at most {HEADER_BYTES_MAX} are allowed"
        )
    try:
        header = _HEADER_DECODER.decode(view[8 : 8 + num_bytes])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BlobError(f"{where}: safetensors header: {error}") from error
    if len(header) > NUM_TENSORS_MAX:
        raise BlobError(f"{where}: at most {NUM_TENSORS_MAX} tensors are allowed, found {len(header)}")
    return header


def _tensor(data: memoryview, info: _TensorInfo, *, where: str) -> npt.NDArray[Any]:
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise BlobError(f"{where}: expected a dtype of {sorted(DTYPES)}, found '{info.dtype}'")
    if len(info.shape) > NUM_DIMS_MAX or any(not 0 <= length < 2**48 for length in info.shape):
        raise BlobError(f"{where}: shape {info.shape} is not at most {NUM_DIMS_MAX} lengths of 0..2^48")
    start, end = info.data_offsets
    expected = math.prod(info.shape) * dtype.itemsize
    if end - start != expected or end > len(data):
        raise BlobError(
            f"{where}: {info.dtype}{info.shape} takes {expected} bytes, "
            f"found bytes {start}..{end} of {len(data)}"
        )
    try:
        return np.frombuffer(data[start:end], dtype=dtype).reshape(info.shape)
    except ValueError as error:  # numpy's own limit on the product of the lengths beside a length of 0
        raise BlobError(f"{where}: shape {info.shape}: {error}") from error
