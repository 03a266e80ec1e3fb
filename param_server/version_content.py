"""The rows of a version: a full version or snapshot and the deltas after it, one over the other.

The log is read twice and never held: first the ids, to learn which occurrence of an id is the last, then the
rows, of which only last occurrences are kept. Memory: 17 bytes an id that occurs, and one blob. Rows keep the
values and the columns with which they were written; they come out in the order of the log.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from param_server.manifest import BlobRef, Manifest
from param_server.row_blobs import read_segment
from proto.row_segment import RowSegment

ReadBlob = Callable[[Manifest, str], bytes | memoryview]
Keys = npt.NDArray[np.int64]


@dataclass
class _Occurrences:
    """Of one table's ids, in the order of the log: rows and deletes, blob by blob."""

    keys: list[Keys]
    is_row: list[npt.NDArray[np.bool_]]
    dim: int


def segments_of(
    chain: Iterable[Manifest], read: ReadBlob, *, shard: int | None = None
) -> Iterator[tuple[Manifest, BlobRef, RowSegment]]:
    """The decoded row blobs of some versions, in order. Raises: what `read` and read_segment raise."""
    for manifest in chain:
        for blob in manifest.rows_blobs:
            if shard is None or blob.shard == shard:
                yield manifest, blob, read_segment(manifest.version, blob, read(manifest, blob.name))


def rows_of_chain(
    chain: Collection[Manifest],
    read: ReadBlob,
    *,
    shard: int | None = None,
    only: dict[str, Keys] | None = None,
) -> Iterator[RowSegment]:
    """The rows that a chain of versions (log_order.chain_to) amounts to, without deletes.

    Args: shard: only this one's rows; None: of all shards. only: table -> sorted ids; no others come out.
    A table whose rows are all gone still comes as one empty segment, which names its dim.
    """
    tables: dict[str, _Occurrences] = {}
    for _, _, segment in segments_of(chain, read, shard=shard):
        table = tables.setdefault(segment.table, _Occurrences([], [], segment.dim))
        table.keys.append(np.concatenate([segment.ids_N, segment.deleted_ids_M]))
        table.is_row.append(np.arange(len(table.keys[-1])) < len(segment))
    keep = {
        name: _last_rows(table, None if only is None else only.get(name, _NO_KEYS))
        for name, table in tables.items()
    }
    done = dict.fromkeys(tables, 0)
    empty = set(tables)
    for _, _, segment in segments_of(chain, read, shard=shard):
        start = done[segment.table]
        mask_N = keep[segment.table][start : start + len(segment)]
        done[segment.table] += len(segment) + len(segment.deleted_ids_M)
        if mask_N.any():
            empty.discard(segment.table)
            yield _picked(segment, mask_N)
    for name in sorted(empty):
        yield RowSegment(name, _NO_KEYS, np.zeros((0, tables[name].dim), np.float32), _NO_KEYS)


def touched_by(manifests: Iterable[Manifest], read: ReadBlob) -> dict[str, tuple[Keys, int]]:
    """Every id that some versions write or delete, by table: (sorted int64 [N], dim)."""
    found: dict[str, tuple[list[Keys], int]] = {}
    for _, _, segment in segments_of(manifests, read):
        keys, _ = found.setdefault(segment.table, ([], segment.dim))
        keys += [segment.ids_N, segment.deleted_ids_M]
    return {name: (np.unique(np.concatenate(keys)), dim) for name, (keys, dim) in found.items()}


_NO_KEYS = np.zeros(0, np.int64)


def _last_rows(table: _Occurrences, only_N: Keys | None) -> npt.NDArray[np.bool_]:
    """Which occurrences are an id's last one and a row."""
    keys_T = np.concatenate(table.keys)
    mask_T = np.zeros(len(keys_T), np.bool_)
    _, first_reversed_U = np.unique(keys_T[::-1], return_index=True)
    mask_T[len(keys_T) - 1 - first_reversed_U] = True
    mask_T &= np.concatenate(table.is_row)
    if only_N is not None:
        mask_T &= np.isin(keys_T, only_N)
    return mask_T


def _picked(segment: RowSegment, mask_N: npt.NDArray[np.bool_]) -> RowSegment:
    if mask_N.all() and not len(segment.deleted_ids_M):
        return segment
    columns: dict[str, Any] = {
        field.name: None if value is None else value[mask_N]
        for field in fields(segment)
        if field.name not in ("table", "deleted_ids_M")
        for value in (getattr(segment, field.name),)
    }
    return RowSegment(table=segment.table, deleted_ids_M=_NO_KEYS, **columns)
