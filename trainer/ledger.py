"""A shadow ledger: how often each impression was applied to the state that it is saved with.

For runs that are checked, off by default (`train.ledger`): after any number of kills the ledger of the final
checkpoint says of every impression whether its gradient is in the state once, twice or not at all.
Shapes: N impressions of a batch, K distinct impressions so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Columns = dict[str, npt.NDArray[Any]]

PENDING_MIN = 4_096
"""At least so many impressions wait before they are merged; a merge touches every id so far."""


class Ledger:
    """Sorted ids with their counts; new ids wait until they are half as many, so that merging is amortised.

    Memory: 12 bytes a distinct impression, half as much again for those that wait, and twice that while
    merging. One writer.
    """

    def __init__(self) -> None:
        self._ids_K = np.zeros(0, np.uint64)
        self._counts_K = np.zeros(0, np.uint32)
        self._pending: list[npt.NDArray[np.uint64]] = []
        self._num_pending = 0

    def add(self, request_ids_N: npt.NDArray[np.uint64]) -> None:
        """These impressions have been applied once more; an id may occur twice in one call."""
        if not len(request_ids_N):
            return
        # A copy: the ids may be a view of a record that the next batch overwrites or frees.
        self._pending.append(np.array(request_ids_N, np.uint64))
        self._num_pending += len(request_ids_N)
        if self._num_pending >= max(PENDING_MIN, len(self._ids_K) // 2):
            self._merge()

    @property
    def num_applied(self) -> int:
        """Impressions applied, each as often as it was."""
        return int(self._counts_K.sum(dtype=np.int64)) + self._num_pending

    def columns(self) -> Columns:
        """ids uint64 [K] ascending, counts uint32 [K]; not to be written to."""
        self._merge()
        return {"ids": self._ids_K, "counts": self._counts_K}

    def restore(self, columns_by_rank: Sequence[Columns], *, rank: int, world_size: int) -> None:
        """Take over what the ranks of a checkpoint had counted.

        The same number of ranks: each takes its own. Another number: everything is merged and dealt out by
        position, so that over all ranks every count is there exactly once. What was here is forgotten.
        Raises: ValueError if a rank's columns are not ids and counts of one length.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"ledger: rank must be in 0..{world_size - 1}, found {rank}")
        for number, columns in enumerate(columns_by_rank):
            _check(columns, where=f"ledger of rank {number}")
        if len(columns_by_rank) == world_size:
            mine, every = columns_by_rank[rank : rank + 1], slice(None)
        else:
            mine, every = columns_by_rank, slice(rank, None, world_size)
        ids_K, counts_K = merge_counts([(columns["ids"], columns["counts"]) for columns in mine])
        self._ids_K, self._counts_K = ids_K[every].copy(), counts_K[every].copy()
        self._pending, self._num_pending = [], 0

    def _merge(self) -> None:
        if self._pending:
            new_ids_N = np.concatenate(self._pending)
            ones_N = np.ones(len(new_ids_N), np.uint32)
            merged = merge_counts([(self._ids_K, self._counts_K), (new_ids_N, ones_N)])
            self._ids_K, self._counts_K = merged
            self._pending, self._num_pending = [], 0


def merge_counts(
    parts: Sequence[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
    """Add up the counts of equal ids.

    Args: parts: (ids, counts) of equal length each, in any order, ids repeated or not.
    Returns: ids uint64 [K] ascending and distinct, counts uint32 [K].
    """
    ids_N = np.concatenate([np.zeros(0, np.uint64), *(ids for ids, _ in parts)])
    counts_N = np.concatenate([np.zeros(0, np.uint32), *(counts for _, counts in parts)])
    # Stable: a radix sort for integers, quick on the long sorted run that the ledger itself is.
    order_N = np.argsort(ids_N, kind="stable")
    ids_N, counts_N = ids_N[order_N], counts_N[order_N]
    first_K = np.flatnonzero(np.r_[True, ids_N[1:] != ids_N[:-1]]) if len(ids_N) else np.zeros(0, np.int64)
    if not len(first_K):
        return ids_N, counts_N
    return ids_N[first_K], np.add.reduceat(counts_N, first_K).astype(np.uint32)


def _check(columns: Columns, *, where: str) -> None:
    """Raises: ValueError unless there are uint64 ids and uint32 counts, one of each for each id."""
    ids, counts = columns.get("ids"), columns.get("counts")
    if (
        ids is None
        or counts is None
        or ids.dtype != np.uint64
        or counts.dtype != np.uint32
        or ids.ndim != 1
        or ids.shape != counts.shape
    ):
        found = {name: f"{column.dtype} {list(column.shape)}" for name, column in sorted(columns.items())}
        raise ValueError(f"{where}: expected ids uint64 [K] and counts uint32 [K], found {found}")
