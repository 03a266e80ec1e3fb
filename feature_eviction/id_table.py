"""IdTable: raw id to slot for one table shard, inside a hard budget of slots.

Legend: N keys or rows of a call, M new rows, K evicted rows, S slots, R rules.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from feature_eviction.cells import lookup_cells
from feature_eviction.eviction import NUM_EVICTED, NUM_NEW, Changes, Step
from feature_eviction.id_table_state import State, restored_table, state_of
from feature_eviction.keys import Int64Array, as_keys
from feature_eviction.layout import (
    ADMITTED,
    BY_SCORE,
    EXPIRED,
    NUM_ROWS_HELD,
    REFUSED_COUNT,
    REFUSED_NO_VICTIM,
    REFUSED_PROBABILITY,
    bytes_of,
    empty_table,
)
from feature_eviction.mapping import Sightings, expire_and_admit, first_bad_sighting, touch_held
from feature_eviction.policy import TablePolicy
from feature_eviction.restoring import RowColumns, insert_best_rows
from feature_eviction.score import SCORE_EPOCH_S, SCORE_KINDS, decay_per_s

NOW_S_MAX = 2**32 - 1
OTHER_CLASSES = -1
"""Stands in TableCounters.classes for all classes without a policy of their own."""


class MapResult(NamedTuple):
    """What one map call answers and what it changed."""

    slots_N: Int64Array
    """-1 = not admitted: the shared default row, which is neither stored nor trained."""
    new_keys_M: Int64Array
    new_slots_M: Int64Array
    """Slots whose row and optimizer state must be reset before their first use, fresh or reused."""
    evicted_keys_K: Int64Array
    evicted_slots_K: Int64Array
    """Left during this call; a slot may already have its next owner."""
    batch: int
    """To be given to release() once the step that uses these slots is done."""


class TableRows(NamedTuple):
    """Rows held: columns [N]."""

    keys_N: Int64Array
    slots_N: Int64Array
    scores_N: npt.NDArray[np.float32]
    """kraken: logarithm of the score as of SCORE_EPOCH_S; lru: seconds since then; lfu: uses."""
    last_seen_s_N: Int64Array
    updates_N: npt.NDArray[np.uint32]
    """Shows since the row was admitted, at most 2^32-1."""


class ClassCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to the ids of some classes, since the table began."""

    admitted: int
    evicted: dict[str, int]
    """By reason: expired, score."""
    refused: dict[str, int]
    """By reason: probability, count, no_victim; one for each place in a call that was refused."""


class TableCounters(ClassCounters, frozen=True, kw_only=True):
    """The sums, and the same by class."""

    classes: dict[int, ClassCounters]
    """By class_id, for the classes with a policy of their own; the others under OTHER_CLASSES."""


class IdTable:
    """The scored id table of one shard. One caller at a time; map calls are numbered batches.

    All behaviour follows from the policy and the sequence of calls alone.
    """

    def __init__(self, policy: TablePolicy) -> None:
        self.policy = policy
        self._table = empty_table(policy)
        self._batch = 0
        self._released = 0
        self._decay_per_s = decay_per_s(policy.score)
        lifetimes = [one.ttl_s for one in policy.classes if one.ttl_s is not None]
        self._shortest_ttl_s = min(lifetimes, default=NOW_S_MAX)

    @property
    def num_rows(self) -> int:
        return int(self._table.cursors[NUM_ROWS_HELD])

    @property
    def bytes_used(self) -> int:
        """Equal to table_bytes(num_slots, policy=policy), at every moment."""
        return bytes_of(self._table)

    def map(
        self,
        keys_N: npt.ArrayLike,
        *,
        shows_N: npt.ArrayLike,
        positives_N: npt.ArrayLike,
        now_s: int,
    ) -> MapResult:
        """Give each key its slot: score those held, expire a few, admit the rest, evicting if needed.

        Args:
            keys_N: int64 [N]; repeated keys are legal and get one slot. shows_N: integers [N], at least 1.
            positives_N: integers [N] in 0..shows. now_s: event time, unix seconds; may run back a little.
        Raises: ValueError for other shapes or values; then nothing has changed.
        """
        if not 0 <= now_s <= NOW_S_MAX:
            raise ValueError(f"now_s must be unix seconds in 0..{NOW_S_MAX}, found {now_s}")
        keys_N = as_keys(keys_N)
        num_keys = len(keys_N)
        sightings = Sightings(
            keys_N, _counts(shows_N, num_keys), _counts(positives_N, num_keys), np.empty(num_keys, np.int64)
        )
        bad = int(first_bad_sighting(sightings.shows_N, sightings.positives_N))
        if bad >= 0:
            raise ValueError(
                f"map: position {bad}: 1 <= shows and 0 <= positives <= shows expected, found shows "
                f"{sightings.shows_N[bad]}, positives {sightings.positives_N[bad]}"
            )
        self._batch += 1
        step = self._step(now_s)
        num_missing = int(touch_held(self._table, step, sightings))
        changes = self._room_for_changes(num_missing, step.expiry_scan)
        if num_missing or step.expiry_scan:
            expire_and_admit(self._table, step, sightings, changes)
        num_new, num_evicted = int(changes.counts[NUM_NEW]), int(changes.counts[NUM_EVICTED])
        return MapResult(
            slots_N=sightings.slots_N,
            new_keys_M=changes.new_keys_M[:num_new],
            new_slots_M=changes.new_slots_M[:num_new],
            evicted_keys_K=changes.evicted_keys_K[:num_evicted],
            evicted_slots_K=changes.evicted_slots_K[:num_evicted],
            batch=self._batch,
        )

    def release(self, batch: int) -> None:
        """The steps up to this batch are done: their rows may leave again.

        Raises: ValueError for a batch that no map call has returned.
        """
        if batch > self._batch:
            raise ValueError(f"release: batch {batch} was not mapped yet; the newest is {self._batch}")
        self._released = max(self._released, batch)

    def lookup(self, keys_N: npt.ArrayLike) -> Int64Array:
        """Slots int64 [N], -1 = not held; changes nothing."""
        keys_N = as_keys(keys_N)
        slots_N = np.empty(len(keys_N), np.int64)
        lookup_cells(self._table.cells_C2, keys_N, slots_N)
        return slots_N

    def rows(self, slots_N: npt.ArrayLike | None = None) -> TableRows:
        """The rows of these slots in this order; without an argument all that are held, by slot.

        Raises: ValueError for a slot that holds no row.
        """
        held_S = ~np.isnan(self._table.records_S["score"])
        slots_N = np.flatnonzero(held_S) if slots_N is None else as_keys(slots_N, name="slots_N")
        outside_N = (slots_N < 0) | (slots_N >= len(held_S))
        if outside_N.any() or not held_S[slots_N].all():
            raise ValueError(f"rows: only slots that hold a row have one, found others in {slots_N[:8]}...")
        records_N = self._table.records_S[slots_N]
        return TableRows(
            keys_N=self._table.keys_S[slots_N],
            slots_N=slots_N.astype(np.int64),
            scores_N=records_N["score"].copy(),
            last_seen_s_N=records_N["last_seen_s"].astype(np.int64),
            updates_N=records_N["updates"].copy(),
        )

    def insert_rows(
        self,
        keys_N: npt.ArrayLike,
        *,
        scores_N: npt.ArrayLike,
        last_seen_s_N: npt.ArrayLike,
        updates_N: npt.ArrayLike,
    ) -> Int64Array:
        """Put saved rows into free slots, for a restore into other numbers of slots or shards.

        Where they do not all fit, protected rows and then those of the highest score are kept; the others
        get slot -1 and count as evicted for their score. Evicts nothing that is held.

        Returns: slots int64 [N].
        Raises: ValueError for a key given twice or held already, or values out of range; then nothing
        has changed.
        """
        columns = RowColumns.checked(
            keys_N, scores_N=scores_N, last_seen_s_N=last_seen_s_N, updates_N=updates_N
        )
        kind = SCORE_KINDS[self.policy.score.kind]
        return insert_best_rows(self._table, columns, score_kind=kind, released=self._released)

    def counters(self) -> TableCounters:
        """A snapshot of all counters."""
        counts_RK = self._table.counters_RK
        class_ids = [OTHER_CLASSES, *(one.class_id for one in self.policy.classes)]
        classes = {
            class_id: ClassCounters(
                admitted=int(counts_K[ADMITTED]), evicted=_evicted(counts_K), refused=_refused(counts_K)
            )
            for class_id, counts_K in zip(class_ids, counts_RK, strict=True)
        }
        sums_K = counts_RK.sum(axis=0)
        return TableCounters(
            admitted=int(sums_K[ADMITTED]),
            evicted=_evicted(sums_K),
            refused=_refused(sums_K),
            classes=classes,
        )

    def state(self) -> State:
        """Everything needed to go on as if nothing had happened: flat arrays, copied."""
        return state_of(self._table, self.policy, batch=self._batch, released=self._released)

    @classmethod
    def load(cls, policy: TablePolicy, state: State) -> IdTable:
        """The table that state() was taken from, for a policy of the same slots, classes and sketch.

        Raises: StateError naming the array that is damaged or belongs to another policy.
        """
        table = cls(policy)
        table._table, table._batch, table._released = restored_table(policy, state)
        return table

    def _step(self, now_s: int) -> Step:
        return Step(
            now_s=int(now_s),
            batch=self._batch % 2**32,
            num_in_flight=self._batch - self._released,
            score_kind=SCORE_KINDS[self.policy.score.kind],
            positive_weight=float(self.policy.score.positive_weight),
            aging=self._decay_per_s * (now_s - SCORE_EPOCH_S),
            victim_window=self.policy.victim_window,
            expiry_scan=self.policy.expiry_scan if self._shortest_ttl_s < NOW_S_MAX else 0,
            shortest_ttl_s=self._shortest_ttl_s,
        )

    def _room_for_changes(self, num_missing: int, expiry_scan: int) -> Changes:
        num_slots = self.policy.num_slots
        num_new_max = min(num_missing, num_slots)
        num_evicted_max = min(num_missing + expiry_scan, num_slots)
        return Changes(
            new_keys_M=np.empty(num_new_max, np.int64),
            new_slots_M=np.empty(num_new_max, np.int64),
            evicted_keys_K=np.empty(num_evicted_max, np.int64),
            evicted_slots_K=np.empty(num_evicted_max, np.int64),
            counts=np.zeros(2, np.int64),
        )


def _counts(counts_N: npt.ArrayLike, num_keys: int) -> Int64Array:
    array = as_keys(counts_N, name="shows_N and positives_N")
    if len(array) != num_keys:
        raise ValueError(f"shows_N and positives_N must be [{num_keys}] as keys_N is, found [{len(array)}]")
    return array


def _evicted(counts_K: Int64Array) -> dict[str, int]:
    return {"expired": int(counts_K[EXPIRED]), "score": int(counts_K[BY_SCORE])}


def _refused(counts_K: Int64Array) -> dict[str, int]:
    return {
        "probability": int(counts_K[REFUSED_PROBABILITY]),
        "count": int(counts_K[REFUSED_COUNT]),
        "no_victim": int(counts_K[REFUSED_NO_VICTIM]),
    }
