"""Row segments as blobs of at most 4 MiB, small neighbours joined, each for one shard.

Rows are written as float32: whatever format they came in, their values are then kept bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np

from feature_eviction import owner_of
from param_server.errors import BadBlobError
from param_server.manifest import BlobRef, Version, blob_ref
from proto.row_segment import PackedSegment, RowSegment, decode_packed, encode, split
from proto.tensor_blob import BlobError

BLOB_BYTES_TARGET = 3 << 20


def split_by_shard(segment: RowSegment, *, num_shards: int) -> Iterator[tuple[int, RowSegment]]:
    """The part of every shard that has one, by hash(id) % num_shards; order kept within a shard."""
    if num_shards == 1:
        yield 0, segment
        return
    owner_N = owner_of(segment.ids_N, num_owners=num_shards)
    owner_M = owner_of(segment.deleted_ids_M, num_owners=num_shards)
    for shard in range(num_shards):
        mask_N = owner_N == shard
        deleted_M = segment.deleted_ids_M[owner_M == shard]
        # Every shard learns of a table and its dim, also where it has no row of it yet.
        yield shard, _with(segment, mask_N, deleted_M)


def encode_rows(
    segments: Iterable[RowSegment], *, prefix: str, shard: int
) -> Iterator[tuple[BlobRef, bytes]]:
    """Blobs named `<prefix>-shard<k>-<number>`, in order, with their references."""
    number = 0
    for joined in _joined(segments):
        for piece in split(joined, bytes_max=BLOB_BYTES_TARGET):
            data = encode(piece, row_format="float32")
            name = f"{prefix}-shard{shard}-{number:06d}"
            yield (
                blob_ref(
                    "rows",
                    name,
                    data,
                    table=piece.table,
                    num_rows=len(piece),
                    num_deletes=len(piece.deleted_ids_M),
                    shard=shard,
                ),
                data,
            )
            number += 1


def read_packed(version: Version, blob: BlobRef, data: bytes | memoryview) -> PackedSegment:
    """Decode a rows blob and hold it against what the manifest says of it; rows stay in their format.

    Raises: BadBlobError naming version and blob.
    """
    where = f"version {version}: blob '{blob.name}'"
    try:
        segment = decode_packed(data, where=where)
    except BlobError as error:
        raise BadBlobError(str(error)) from error
    expected = (blob.table, blob.num_rows, blob.num_deletes)
    found = (segment.table, len(segment), len(segment.deleted_ids_M))
    if expected != found:
        raise BadBlobError(f"{where}: expected (table, rows, deletes) {expected}, found {found}")
    return segment


def read_segment(version: Version, blob: BlobRef, data: bytes | memoryview) -> RowSegment:
    """Like `read_packed`, with rows as float32."""
    return read_packed(version, blob, data).unpacked()


def _joined(segments: Iterable[RowSegment]) -> Iterator[RowSegment]:
    """Neighbours of one table with the same columns become one, up to about BLOB_BYTES_TARGET."""
    waiting: list[RowSegment] = []
    for segment in segments:
        alike = waiting and _kind(waiting[0]) == _kind(segment)
        full = sum(one.rows_ND.nbytes + one.deleted_ids_M.nbytes for one in waiting) >= BLOB_BYTES_TARGET
        if waiting and (full or not alike):
            yield _concatenated(waiting)
            waiting = []
        waiting.append(segment)
    if waiting:
        yield _concatenated(waiting)


def _kind(segment: RowSegment) -> tuple[Any, ...]:
    columns = (segment.state_N, segment.scores_N, segment.last_seen_s_N, segment.updates_N)
    return (segment.table, segment.dim, *(column is None for column in columns))


def _concatenated(segments: list[RowSegment]) -> RowSegment:
    if len(segments) == 1:
        return segments[0]
    columns: dict[str, Any] = {
        field.name: None
        if getattr(segments[0], field.name) is None
        else np.concatenate([getattr(segment, field.name) for segment in segments])
        for field in fields(segments[0])
        if field.name != "table"
    }
    return RowSegment(table=segments[0].table, **columns)


def _with(segment: RowSegment, mask_N: Any, deleted_ids_M: Any) -> RowSegment:
    columns: dict[str, Any] = {
        field.name: None if value is None else value[mask_N]
        for field in fields(segment)
        if field.name not in ("table", "deleted_ids_M")
        for value in (getattr(segment, field.name),)
    }
    return RowSegment(table=segment.table, deleted_ids_M=deleted_ids_M, **columns)
