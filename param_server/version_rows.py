"""The rows of one version and table on their way into a replica: joined, converted, and cut to what it holds.

Shapes: N rows, M deletes, W columns of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.keys import class_of, owner_of
from param_server.errors import BadBlobError
from param_server.serving_config import ServingConfig
from proto.row_formats import RowFormat, pack_rows, unpack_rows
from proto.row_segment import BlobError, PackedSegment

Keys = npt.NDArray[np.int64]


@dataclass(slots=True)
class VersionRows:
    """What one version brings of one table; each key occurs once."""

    dim: int
    row_format: RowFormat
    keys_N: Keys
    rows_NW: npt.NDArray[Any]
    last_seen_s_N: npt.NDArray[np.int64]
    worth_N: npt.NDArray[np.float64]
    """The lowest give way when memory is short."""
    deleted_M: Keys

    def __len__(self) -> int:
        return len(self.keys_N)

    def keep(self, kept_N: npt.NDArray[np.bool_]) -> Keys:
        """Part with the other rows; returns their keys."""
        gone = self.keys_N[~kept_N]
        if len(gone):
            for name in ("keys_N", "rows_NW", "last_seen_s_N", "worth_N"):
                setattr(self, name, getattr(self, name)[kept_N])
        return gone


def join_segments(
    segments: list[PackedSegment],
    *,
    where: str,
    row_format: RowFormat | None,
    watermark_s: int,
    config: ServingConfig,
) -> VersionRows:
    """The segments of one table as one.

    Args: row_format: to bring all rows to; None = the first segment's. watermark_s: stands for the last
        sighting of rows that came without one.
    Raises: BadBlobError if an id occurs twice, dims differ or a row does not fit the format.
    """
    dims = sorted({segment.dim for segment in segments})
    if len(dims) != 1:
        raise BadBlobError(f"{where}: found dims {dims}, expected one")
    keys_N = np.concatenate([segment.ids_N for segment in segments])
    deleted_M = np.concatenate([segment.deleted_ids_M for segment in segments])
    ordered = np.sort(np.concatenate([keys_N, deleted_M]))
    doubled = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(doubled):
        raise BadBlobError(f"{where}: id {int(doubled[0])} occurs in two segments")
    chosen = row_format or segments[0].row_format
    last_seen_s_N = np.concatenate([_last_seen(segment, watermark_s) for segment in segments])
    return VersionRows(
        dim=dims[0],
        row_format=chosen,
        keys_N=keys_N,
        rows_NW=np.concatenate([_converted(segment, chosen, where=where) for segment in segments]),
        last_seen_s_N=last_seen_s_N,
        worth_N=np.concatenate([_worth(segment, watermark_s, config=config) for segment in segments]),
        deleted_M=deleted_M,
    )


def expired(
    keys_N: Keys, last_seen_s_N: npt.NDArray[np.integer[Any]], *, now_s: int, config: ServingConfig
) -> npt.NDArray[np.bool_]:
    """Which rows are past their serving lifetime."""
    lifetimes_s_N = np.full(len(keys_N), config.lifetime_s, np.int64)
    if config.lifetime_s_by_class:
        classes_N = class_of(keys_N)
        for class_id, lifetime_s in config.lifetime_s_by_class.items():
            lifetimes_s_N[classes_N == int(class_id)] = lifetime_s
    age_s_N = now_s - last_seen_s_N.astype(np.int64)
    return (lifetimes_s_N > 0) & (age_s_N > lifetimes_s_N)


def in_shard(keys_N: Keys, *, config: ServingConfig) -> npt.NDArray[np.bool_]:
    """Which keys belong to the replica's shard of rows."""
    if config.num_rows_shards == 1:
        return np.ones(len(keys_N), np.bool_)
    mine_N: npt.NDArray[np.bool_] = owner_of(keys_N, num_owners=config.num_rows_shards) == config.rows_shard
    return mine_N


def _converted(segment: PackedSegment, row_format: RowFormat, *, where: str) -> npt.NDArray[Any]:
    if segment.row_format == row_format:
        return segment.rows_NW
    try:
        return pack_rows(unpack_rows(segment.rows_NW, segment.row_format), row_format, where=where)
    except BlobError as error:
        raise BadBlobError(str(error)) from error


def _last_seen(segment: PackedSegment, watermark_s: int) -> npt.NDArray[np.int64]:
    if segment.last_seen_s_N is not None:
        return segment.last_seen_s_N
    return np.full(len(segment), watermark_s, np.int64)


def _worth(segment: PackedSegment, watermark_s: int, *, config: ServingConfig) -> npt.NDArray[np.float64]:
    if config.over_budget == "lowest_score" and segment.scores_N is not None:
        return segment.scores_N.astype(np.float64)
    return _last_seen(segment, watermark_s).astype(np.float64)
