"""The C++ id table (native/id_table.cpp) behind ctypes; built when a benchmark asks for it."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction import TablePolicy

SOURCE = Path(__file__).parent / "native" / "id_table.cpp"
COMPILER = "g++"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


def compiler_missing() -> str | None:
    """Why there is no native table here; None: there is one."""
    return None if shutil.which(COMPILER) else f"no {COMPILER} on this machine"


def build() -> ctypes.CDLL:
    """Compile into a temporary folder and load; the loaded library outlives its file."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "id_table.so"
        subprocess.run([COMPILER, *FLAGS, "-o", str(library), str(SOURCE)], check=True)
        functions = ctypes.CDLL(str(library))
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "table_new": (pointer, (number, number, number, number, number, real, real)),
        "table_free": (None, (pointer,)),
        "table_bytes": (number, (pointer,)),
        "table_lookup": (None, (pointer, pointer, number, pointer)),
        "table_map": (
            None,
            (pointer, pointer, pointer, pointer, number, number, pointer, pointer, number, pointer, pointer),
        ),
        "table_delete": (None, (pointer, pointer, number, pointer)),
        "table_load": (number, (pointer, pointer, pointer, pointer, pointer, number)),
    }
    for name, (result, arguments) in signatures.items():
        getattr(functions, name).restype = result
        getattr(functions, name).argtypes = arguments
    return functions


class NativeTable:
    """As much of IdTable as native/id_table.cpp has, with the same arrays going in and out.

    The score constants and the window are the policy's; classes and admission are not looked at. Like the
    policy at victim_window >= num_slots, it then evicts exactly the lowest scores.
    """

    def __init__(self, functions: ctypes.CDLL, policy: TablePolicy, *, ttl_s: int) -> None:
        self._functions = functions
        # Policies without the property free one slot at a time.
        victims_at_once = int(getattr(policy, "victims_at_once", 1))
        self._num_more = policy.expiry_scan + victims_at_once
        decay_per_s = -math.log1p(-policy.score.decay_per_day) / 86_400.0
        self._table = functions.table_new(
            policy.num_slots,
            policy.victim_window,
            victims_at_once,
            policy.expiry_scan,
            ttl_s,
            decay_per_s,
            policy.score.positive_weight,
        )
        if not self._table:
            raise MemoryError(f"native table: no memory for {policy.num_slots} slots; choose fewer")

    def close(self) -> None:
        if self._table:
            self._functions.table_free(self._table)
        self._table = None

    @property
    def bytes_used(self) -> int:
        return int(self._functions.table_bytes(self._table))

    def lookup(self, keys_N: Int64Array) -> Int64Array:
        slots_N = np.empty(len(keys_N), np.int64)
        self._functions.table_lookup(self._table, keys_N.ctypes.data, len(keys_N), slots_N.ctypes.data)
        return slots_N

    def map(
        self, keys_N: Int64Array, *, shows_N: Int32Array, positives_N: Int32Array, now_s: int
    ) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Slots [N]; new keys [M] and evicted keys [K]."""
        num_keys = len(keys_N)
        slots_N = np.full(num_keys, -1, np.int64)
        changed_4W = np.empty((4, num_keys + self._num_more), np.int64)
        missing_N = np.empty(num_keys, np.int64)
        counts_2 = np.zeros(2, np.int64)
        self._functions.table_map(
            self._table,
            keys_N.ctypes.data,
            shows_N.ctypes.data,
            positives_N.ctypes.data,
            num_keys,
            now_s,
            slots_N.ctypes.data,
            changed_4W.ctypes.data,
            changed_4W.shape[1],
            missing_N.ctypes.data,
            counts_2.ctypes.data,
        )
        return slots_N, changed_4W[0, : counts_2[0]], changed_4W[2, : counts_2[1]]

    def delete(self, keys_N: Int64Array) -> Int64Array:
        """The slots that became free, -1 where absent."""
        slots_N = np.empty(len(keys_N), np.int64)
        self._functions.table_delete(self._table, keys_N.ctypes.data, len(keys_N), slots_N.ctypes.data)
        return slots_N

    def load(
        self,
        keys_N: Int64Array,
        *,
        scores_N: npt.NDArray[np.float32],
        last_seen_s_N: npt.NDArray[np.uint32],
        updates_N: npt.NDArray[np.uint32],
    ) -> int:
        """Saved rows into an empty table; how many went in."""
        pointers = [column.ctypes.data for column in (keys_N, scores_N, last_seen_s_N, updates_N)]
        return int(self._functions.table_load(self._table, *pointers, len(keys_N)))
