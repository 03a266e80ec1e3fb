"""The open-addressing index under SlotMap and IdTable: 16-byte cells of key and slot.

A cell is a row of an int64 [C, 2] array: (key, slot). Emptiness is slot < 0, so every int64 is a legal key.
Linear probing, no tombstones: a removal shifts the following cells back, so that probes stay as short as if
the removed key had never been there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from feature_eviction.jit import kernel, prefetch
from feature_eviction.keys import Int64Array, mix64

CELL_BYTES = 16
PREFETCH_BLOCK = 16
"""Keys whose cells are asked for before the first of them is read; about a core's outstanding misses."""

_HALF = np.uint64(32)


def num_cells_for(capacity: int) -> int:
    """Cells for so many keys: a load of at most 0.8, and always one empty cell to end a probe."""
    return capacity * 5 // 4 + 1


def empty_cells(capacity: int) -> Int64Array:
    """int64 [C, 2] for `capacity` keys."""
    cells_C2 = np.zeros((num_cells_for(capacity), 2), np.int64)
    cells_C2[:, 1] = -1
    return cells_C2


@kernel
def home_cell(cells_C2: Any, key: Any) -> Any:
    """Where a key's probe begins; the product maps 32 bits of hash to a cell without a division."""
    return np.int64(((mix64(key) >> _HALF) * np.uint64(len(cells_C2))) >> _HALF)


@kernel
def find_from(cells_C2: Any, cell: Any, key: Any) -> Any:
    """The cell that holds the key, else the empty cell that ends its probe."""
    while cells_C2[cell, 1] >= 0 and cells_C2[cell, 0] != key:
        cell += 1
        if cell == len(cells_C2):
            cell = 0
    return cell


@kernel
def find_cell(cells_C2: Any, key: Any) -> Any:
    """find_from the key's home."""
    return find_from(cells_C2, home_cell(cells_C2, key), key)


@kernel
def clear_cell(cells_C2: Any, hole: Any) -> None:
    """Empty a cell and close the gap: each later cell of the run moves back unless it would pass its home."""
    num_cells = len(cells_C2)
    cell = hole
    while True:
        cell += 1
        if cell == num_cells:
            cell = 0
        if cells_C2[cell, 1] < 0:
            break
        distance_to_home = cell - home_cell(cells_C2, cells_C2[cell, 0])
        if distance_to_home < 0:
            distance_to_home += num_cells
        distance_to_hole = cell - hole
        if distance_to_hole < 0:
            distance_to_hole += num_cells
        if distance_to_home >= distance_to_hole:
            cells_C2[hole, 0] = cells_C2[cell, 0]
            cells_C2[hole, 1] = cells_C2[cell, 1]
            hole = cell
    cells_C2[hole, 1] = -1


@kernel
def lookup_cells(cells_C2: Any, keys_N: Any, slots_N: Any) -> None:
    """The slot of each key, -1 where absent; by blocks, so that cache misses overlap."""
    num_keys = len(keys_N)
    homes_B = np.empty(PREFETCH_BLOCK, np.int64)
    for start in range(0, num_keys, PREFETCH_BLOCK):
        stop = min(start + PREFETCH_BLOCK, num_keys)
        for i in range(start, stop):
            home = home_cell(cells_C2, keys_N[i])
            homes_B[i - start] = home
            prefetch(cells_C2, home)
        for i in range(start, stop):
            slots_N[i] = cells_C2[find_from(cells_C2, homes_B[i - start], keys_N[i]), 1]


@kernel
def fill_cells(cells_C2: Any, keys_N: Any, slots_N: Any) -> Any:
    """Insert keys into their slots; the position of the first key that was there already, else -1."""
    for i in range(len(keys_N)):
        cell = find_cell(cells_C2, keys_N[i])
        if cells_C2[cell, 1] >= 0:
            return i
        cells_C2[cell, 0] = keys_N[i]
        cells_C2[cell, 1] = slots_N[i]
    return -1
