"""What differs between two checkpoints: rows by raw id, dense parameters, positions, counters.

Tables are compared one share of the ids at a time, so that memory is bounded whatever their size.
Shapes: N rows of one share, D dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_eviction import owner_of
from trainer.checkpoint.restore import SavedState

SHARE_BYTES = 256 << 20


class TableDiff(NamedTuple):
    """Rows of the second checkpoint against the first's."""

    table: str
    added: int
    removed: int
    changed: int
    """Another embedding or another optimizer state."""
    same: int
    largest_difference: float
    """Of embedding values, over the rows that both have."""


class DenseDiff(NamedTuple):
    name: str
    largest_difference: float | None
    """None: only one of them has it, or in another shape."""


def diff_tables(first: SavedState, second: SavedState, *, share_bytes: int = SHARE_BYTES) -> list[TableDiff]:
    """One entry a table that either has."""
    tables = {entry.table for one in (first, second) for entry in one.manifest.files if entry.kind == "rows"}
    return [_diff_table(first, second, table, share_bytes=share_bytes) for table in sorted(tables)]


def _diff_table(first: SavedState, second: SavedState, table: str, *, share_bytes: int) -> TableDiff:
    num_bytes = sum(
        entry.num_bytes for one in (first, second) for entry in one.manifest.entries("rows", table=table)
    )
    num_shares = max(1, -(-num_bytes // share_bytes))
    added = removed = changed = same = 0
    largest = 0.0
    for share in range(num_shares):
        ids_N, rows_ND, state_N = _share(first, table, share, num_shares)
        ids2_N, rows2_ND, state2_N = _share(second, table, share, num_shares)
        both, at, at2 = np.intersect1d(ids_N, ids2_N, assume_unique=True, return_indices=True)
        removed += len(ids_N) - len(both)
        added += len(ids2_N) - len(both)
        if not len(both):
            continue
        gap_N = np.abs(rows_ND[at] - rows2_ND[at2]).max(axis=1)
        num_changed = int(((gap_N > 0) | (state_N[at] != state2_N[at2])).sum())
        changed += num_changed
        same += len(both) - num_changed
        largest = max(largest, float(gap_N.max()))
    return TableDiff(table, added, removed, changed, same, largest)


def _share(
    saved: SavedState, table: str, share: int, num_shares: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(ids_N, rows_ND, state_N) of the ids that fall into one share."""
    ids, rows, states = [np.empty(0, np.int64)], [], [np.empty(0, np.float32)]
    for segment in saved.segments(table):
        mine_N = owner_of(segment.ids_N, num_owners=num_shares) == share
        assert segment.state_N is not None
        ids.append(segment.ids_N[mine_N])
        rows.append(segment.rows_ND[mine_N])
        states.append(segment.state_N[mine_N])
    rows_ND = np.concatenate(rows) if rows else np.empty((0, 1), np.float32)
    return np.concatenate(ids), rows_ND, np.concatenate(states)


def diff_dense(first: SavedState, second: SavedState) -> tuple[list[DenseDiff], int]:
    """(the parameters that differ, those of the largest difference first; how many there are in all)."""
    mine, theirs = _parameters(first), _parameters(second)
    found = []
    for name in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(name), theirs.get(name)
        if one is None or other is None or one.shape != other.shape:
            found.append(DenseDiff(name, None))
        elif not np.array_equal(one, other):
            found.append(DenseDiff(name, float(np.abs(one - other).max())))
    found.sort(key=lambda diff: -(diff.largest_difference or np.inf))
    return found, len(mine.keys() | theirs.keys())


def _parameters(saved: SavedState) -> dict[str, npt.NDArray[Any]]:
    return {
        name.removeprefix("param/"): value
        for name, value in saved.dense().items()
        if name.startswith("param/")
    }


def diff_numbers(first: SavedState, second: SavedState) -> Iterator[tuple[str, str, str]]:
    """(what, in the first, in the second) of the positions and counters that differ; '-' = it has none."""
    mine, theirs = _numbers(first), _numbers(second)
    for name in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(name, "-"), theirs.get(name, "-")
        if one != other:
            yield name, one, other


def _numbers(saved: SavedState) -> dict[str, str]:
    manifest = saved.manifest
    numbers = {
        f"position {position.topic}/{position.partition}": f"{position.kafka_offset}:{position.row}"
        for position in manifest.positions
    }
    numbers |= {f"counter {name}": str(value) for name, value in manifest.counters.items()}
    numbers |= {f"dead letters {reason}": str(num) for reason, num in manifest.dead_letters.items()}
    for name in ("step", "generation", "published", "world_size", "schema_hash", "config_hash"):
        numbers[name] = str(getattr(manifest, name)) or "-"
    return numbers
