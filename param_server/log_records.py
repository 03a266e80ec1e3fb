"""The records of a segment: one blob of one version each, with lengths and checksums in front.

    4 bytes   magic "FRS1"
    8, 8      generation, sequence
    4         bytes of data
    4         CRC32C of the data
    2         bytes of the name
    2         zero
    4         CRC32C of the 32 bytes before and of the name
    name, data

A manifest names a record by segment and offset. The header is there so that a reader knows that it has
found what was meant, and so that a segment can be read without any manifest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from param_server.errors import StoreMissingError
from param_server.manifest import BLOB_BYTES_MAX, BlobRef, Version
from param_server.stores import Store
from proto.tensor_blob import crc32c

MAGIC = b"FRS1"
_FIXED = struct.Struct("<4sQQIIHH")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIXED.size + _CRC.size


@dataclass(frozen=True, slots=True)
class Record:
    """What a header says."""

    version: Version
    name: str
    num_bytes: int
    crc32c: int

    @property
    def data_start(self) -> int:
        """From the record's first byte."""
        return HEADER_BYTES + len(self.name.encode())

    @property
    def total_bytes(self) -> int:
        return self.data_start + self.num_bytes


def record_header(version: Version, name: str, data: bytes, *, data_crc32c: int) -> bytes:
    """Everything in front of the data."""
    name_bytes = name.encode()
    fixed = _FIXED.pack(
        MAGIC, version.generation, version.sequence, len(data), data_crc32c, len(name_bytes), 0
    )
    return fixed + _CRC.pack(crc32c(fixed + name_bytes)) + name_bytes


def parse_header(head: bytes) -> Record | None:
    """The record that begins here; None: these bytes are no record's beginning."""
    if len(head) < HEADER_BYTES:
        return None
    magic, generation, sequence, num_bytes, data_crc32c, name_bytes, _ = _FIXED.unpack_from(head)
    name = head[HEADER_BYTES : HEADER_BYTES + name_bytes]
    (found,) = _CRC.unpack_from(head, _FIXED.size)
    if magic != MAGIC or len(name) != name_bytes or crc32c(head[: _FIXED.size] + name) != found:
        return None
    if num_bytes > BLOB_BYTES_MAX:
        return None
    return Record(Version(generation, sequence), name.decode("ascii", "replace"), num_bytes, data_crc32c)


def read_record(store: Store, version: Version, blob: BlobRef) -> tuple[memoryview | None, str]:
    """The data of a located blob, checked against header and reference, and "" or what is wrong with it."""
    name_bytes = len(blob.name)
    total = HEADER_BYTES + name_bytes + blob.num_bytes
    try:
        found = store.read(blob.segment, start=blob.segment_offset, num_bytes=total)
    except StoreMissingError:
        return None, f"blob '{blob.name}': segment {blob.segment} is missing"
    where = f"blob '{blob.name}': {blob.segment} at byte {blob.segment_offset}"
    record = parse_header(found[: HEADER_BYTES + name_bytes])
    expected = Record(version, blob.name, blob.num_bytes, blob.crc32c)
    if record != expected:
        return None, f"{where}: expected {_say(expected)}, found {_say(record)}"
    data = memoryview(found)[HEADER_BYTES + name_bytes :]
    if len(data) != blob.num_bytes or crc32c(data) != blob.crc32c:
        return None, (
            f"{where}: expected {blob.num_bytes} bytes with CRC32C {blob.crc32c:08x}, "
            f"found {len(data)} with {crc32c(data):08x}"
        )
    return data, ""


def scan_headers(store: Store, segment: str) -> Iterator[tuple[int, Record]]:
    """(offset, record) of a segment up to its end or its torn tail; the data is not looked at."""
    start, end = 0, store.size(segment)
    while start < end:
        record = parse_header(store.read(segment, start=start, num_bytes=HEADER_BYTES + 128))
        if record is None or start + record.total_bytes > end:
            return
        yield start, record
        start += record.total_bytes


def _say(record: Record | None) -> str:
    if record is None:
        return "no record"
    return (
        f"'{record.name}' of version {record.version} with {record.num_bytes} bytes, "
        f"CRC32C {record.crc32c:08x}"
    )
