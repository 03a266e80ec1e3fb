"""Tables of one budget under different policies, for benchmarks.eviction_quality.

Kraken, show/click, LRU, LFU, DistanceLFU and TTL are IdTable's own scores, as far as it knows them; a random
victim and a hashed table of equal memory are here to compare with. Legend: U distinct keys of a call, M new
rows, K evicted rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.factorisation import ROW_BYTES
from feature_eviction import (
    AdmissionConfig,
    ClassPolicy,
    IdTable,
    ScoreConfig,
    SlotMap,
    TablePolicy,
    UniqueKeys,
    owner_of,
    table_bytes,
)

USER_CLASS, ITEM_CLASS = 1, 2
SCORE_KINDS = ("kraken", "show_click", "lru", "lfu", "distance_lfu", "ttl_only")
VARIANTS: dict[str, dict[str, Any]] = {
    "kraken_count2": {"min_count": 2},
    "kraken_decay50": {"decay_per_day": 0.5},
}
"""Kraken's score with one thing changed: a row only at the second sighting; half of the score lost in a day
instead of a tenth, for items that live for days."""
TTL_SHARE = 0.25
"""ttl_only: a row's lifetime as a share of the stream's span."""

Int64Array = npt.NDArray[np.int64]
ID_BITS = 52
NO_KEYS = np.zeros(0, np.int64)


class Mapped(NamedTuple):
    slots_U: Int64Array
    """-1: the default row."""
    new_keys_M: Int64Array
    new_slots_M: Int64Array
    evicted_keys_K: Int64Array


class Setting(NamedTuple):
    """What a table may know when it is made."""

    num_slots: int
    span_s: int
    """From the stream's first event to its last."""
    seed: int
    keys_of_calls: Sequence[Int64Array]
    """All that is to come; for Foresight alone. The lower 52 bits are dense and distinct."""


class PolicyTable(Protocol):
    num_slots: int
    num_bytes: int
    """Rows and all that is kept to find and judge them."""
    counts_hits: bool

    def map(self, unique: UniqueKeys, now_s: int) -> Mapped: ...


class Scored:
    """IdTable with one of its scores: the one place where this benchmark touches it."""

    counts_hits = True

    def __init__(self, setting: Setting, *, kind: str, min_count: int = 1, **score: float) -> None:
        num_slots = setting.num_slots
        ttl_s = max(1, int(TTL_SHARE * setting.span_s)) if kind == "ttl_only" else None
        admission = AdmissionConfig(kind="count" if min_count > 1 else "always", min_count=min_count)
        policy = TablePolicy(
            num_slots=num_slots,
            score=_score_config(kind, **score),
            classes=tuple(
                ClassPolicy(class_id=one, ttl_s=ttl_s, admission=admission)
                for one in (USER_CLASS, ITEM_CLASS)
            ),
            # The sketch counts into the memory: a counter or two a slot, in each of its rows.
            count_sketch_width=1 << num_slots.bit_length(),
            seed=setting.seed,
        )
        self._table = IdTable(policy)
        self.num_slots = num_slots
        self.num_bytes = self._table.bytes_used + num_slots * ROW_BYTES

    def map(self, unique: UniqueKeys, now_s: int) -> Mapped:
        result = self._table.map(
            unique.keys_U, shows_N=unique.shows_U, positives_N=unique.positives_U, now_s=now_s
        )
        self._table.release(result.batch)
        return Mapped(result.slots_N, result.new_keys_M, result.new_slots_M, result.evicted_keys_K)


class Unscored:
    """A table of the same size that chooses its victims in another way: a reference for IdTable."""

    counts_hits = True

    def __init__(self, setting: Setting) -> None:
        self.num_slots = setting.num_slots
        self.num_bytes = table_bytes(self.num_slots) + self.num_slots * ROW_BYTES
        self._slots = SlotMap(self.num_slots)
        self._key_of_slot = np.zeros(self.num_slots, np.int64)

    def map(self, unique: UniqueKeys, now_s: int) -> Mapped:
        slots_U = self._slots.lookup(unique.keys_U)
        new_keys_M = unique.keys_U[slots_U < 0]
        num_victims = max(0, len(self._slots) + len(new_keys_M) - self.num_slots)
        may_leave = np.ones(self.num_slots, np.bool_)
        may_leave[slots_U[slots_U >= 0]] = False
        may_leave[self._slots.free_slots(self.num_slots - len(self._slots))] = False
        candidates = np.flatnonzero(may_leave)
        chosen = self._choose(candidates, min(num_victims, len(candidates)))
        evicted_keys_K = self._key_of_slot[chosen]
        self._slots.delete(evicted_keys_K)
        new_keys_M = new_keys_M[: self.num_slots - len(self._slots)]
        new_slots_M, _ = self._slots.upsert(new_keys_M)
        self._key_of_slot[new_slots_M] = new_keys_M
        return Mapped(self._slots.lookup(unique.keys_U), new_keys_M, new_slots_M, evicted_keys_K)

    def _choose(self, candidates: Int64Array, num: int) -> Int64Array:
        raise NotImplementedError


class Random(Unscored):
    """Any row may leave that the call does not use."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._generator = np.random.default_rng(setting.seed)

    def _choose(self, candidates: Int64Array, num: int) -> Int64Array:
        return self._generator.choice(candidates, num, replace=False)


class Foresight(Unscored):
    """The row that is needed last leaves: no policy that admits every id at sight has more hits.

    A live stream does not say what comes, so it is a bound and no contestant.
    Source: Belady, IBM Systems Journal 1966.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._next_uses = _next_uses(setting.keys_of_calls)
        self._next_use_of_id = np.zeros(1 + max(int(_ids(k).max()) for k in setting.keys_of_calls), np.int64)
        self._call = 0

    def map(self, unique: UniqueKeys, now_s: int) -> Mapped:
        self._next_use_of_id[_ids(unique.keys_U)] = self._next_uses[self._call]
        self._call += 1
        return super().map(unique, now_s)

    def _choose(self, candidates: Int64Array, num: int) -> Int64Array:
        needed_next = self._next_use_of_id[_ids(self._key_of_slot[candidates])]
        if not num:
            return candidates[:0]
        return candidates[np.argpartition(-needed_next, num - 1)[:num]]


def _ids(keys_U: Int64Array) -> Int64Array:
    return keys_U & ((1 << ID_BITS) - 1)


def _next_uses(keys_of_calls: Sequence[Int64Array]) -> list[Int64Array]:
    """For each key of each call, the number of the next call that has it; their count where none does."""
    num_calls = len(keys_of_calls)
    next_of_id = np.full(1 + max(int(_ids(keys_U).max()) for keys_U in keys_of_calls), num_calls, np.int64)
    backwards = []
    for call in range(num_calls - 1, -1, -1):
        ids_U = _ids(keys_of_calls[call])
        backwards.append(next_of_id[ids_U])
        next_of_id[ids_U] = call
    return backwards[::-1]


class Hashed:
    """No ids at all: a row is a hash of the key. All the memory of the others goes into rows."""

    counts_hits = False

    def __init__(self, setting: Setting) -> None:
        budget = table_bytes(setting.num_slots) + setting.num_slots * ROW_BYTES
        self.num_slots = budget // ROW_BYTES
        self.num_bytes = self.num_slots * ROW_BYTES

    def map(self, unique: UniqueKeys, now_s: int) -> Mapped:
        slots_U = owner_of(unique.keys_U, num_owners=self.num_slots).astype(np.int64)
        return Mapped(slots_U, NO_KEYS, NO_KEYS, NO_KEYS)


MakeTable = Callable[[Setting], PolicyTable]


def known_policies() -> tuple[dict[str, MakeTable], list[str]]:
    """The policies that can run, and the names of the scores that this IdTable does not know."""
    policies: dict[str, MakeTable] = {}
    unknown = []
    for kind in SCORE_KINDS:
        try:
            _score_config(kind)
        except msgspec.ValidationError:
            unknown.append(kind)
        else:
            policies[kind] = partial(Scored, kind=kind)
    for name, changed in VARIANTS.items():
        policies[name] = partial(Scored, kind="kraken", **changed)
    return {**policies, "random": Random, "hashed": Hashed, "foresight": Foresight}, unknown


def _score_config(kind: str, **score: float) -> ScoreConfig:
    """Through convert, which checks the name; the constructor does not."""
    return msgspec.convert({"kind": kind, **score}, ScoreConfig)
