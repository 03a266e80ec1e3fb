"""The contestants of benchmarks.id_table behind one small interface; whoever lacks a package is named.

All are made full of the same int64 keys and then get the same calls. `map` gives every key a slot: scoring,
admitting and evicting as each of them understands it. `cases` says what a contestant can do.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psutil

from benchmarks import native_table
from benchmarks.mch_peer import Mch
from feature_eviction import ClassPolicy, IdTable, TablePolicy

CLASS_ID = 7
TTL_S = 30 * 86_400
START_S = 1_750_000_000
FILL_BLOCK = 1 << 17
DICT_BYTES_PER_ID = 240
"""Two int objects, the dict's entry while it grows, and the queue's; `delete` works on a copy."""

Keys = npt.NDArray[np.int64]


class Peer(Protocol):
    cases: frozenset[str]
    calls_per_round: int | None
    """Where its work repeats after so many calls; None: each call is like the others."""

    def lookup(self, keys_N: Keys) -> object: ...
    def map(self, keys_N: Keys) -> object: ...
    def deleter(self) -> Callable[[Keys], object]: ...
    def loader(self) -> Callable[[], object]:
        """Puts a saved table's rows into a new one."""

    def bytes_used(self) -> int: ...
    def close(self) -> None: ...


def policy_of(num_slots: int) -> TablePolicy:
    """What a trainer would run: Kraken's score, one class with a lifetime."""
    return TablePolicy(num_slots=num_slots, classes=(ClassPolicy(class_id=CLASS_ID, ttl_s=TTL_S),))


class Sightings:
    """The columns beside the keys: a second passes with each call, a fifth of the sightings is positive."""

    def __init__(self) -> None:
        self._now_s = START_S
        self._shows_N = np.ones(FILL_BLOCK, np.int32)
        self._positives_N = (np.arange(FILL_BLOCK) % 5 == 0).astype(np.int32)

    def next(self, num_keys: int) -> dict[str, Any]:
        self._now_s += 1
        return {
            "shows_N": self._shows_N[:num_keys],
            "positives_N": self._positives_N[:num_keys],
            "now_s": self._now_s,
        }


class Ours:
    """IdTable: the one place where this benchmark touches its API."""

    cases = frozenset({"lookup", "map", "delete", "load", "load_rows"})
    calls_per_round: int | None = None

    def __init__(self, keys_S: Keys) -> None:
        self._policy = policy_of(len(keys_S))
        self._table = IdTable(self._policy)
        self._sightings = Sightings()
        self.num_new = 0
        for start in range(0, len(keys_S), FILL_BLOCK):
            self.map(keys_S[start : start + FILL_BLOCK])

    def lookup(self, keys_N: Keys) -> object:
        return self._table.lookup(keys_N)

    def map(self, keys_N: Keys) -> object:
        result = self._table.map(keys_N, **self._sightings.next(len(keys_N)))
        self._table.release(result.batch)
        self.num_new += len(result.new_keys_M)
        return result

    def deleter(self) -> Callable[[Keys], object]:
        """From a copy, so that the table stays full for what comes after."""
        table = IdTable.load(self._policy, self._table.state())
        # Compiled on its first call, outside of the clock.
        table.delete(np.zeros(0, np.int64), now_s=START_S)
        return partial(table.delete, now_s=START_S)

    def loader(self) -> Callable[[], object]:
        """The exact state, as a restart reads it."""
        state = self._table.state()
        return lambda: IdTable.load(self._policy, state)

    def row_loader(self) -> Callable[[], object]:
        """Rows as columns into a table of any size, as a change of shards reads them."""
        rows = self._table.rows()
        return lambda: IdTable(self._policy).insert_rows(
            rows.keys_N, scores_N=rows.scores_N, last_seen_s_N=rows.last_seen_s_N, updates_N=rows.updates_N
        )

    def bytes_used(self) -> int:
        return self._table.bytes_used

    def close(self) -> None:
        pass


class Native:
    """native/id_table.cpp."""

    cases = Ours.cases
    calls_per_round: int | None = None

    def __init__(self, keys_S: Keys) -> None:
        self._functions = native_table.build()
        self._policy = policy_of(len(keys_S))
        self._table = self._empty()
        self._keys_S = keys_S
        self._sightings = Sightings()
        for start in range(0, len(keys_S), FILL_BLOCK):
            self.map(keys_S[start : start + FILL_BLOCK])

    def _empty(self) -> native_table.NativeTable:
        return native_table.NativeTable(self._functions, self._policy, ttl_s=TTL_S)

    def lookup(self, keys_N: Keys) -> object:
        return self._table.lookup(keys_N)

    def map(self, keys_N: Keys) -> object:
        return self._table.map(keys_N, **self._sightings.next(len(keys_N)))

    def deleter(self) -> Callable[[Keys], object]:
        return self._table.delete

    def loader(self) -> Callable[[], object]:
        num_rows = len(self._keys_S)
        columns: dict[str, Any] = {
            "scores_N": np.zeros(num_rows, np.float32),
            "last_seen_s_N": np.full(num_rows, START_S, np.uint32),
            "updates_N": np.ones(num_rows, np.uint32),
        }

        def load() -> None:
            table = self._empty()
            table.load(self._keys_S, **columns)
            table.close()

        return load

    def bytes_used(self) -> int:
        return self._table.bytes_used

    def close(self) -> None:
        self._table.close()


class Faiss:
    """faiss.MapInt64ToInt64: fixed size, no score, nothing ever leaves."""

    cases = frozenset({"lookup", "load"})
    calls_per_round: int | None = None

    def __init__(self, keys_S: Keys) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        capacity = 1 << int(len(keys_S) * 5 // 4).bit_length()
        self._make = partial(faiss.MapInt64ToInt64, capacity)
        self._keys_S, self._slots_S = keys_S, np.arange(len(keys_S), dtype=np.int64)
        self._map = self._make()
        self._map.add(keys_S, self._slots_S)

    def lookup(self, keys_N: Keys) -> object:
        return self._map.lookup(keys_N)

    def map(self, keys_N: Keys) -> object:
        raise NotImplementedError("MapInt64ToInt64 evicts nothing")

    def deleter(self) -> Callable[[Keys], object]:
        raise NotImplementedError("MapInt64ToInt64 has no delete")

    def loader(self) -> Callable[[], object]:
        return lambda: self._make().add(self._keys_S, self._slots_S)

    def bytes_used(self) -> int:
        return int(self._map.tab.nbytes)

    def close(self) -> None:
        pass


class Dict:
    """The least a dict can do for the same answer: no score, the oldest id leaves."""

    cases = frozenset({"lookup", "map", "delete", "load"})
    calls_per_round: int | None = None

    def __init__(self, keys_S: Keys) -> None:
        self._slots = dict(zip(keys_S.tolist(), range(len(keys_S)), strict=True))
        self._oldest = deque(self._slots, maxlen=len(keys_S))
        self._keys_S = keys_S

    def lookup(self, keys_N: Keys) -> object:
        slots = self._slots
        return np.array([slots.get(key, -1) for key in keys_N.tolist()])

    def map(self, keys_N: Keys) -> object:
        slots, oldest = self._slots, self._oldest
        slots_N = np.empty(len(keys_N), np.int64)
        for i, key in enumerate(keys_N.tolist()):
            slot = slots.get(key, -1)
            if slot < 0:
                slot = slots[key] = slots.pop(oldest.popleft())
                oldest.append(key)
            slots_N[i] = slot
        return slots_N

    def deleter(self) -> Callable[[Keys], object]:
        slots = dict(self._slots)
        return lambda keys_N: [slots.pop(key, -1) for key in keys_N.tolist()]

    def loader(self) -> Callable[[], object]:
        keys_S, slots_S = self._keys_S, np.arange(len(self._keys_S))
        return lambda: dict(zip(keys_S.tolist(), slots_S.tolist(), strict=True))

    def bytes_used(self) -> int:
        an_int = sys.getsizeof(1 << 52)
        return sys.getsizeof(self._slots) + len(self._slots) * 2 * an_int + sys.getsizeof(self._oldest)

    def close(self) -> None:
        pass


PEERS: dict[str, Callable[[Keys], Peer]] = {
    "native": Native,
    "mch_lfu_1": partial(Mch, policy="LFU_EvictionPolicy", interval=1),
    "mch_lfu_10": partial(Mch, policy="LFU_EvictionPolicy", interval=10),
    "mch_dlfu_1": partial(Mch, policy="DistanceLFU_EvictionPolicy", interval=1),
    "mch_dlfu_10": partial(Mch, policy="DistanceLFU_EvictionPolicy", interval=10),
    "faiss": Faiss,
    "dict": Dict,
}


def why_absent(name: str, num_rows: int) -> str | None:
    """None: the contestant can start."""
    package = {"mch": "torchrec", "faiss": "faiss"}.get(name.split("_")[0])
    if package and find_spec(package) is None:
        return f"package {package} is not installed (pip install .[bench])"
    if name == "native":
        return native_table.compiler_missing()
    needed = 2 * num_rows * DICT_BYTES_PER_ID
    if name == "dict" and needed > psutil.virtual_memory().available:
        return f"{num_rows:,} ids need {needed / 2**30:.0f} GiB of free memory"
    return None
