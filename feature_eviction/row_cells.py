"""IdTable's index: 24-byte cells that hold a row's key, slot and all that a sighting changes.

A sighting that finds its row has then touched one place of memory, and a pass for victims reads the cells in
the order in which they lie. Emptiness is slot < 0, so every int64 is a legal key. Linear probing without
tombstones: a removal shifts later cells back. The way from slot to cell is the key's home cell (which no
shift changes) and the probe from there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.big_arrays import big_array
from feature_eviction.cells import PREFETCH_BLOCK, home_cell, num_cells_for
from feature_eviction.jit import kernel, prefetch

CELL_DTYPE = np.dtype(
    [
        ("key", np.int64),
        ("slot", np.int32),
        ("score", np.float32),
        ("last_seen_s", np.uint32),
        ("updates", np.uint32),
    ]
)
CELL_BYTES = CELL_DTYPE.itemsize

CellArray = npt.NDArray[np.void]


def empty_row_cells(capacity: int) -> CellArray:
    """Cells for `capacity` rows at a load of at most 0.8."""
    cells_C = big_array(num_cells_for(capacity), CELL_DTYPE)
    cells_C["slot"] = -1
    # Never among the lowest: a pass for victims asks for the slot of few cells.
    cells_C["score"] = np.inf
    return cells_C


@kernel
def find_row_from(cells_C: Any, cell: Any, key: Any) -> Any:
    """The cell that holds the key, else the empty cell that ends its probe."""
    num_cells = len(cells_C)
    row = cells_C[np.uint64(cell)]
    while row.slot >= 0 and row.key != key:
        cell += 1
        if cell == num_cells:
            cell = 0
        row = cells_C[np.uint64(cell)]
    return cell


@kernel
def find_row(cells_C: Any, key: Any) -> Any:
    """find_row_from the key's home."""
    return find_row_from(cells_C, home_cell(cells_C, key), key)


@kernel
def find_slot(cells_C: Any, home: Any, slot: Any) -> Any:
    """The cell of a row that is held, from its key's home."""
    cell: Any = np.int64(home)
    while cells_C[cell].slot != slot:
        cell += 1
        if cell == len(cells_C):
            cell = 0
    return cell


@kernel
def remove_row(cells_C: Any, hole: Any) -> None:
    """Empty a cell and close the gap: each later cell of the run moves back unless it would pass its home."""
    num_cells = len(cells_C)
    cell = hole
    while True:
        cell += 1
        if cell == num_cells:
            cell = 0
        if cells_C[cell].slot < 0:
            break
        distance_to_home = cell - home_cell(cells_C, cells_C[cell].key)
        if distance_to_home < 0:
            distance_to_home += num_cells
        distance_to_hole = cell - hole
        if distance_to_hole < 0:
            distance_to_hole += num_cells
        if distance_to_home >= distance_to_hole:
            cells_C[hole] = cells_C[cell]
            hole = cell
    cells_C[hole].slot = -1
    cells_C[hole].score = np.inf


@kernel
def lookup_rows(cells_C: Any, keys_N: Any, slots_N: Any) -> None:
    """The slot of each key, -1 where absent; by blocks, so that cache misses overlap."""
    num_keys = len(keys_N)
    homes_B = np.empty(PREFETCH_BLOCK, np.int64)
    for start in range(0, num_keys, PREFETCH_BLOCK):
        stop = min(start + PREFETCH_BLOCK, num_keys)
        for i in range(start, stop):
            home = home_cell(cells_C, keys_N[i])
            homes_B[i - start] = home
            prefetch(cells_C, home)
        for i in range(start, stop):
            slots_N[i] = cells_C[find_row_from(cells_C, homes_B[i - start], keys_N[i])].slot


@kernel
def rows_of_slots(
    cells_C: Any,
    homes_S: Any,
    slots_N: Any,
    keys_N: Any,
    scores_N: Any,
    last_seen_s_N: Any,
    updates_N: Any,
) -> Any:
    """What the cell of each slot holds, into columns; by blocks, so that cache misses overlap.

    Returns: the first position whose slot is out of range or holds no row, else -1.
    """
    for start in range(0, len(slots_N), PREFETCH_BLOCK):
        stop = min(start + PREFETCH_BLOCK, len(slots_N))
        for i in range(start, stop):
            slot = slots_N[i]
            if slot < 0 or slot >= len(homes_S) or homes_S[slot] < 0:
                return i
            prefetch(cells_C, homes_S[slot])
        for i in range(start, stop):
            row = cells_C[find_slot(cells_C, homes_S[slots_N[i]], slots_N[i])]
            keys_N[i] = row.key
            scores_N[i] = row.score
            last_seen_s_N[i] = row.last_seen_s
            updates_N[i] = row.updates
    return -1
