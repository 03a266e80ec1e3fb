"""What one rank contributes to a version, and the description that rank 0 makes of all contributions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import numpy.typing as npt
import structlog
import torch

from param_server.client import (
    BlobRef,
    Manifest,
    ManifestPosition,
    RowFormat,
    RowSegment,
    RulesConfig,
    Version,
    blob_ref,
    encode,
    finite_rows,
    split,
    split_by_shard,
)
from proto.row_formats import INT8_ABS_MAX
from trainer.publish.changed_rows import Clocks, Taken
from trainer.recommender import TableShard
from trainer.run.status import VersionTrace
from trainer.stream.columns import Position

log = structlog.get_logger()

KEYS_LOGGED_MAX = 8


class PartReport(msgspec.Struct, kw_only=True):
    """What rank 0 must know of a rank's part to write the manifest."""

    blobs: list[BlobRef]
    positions: list[Position]
    produced_ms: list[tuple[int, int]]
    produced_ms_newest: int
    num_rows: int
    num_deletes: int
    num_changed: int
    held_back: dict[str, int]


@dataclass(frozen=True, slots=True)
class OnItsWay:
    """A version between take and ack."""

    version: Version
    full: bool
    taken_ms: int
    watermark_ms: int
    positions: list[Position]
    produced_ms: list[tuple[int, int]]


def describe(
    way: OnItsWay,
    reports: list[PartReport],
    *,
    parent: Version | None,
    schema_hash: str,
    created_ms: int,
) -> Manifest:
    """The manifest of all ranks' parts together."""
    return Manifest(
        version=way.version,
        parent=parent,
        kind="full" if way.full else "delta",
        blobs=tuple(blob for report in reports for blob in report.blobs),
        schema_hash=schema_hash,
        watermark_ms=way.watermark_ms,
        produced_ms_newest=max(report.produced_ms_newest for report in reports),
        created_ms=created_ms,
        positions=tuple(
            ManifestPosition(**position._asdict()) for report in reports for position in report.positions
        ),
    )


def trace_of(way: OnItsWay, reports: list[PartReport], *, shared_sent: bool) -> VersionTrace:
    """The version's line in `versions.jsonl`, but for the time of its commit.

    Args: shared_sent: program and signature were at the server already.
    """
    blobs = [blob for report in reports for blob in report.blobs]
    return VersionTrace(
        generation=way.version.generation,
        sequence=way.version.sequence,
        kind="full" if way.full else "delta",
        num_rows=sum(report.num_rows for report in reports),
        num_deletes=sum(report.num_deletes for report in reports),
        num_bytes=sum(blob.num_bytes for blob in blobs if blob.kind in ("rows", "dense") or not shared_sent),
        taken_ms=way.taken_ms,
        committed_ms=0,
        produced_ms=[entry for report in reports for entry in report.produced_ms],
    )


@dataclass(frozen=True, slots=True)
class TakenRows:
    """One table's taken rows, copied, so that training may go on while they are sent."""

    taken: Taken
    segment: RowSegment


def take_rows(
    shard: TableShard, *, full: bool, rules: RulesConfig, clocks: Clocks, row_format: RowFormat
) -> TakenRows:
    """Take one table's changed rows (full: all rows) and copy those that serving can hold.

    A row that is not finite, or beyond what the row format can say, stays out and pending, with a counted
    reason; serving keeps the value that it has until the next full version.
    """
    if full:
        taken = shard.changed.take_full(shard.ids.rows())
    else:
        taken = shard.changed.take(shard.ids.rows, rules=rules, clocks=clocks)
    slots_N = torch.from_numpy(taken.slots_N).to(shard.rows.rows_CD.device)
    segment = RowSegment(
        table=shard.config.name,
        ids_N=taken.keys_N,
        rows_ND=shard.rows.rows_CD[slots_N].detach().to("cpu", torch.float32).numpy(),
        deleted_ids_M=taken.deleted_keys_M,
        scores_N=taken.scores_N,
        last_seen_s_N=taken.last_seen_s_N,
    )
    segment, bad_ids_K = finite_rows(segment)
    taken = _withhold(shard, taken, bad_ids_K, reason="not_finite")
    if row_format != "float32":
        beyond_N = np.abs(segment.rows_ND).max(axis=1, initial=0.0) > _LARGEST[row_format]
        taken = _withhold(shard, taken, segment.ids_N[beyond_N], reason="out_of_range")
        segment = _only(segment, ~beyond_N)
    return TakenRows(taken, replace(segment, deleted_ids_M=taken.deleted_keys_M))


_LARGEST: dict[RowFormat, float] = {"float16": float(np.finfo(np.float16).max), "int8": INT8_ABS_MAX}


def _withhold(shard: TableShard, taken: Taken, ids_K: npt.NDArray[np.int64], *, reason: str) -> Taken:
    if not len(ids_K):
        return taken
    log.warning(
        "rows are kept from serving",
        table=shard.config.name,
        reason=reason,
        rows=len(ids_K),
        keys=ids_K[:KEYS_LOGGED_MAX].tolist(),
    )
    return shard.changed.withhold(np.isin(taken.keys_N, ids_K), reason=reason)


def _only(segment: RowSegment, chosen_N: npt.NDArray[np.bool_]) -> RowSegment:
    if chosen_N.all():
        return segment
    assert segment.scores_N is not None
    assert segment.last_seen_s_N is not None
    return replace(
        segment,
        ids_N=segment.ids_N[chosen_N],
        rows_ND=segment.rows_ND[chosen_N],
        scores_N=segment.scores_N[chosen_N],
        last_seen_s_N=segment.last_seen_s_N[chosen_N],
    )


def encode_rows(
    rows: TakenRows, *, rank: int, num_shards: int, row_format: RowFormat, bytes_max: int
) -> Iterator[tuple[BlobRef, bytes]]:
    """The rows and deletes as segments of at most bytes_max, each for the shard that owns its ids.

    None at all where nothing changed. Every shard learns of the table by a full version, also one without
    a row of it.
    """
    segment = rows.segment
    if not len(segment) and not len(segment.deleted_ids_M):
        return
    for shard, share in split_by_shard(segment, num_shards=num_shards):
        if not rows.taken.full and not len(share) and not len(share.deleted_ids_M):
            continue
        for part, piece in enumerate(split(share, bytes_max=bytes_max, row_format=row_format)):
            data = encode(piece, row_format=row_format)
            reference = blob_ref(
                "rows",
                f"{segment.table}-rank{rank}-shard{shard}-{part:05d}",
                data,
                table=segment.table,
                num_rows=len(piece),
                num_deletes=len(piece.deleted_ids_M),
                shard=shard,
            )
            yield reference, data


class ProducedTimes:
    """When the impressions trained since the last version entered the stream; bounded."""

    def __init__(self, *, entries_max: int = 512) -> None:
        self._entries_max = entries_max
        self._count_by_ms: dict[int, int] = {}
        self.newest_ms = 0
        """0 = no impression yet."""

    def add(self, produced_ms_N: npt.NDArray[np.int64]) -> None:
        if not len(produced_ms_N):
            return
        times_U, counts_U = np.unique(produced_ms_N, return_counts=True)
        self.newest_ms = max(self.newest_ms, int(times_U[-1]))
        self._count(zip(times_U.tolist(), counts_U.tolist(), strict=True))

    def put_back(self, taken: list[tuple[int, int]]) -> None:
        """The version that they were taken for did not become durable: they wait for the next one."""
        self._count(taken)

    def _count(self, entries: Iterable[tuple[int, int]]) -> None:
        for time_ms, count in entries:
            self._count_by_ms[time_ms] = self._count_by_ms.get(time_ms, 0) + count
        if len(self._count_by_ms) > self._entries_max:
            self._coarsen()

    def _coarsen(self) -> None:
        """Join neighbours under the earlier time, which makes freshness look worse, never better."""
        entries = sorted(self._count_by_ms.items())
        self._count_by_ms = {
            entries[index][0]: sum(count for _, count in entries[index : index + 2])
            for index in range(0, len(entries), 2)
        }

    def take(self) -> list[tuple[int, int]]:
        """(time in ms, impressions), and begin anew."""
        taken = sorted(self._count_by_ms.items())
        self._count_by_ms = {}
        return taken
