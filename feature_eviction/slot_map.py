"""SlotMap: a bare, collision-free map from key to slot, for whoever needs no score.

A slot is free exactly when no key points to it. Freed slots wait at the end of a queue, so that a slot is
reused as late as possible. One writer; readers that run beside it need the caller's lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.cells import clear_cell, empty_cells, fill_cells, find_cell, lookup_cells
from feature_eviction.errors import TableFullError
from feature_eviction.jit import kernel
from feature_eviction.keys import Int32Array, Int64Array, as_keys

CAPACITY_MAX = 2**31 - 2

BoolArray = npt.NDArray[np.bool_]

# links_S2[slot + 1] = (slot before + 1, slot after + 1) in the queue of free slots; row 0 is its both ends.
# A slot in use has _IN_USE in both, so that an assignment can tell.
_BEFORE = 0
_AFTER = 1
_IN_USE = -1


@kernel
def _take(links_S2: Any, slot: Any) -> None:
    before, after = links_S2[slot + 1, _BEFORE], links_S2[slot + 1, _AFTER]
    links_S2[before, _AFTER] = after
    links_S2[after, _BEFORE] = before
    links_S2[slot + 1, _BEFORE] = _IN_USE
    links_S2[slot + 1, _AFTER] = _IN_USE


@kernel
def _free(links_S2: Any, slot: Any) -> None:
    last = links_S2[0, _BEFORE]
    links_S2[slot + 1, _BEFORE] = last
    links_S2[slot + 1, _AFTER] = 0
    links_S2[last, _AFTER] = slot + 1
    links_S2[0, _BEFORE] = slot + 1


@kernel
def _append_free(links_S2: Any, first: Any, stop: Any) -> None:
    for slot in range(first, stop):
        _free(links_S2, slot)


@kernel
def _upsert(cells_C2: Any, links_S2: Any, keys_N: Any, slots_N: Any, is_new_N: Any) -> Any:
    """How many keys were done; fewer than N when no slot is left."""
    for i in range(len(keys_N)):
        cell = find_cell(cells_C2, keys_N[i])
        is_new_N[i] = cells_C2[cell, 1] < 0
        if is_new_N[i]:
            slot = links_S2[0, _AFTER] - 1
            if slot < 0:
                is_new_N[i] = False
                return i
            _take(links_S2, slot)
            cells_C2[cell, 0] = keys_N[i]
            cells_C2[cell, 1] = slot
        slots_N[i] = cells_C2[cell, 1]
    return len(keys_N)


@kernel
def _delete(cells_C2: Any, links_S2: Any, keys_N: Any, slots_N: Any) -> Any:
    num_deleted = 0
    for i in range(len(keys_N)):
        cell = find_cell(cells_C2, keys_N[i])
        slots_N[i] = cells_C2[cell, 1]
        if slots_N[i] >= 0:
            clear_cell(cells_C2, cell)
            _free(links_S2, slots_N[i])
            num_deleted += 1
    return num_deleted


@kernel
def _first_not_free(links_S2: Any, slots_N: Any) -> Any:
    """The first position whose slot is out of range, in use, or given twice; else -1. Changes nothing."""
    bad = -1
    num_marked = 0
    for i in range(len(slots_N)):
        slot = slots_N[i]
        if slot < 0 or slot + 1 >= len(links_S2) or links_S2[slot + 1, _BEFORE] < 0:
            bad = i
            break
        # A negative link marks a slot as given already; undone below.
        links_S2[slot + 1, _BEFORE] = -2 - links_S2[slot + 1, _BEFORE]
        num_marked += 1
    for i in range(num_marked):
        slot = slots_N[i]
        links_S2[slot + 1, _BEFORE] = -2 - links_S2[slot + 1, _BEFORE]
    return bad


@kernel
def _assign(cells_C2: Any, links_S2: Any, keys_N: Any, slots_N: Any, old_slots_N: Any) -> Any:
    num_inserted = 0
    for i in range(len(keys_N)):
        cell = find_cell(cells_C2, keys_N[i])
        old_slots_N[i] = cells_C2[cell, 1]
        _take(links_S2, slots_N[i])
        if old_slots_N[i] < 0:
            cells_C2[cell, 0] = keys_N[i]
            num_inserted += 1
        else:
            _free(links_S2, old_slots_N[i])
        cells_C2[cell, 1] = slots_N[i]
    return num_inserted


@kernel
def _items(cells_C2: Any, keys_N: Any, slots_N: Any) -> None:
    i = 0
    for cell in range(len(cells_C2)):
        if cells_C2[cell, 1] >= 0:
            keys_N[i] = cells_C2[cell, 0]
            slots_N[i] = cells_C2[cell, 1]
            i += 1


@kernel
def _free_slots(links_S2: Any, slots_N: Any) -> None:
    row = links_S2[0, _AFTER]
    for i in range(len(slots_N)):
        slots_N[i] = row - 1
        row = links_S2[row, _AFTER]


class SlotMap:
    """key -> slot in [0, capacity); every int64 is a legal key.

    Memory: 16 bytes a cell at a load of at most 0.8, and 8 bytes a slot for the queue of free ones.
    """

    def __init__(self, capacity: int) -> None:
        """Raises: ValueError for a capacity outside 1..2^31-2."""
        _check_capacity(capacity)
        self._cells_C2 = empty_cells(capacity)
        self._links_S2: Int32Array = np.full((capacity + 1, 2), _IN_USE, np.int32)
        self._links_S2[0] = 0
        self._num_keys = 0
        _append_free(self._links_S2, 0, capacity)

    @property
    def capacity(self) -> int:
        return len(self._links_S2) - 1

    @property
    def bytes_used(self) -> int:
        return self._cells_C2.nbytes + self._links_S2.nbytes

    def __len__(self) -> int:
        return self._num_keys

    def lookup(self, keys_N: npt.ArrayLike) -> Int64Array:
        """Slots int64 [N]; -1 = absent."""
        keys_N = as_keys(keys_N)
        slots_N = np.empty(len(keys_N), np.int64)
        lookup_cells(self._cells_C2, keys_N, slots_N)
        return slots_N

    def upsert(self, keys_N: npt.ArrayLike) -> tuple[Int64Array, BoolArray]:
        """Slots int64 [N], and whether each key was inserted here (a repeated key: its first place only).

        Raises: TableFullError if the new keys do not fit; then none of them is held.
        """
        keys_N = as_keys(keys_N)
        slots_N = np.empty(len(keys_N), np.int64)
        is_new_N = np.zeros(len(keys_N), np.bool_)
        num_done = int(_upsert(self._cells_C2, self._links_S2, keys_N, slots_N, is_new_N))
        self._num_keys += int(is_new_N.sum())
        if num_done < len(keys_N):
            self.delete(keys_N[is_new_N])
            raise TableFullError(
                f"slot map: {self._num_keys} of {self.capacity} slots are taken; the new ones among "
                f"{len(keys_N)} keys do not fit. Call grow() first or delete keys."
            )
        return slots_N, is_new_N

    def delete(self, keys_N: npt.ArrayLike) -> Int64Array:
        """The slots that became free, int64 [N]; -1 where the key was absent."""
        keys_N = as_keys(keys_N)
        slots_N = np.empty(len(keys_N), np.int64)
        self._num_keys -= int(_delete(self._cells_C2, self._links_S2, keys_N, slots_N))
        return slots_N

    def free_slots(self, num_slots: int) -> Int64Array:
        """The next `num_slots` free slots, int64, still free: rows can be written there, then assigned.

        Raises: TableFullError if fewer are free.
        """
        num_free = self.capacity - self._num_keys
        if num_slots > num_free:
            raise TableFullError(
                f"slot map: {num_slots} free slots were asked for, {num_free} of {self.capacity} are free. "
                f"Call grow() first."
            )
        slots_N = np.empty(num_slots, np.int64)
        _free_slots(self._links_S2, slots_N)
        return slots_N

    def assign(self, keys_N: npt.ArrayLike, slots_N: npt.ArrayLike) -> Int64Array:
        """Point each key to the given free slot, inserting it where absent; its old slot becomes free.

        Returns: the old slots int64 [N], -1 where the key is new. A repeated key keeps its last slot.
        Raises: ValueError if a slot is out of range, in use or given twice; then nothing has changed.
        """
        keys_N = as_keys(keys_N)
        slots_N = as_keys(slots_N, name="slots_N")
        if len(keys_N) != len(slots_N):
            raise ValueError(f"assign: one slot a key is needed, found {len(keys_N)} and {len(slots_N)}")
        bad = int(_first_not_free(self._links_S2, slots_N))
        if bad >= 0:
            raise ValueError(
                f"assign: slot {slots_N[bad]} (position {bad}) is not a free slot of 0..{self.capacity - 1}, "
                f"or is given twice. Take slots from free_slots()."
            )
        old_slots_N = np.empty(len(keys_N), np.int64)
        self._num_keys += int(_assign(self._cells_C2, self._links_S2, keys_N, slots_N, old_slots_N))
        return old_slots_N

    def items(self) -> tuple[Int64Array, Int64Array]:
        """All keys and their slots, int64 [len], in no stated order."""
        keys_N = np.empty(self._num_keys, np.int64)
        slots_N = np.empty(self._num_keys, np.int64)
        _items(self._cells_C2, keys_N, slots_N)
        return keys_N, slots_N

    def grow(self, capacity: int) -> None:
        """Make room for more keys; held keys keep their slots, the new slots are taken last.

        Raises: ValueError for a smaller capacity than now, or one too large.
        """
        _check_capacity(capacity)
        old_capacity = self.capacity
        if capacity < old_capacity:
            raise ValueError(f"grow: capacity {capacity} is below the present {old_capacity}")
        cells_C2 = empty_cells(capacity)
        fill_cells(cells_C2, *self.items())
        links_S2 = np.full((capacity + 1, 2), _IN_USE, np.int32)
        links_S2[: old_capacity + 1] = self._links_S2
        _append_free(links_S2, old_capacity, capacity)
        self._cells_C2, self._links_S2 = cells_C2, links_S2


def _check_capacity(capacity: int) -> None:
    if not 1 <= capacity <= CAPACITY_MAX:
        raise ValueError(f"capacity must be in 1..{CAPACITY_MAX}, found {capacity}")
