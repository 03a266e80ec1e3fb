"""What one rank contributes to a version: its rows as segments, and what it tells rank 0 about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from param_server.client import BlobRef, RowFormat, RowSegment, blob_ref, encode, split
from trainer.changed_rows import Taken
from trainer.recommender import TableShard
from trainer.stream.columns import Position


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
class TakenRows:
    """One table's taken rows, copied, so that training may go on while they are sent."""

    table: str
    taken: Taken
    rows_ND: npt.NDArray[np.float32]


def copy_rows(shard: TableShard, taken: Taken) -> TakenRows:
    slots_N = torch.from_numpy(taken.slots_N).to(shard.rows.rows_CD.device)
    rows_ND = shard.rows.rows_CD[slots_N].detach().to("cpu", torch.float32).numpy()
    return TakenRows(table=shard.config.name, taken=taken, rows_ND=rows_ND)


def encode_rows(
    rows: TakenRows, *, rank: int, row_format: RowFormat, bytes_max: int
) -> Iterator[tuple[BlobRef, bytes]]:
    """The rows and deletes as segments of at most bytes_max; none at all where nothing changed."""
    if not len(rows.taken.keys_N) and not len(rows.taken.deleted_keys_M):
        return
    segment = RowSegment(
        table=rows.table,
        ids_N=rows.taken.keys_N,
        rows_ND=rows.rows_ND,
        deleted_ids_M=rows.taken.deleted_keys_M,
    )
    for part, piece in enumerate(split(segment, bytes_max=bytes_max, row_format=row_format)):
        data = encode(piece, row_format=row_format)
        reference = blob_ref(
            "rows",
            f"{rows.table}-rank{rank}-{part:05d}",
            data,
            table=rows.table,
            num_rows=len(piece.ids_N),
            num_deletes=len(piece.deleted_ids_M),
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
        for time_ms, count in zip(times_U.tolist(), counts_U.tolist(), strict=True):
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
