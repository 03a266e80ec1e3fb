"""Which rows changed since serving last had them: taken for a version, cleared only by its ack.

One ChangedRows a table and rank. It is columns over the local slots and one set of deleted keys, so
its size is bounded however long the parameter server is away and however many versions fail: a slot
changes many times but is pending once, and only a key that serving holds, or that the version on its way
carries, can be pending as deleted.
Shapes: C local slots, N rows of one version, M deletes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from feature_eviction import TableRows
from param_server.client import NEVER_PUSHED_S, ChangedColumns, RulesConfig, decide, record_push

BYTES_PER_SLOT = 7 * 4 + 2


@dataclass(frozen=True, slots=True)
class Clocks:
    """The two clocks of a take, in unix seconds: rules run on the first, sightings on the second."""

    now_s: int
    """The publishing clock."""
    event_time_s: int
    """The newest event that training has seen."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one version is to carry of one table."""

    full: bool
    slots_N: npt.NDArray[np.int64]
    keys_N: npt.NDArray[np.int64]
    scores_N: npt.NDArray[np.float32]
    last_seen_s_N: npt.NDArray[np.int64]
    """In event time."""
    updates_N: npt.NDArray[np.uint32]
    """Updates of each row that this version brings; an ack takes away these and no later ones."""
    deleted_keys_M: npt.NDArray[np.int64]
    held_back: dict[str, int]
    num_changed: int
    """Rows with pending updates when they were taken, sent or held back."""


class ChangedRows:
    """Changed and deleted rows of one table on this rank, with take and ack.

    Args of the constructor: table: its name, by which rules may differ.
    """

    def __init__(self, num_slots: int, *, table: str = "") -> None:
        self._table = table
        self._updates_C = np.zeros(num_slots, np.uint32)
        """Updates that serving has not got; above 0 = pending."""
        self._gathered_C = np.zeros(num_slots, np.uint32)
        """Those of them that the rules count: gathering may begin anew, pending never ends."""
        self._gather_start_s_C = np.zeros(num_slots, np.uint32)
        self._window_start_s_C = np.zeros(num_slots, np.uint32)
        self._last_pushed_s_C = np.zeros(num_slots, np.uint32)
        self._pushes_C = np.zeros(num_slots, np.uint32)
        self._pushed_score_C = np.zeros(num_slots, np.float32)
        """The score that the row had when serving's value of it was taken; 0 = serving has none."""
        self._serving_C = np.zeros(num_slots, np.bool_)
        """Serving holds a row under the key that owns the slot."""
        self._taken_C = np.zeros(num_slots, np.bool_)
        """The outstanding version carries this slot's row, and the slot has the same owner still."""
        self._deleted_keys: dict[int, None] = {}
        self._deleted_since_take: dict[int, bool] = {}
        """Key -> serving held it at the take already; else it gets it with the outstanding version alone."""
        self._outstanding: Taken | None = None

    @property
    def num_pending(self) -> int:
        return (
            int(np.count_nonzero(self._updates_C)) + len(self._deleted_keys) + len(self._deleted_since_take)
        )

    def touch(self, slots_N: npt.NDArray[np.int64]) -> None:
        """Count one update of each slot, however often the step has it. Args: slots_N: local slots.

        Takes no time: training runs on event time, the rules on the publishing clock. Gathering begins
        when a take first sees the row.
        """
        # An index that stands there twice is raised once: numpy reads all, adds, and writes all.
        self._gathered_C[slots_N] += 1
        self._updates_C[slots_N] += 1

    def evict(self, keys_K: npt.NDArray[np.int64], slots_K: npt.NDArray[np.int64]) -> None:
        """Forget the rows of evicted keys; those that serving holds are pending as deletes."""
        serving_K = self._serving_C[slots_K]
        if self._outstanding is None:
            self._deleted_keys.update(dict.fromkeys(keys_K[serving_K].tolist()))
        else:
            # Serving will hold a taken row, too, once the version that is on its way has arrived.
            held_K = serving_K | self._taken_C[slots_K]
            self._deleted_since_take.update(
                zip(keys_K[held_K].tolist(), serving_K[held_K].tolist(), strict=True)
            )
        for column_C in (
            self._updates_C,
            self._gathered_C,
            self._gather_start_s_C,
            self._window_start_s_C,
            self._last_pushed_s_C,
            self._pushes_C,
            self._pushed_score_C,
            self._serving_C,
            self._taken_C,
        ):
            column_C[slots_K] = 0

    def take(
        self,
        rows_of: Callable[[npt.NDArray[np.int64]], TableRows],
        *,
        rules: RulesConfig,
        clocks: Clocks,
    ) -> Taken:
        """The changed rows that the rules let through, and every delete; nothing is cleared.

        Args: rows_of: what the id table knows of slots that are owned.
        """
        now_s = clocks.now_s
        slots_V = np.flatnonzero(self._updates_C)
        begun_V = (self._gathered_C[slots_V] > 0) & (self._gather_start_s_C[slots_V] == 0)
        self._gather_start_s_C[slots_V[begun_V]] = now_s
        # Of all that changed only where a rule asks: else of the rows that go.
        asks = rules.needs_keys or rules.needs_scores or rules.needs_last_seen
        rows_V = rows_of(slots_V) if asks else None
        decision = decide(
            self._columns(slots_V, rows_V, clocks=clocks),
            rules=rules,
            now_s=now_s,
            table=self._table,
            keys_N=None if rows_V is None else rows_V.keys_N,
        )
        self._gathered_C[slots_V[decision.restart_N]] = 0
        self._gather_start_s_C[slots_V[decision.restart_N]] = 0
        rows = rows_of(slots_V[decision.send_N])
        return self._start(
            Taken(
                full=False,
                slots_N=rows.slots_N,
                keys_N=rows.keys_N,
                scores_N=rows.scores_N,
                last_seen_s_N=rows.last_seen_s_N,
                updates_N=self._updates_C[rows.slots_N],
                deleted_keys_M=self._deletes_beside(rows.keys_N),
                held_back=decision.num_held_back(),
                num_changed=len(slots_V),
            )
        )

    def take_full(self, rows: TableRows) -> Taken:
        """Every live row; rules do not apply and deletes are implied."""
        return self._start(
            Taken(
                full=True,
                slots_N=rows.slots_N,
                keys_N=rows.keys_N,
                scores_N=rows.scores_N,
                last_seen_s_N=rows.last_seen_s_N,
                updates_N=self._updates_C[rows.slots_N],
                deleted_keys_M=np.zeros(0, np.int64),
                held_back={},
                num_changed=int(np.count_nonzero(self._updates_C)),
            )
        )

    def withhold(self, out_N: npt.NDArray[np.bool_], *, reason: str) -> Taken:
        """Leave rows out of the version just taken: they stay pending, held back for that reason.

        Args: out_N: which of the taken rows. To be called before training goes on.
        """
        taken = self._outstanding
        assert taken is not None, "only a take can be withheld from"
        out_slots_K = taken.slots_N[out_N]
        self._taken_C[out_slots_K] = False
        # A full version takes rows that did not change, too: one that stays out is then missing at serving.
        for column_C in (self._updates_C, self._gathered_C):
            column_C[out_slots_K] = np.maximum(column_C[out_slots_K], 1)
        stay_N = ~out_N
        keys_N = taken.keys_N[stay_N]
        self._outstanding = replace(
            taken,
            slots_N=taken.slots_N[stay_N],
            keys_N=keys_N,
            scores_N=taken.scores_N[stay_N],
            last_seen_s_N=taken.last_seen_s_N[stay_N],
            updates_N=taken.updates_N[stay_N],
            deleted_keys_M=taken.deleted_keys_M if taken.full else self._deletes_beside(keys_N),
            held_back=taken.held_back | {reason: int(np.count_nonzero(out_N))},
        )
        return self._outstanding

    def _deletes_beside(self, keys_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """A key that left, came back and is sent now is simply replaced."""
        deleted_keys_M = np.fromiter(self._deleted_keys, np.int64, len(self._deleted_keys))
        return _without(deleted_keys_M, keys_N)

    def _columns(
        self, slots_N: npt.NDArray[np.int64], rows: TableRows | None = None, *, clocks: Clocks | None = None
    ) -> ChangedColumns:
        """Args: rows, clocks: for the rules that ask for scores and sightings."""
        scores: dict[str, npt.NDArray[np.float32]] = {}
        last_seen_s_N = None
        if rows is not None and clocks is not None:
            scores["score_N"] = rows.scores_N
            scores["gathered_score_N"] = rows.scores_N - self._pushed_score_C[slots_N]
            # As long ago on the rules' clock as it is in event time, which may run years behind.
            last_seen_s_N = rows.last_seen_s_N + (clocks.now_s - clocks.event_time_s)
        return ChangedColumns(
            updates_N=self._gathered_C[slots_N],
            gather_start_s_N=self._gather_start_s_C[slots_N].astype(np.int64),
            pushes_N=self._pushes_C[slots_N],
            window_start_s_N=self._window_start_s_C[slots_N].astype(np.int64),
            last_pushed_s_N=np.where(
                self._serving_C[slots_N], self._last_pushed_s_C[slots_N].astype(np.int64), NEVER_PUSHED_S
            ),
            last_seen_s_N=last_seen_s_N,
            **scores,
        )

    def _start(self, taken: Taken) -> Taken:
        assert self._outstanding is None, "one version at a time is on its way"
        self._outstanding = taken
        self._taken_C[taken.slots_N] = True
        return taken

    def ack(self, *, rules: RulesConfig, now_s: int) -> None:
        """The outstanding version is durable: its updates are no longer pending."""
        taken = self._outstanding
        assert taken is not None, "an ack needs a take before it"
        self._outstanding = None
        # A key deleted again after the take stays pending, even if this version carried a delete of it.
        self._deleted_keys, self._deleted_since_take = dict.fromkeys(self._deleted_since_take), {}
        if taken.full:
            self._serving_C[:] = False
            self._pushed_score_C[:] = 0
        # A slot that changed its owner meanwhile is not ours to clear: `evict` noted the delete.
        mine_N = self._taken_C[taken.slots_N]
        slots_N = taken.slots_N[mine_N]
        self._taken_C[:] = False
        self._pushes_C[slots_N], self._window_start_s_C[slots_N] = record_push(
            self._columns(slots_N), rules=rules, now_s=now_s, table=self._table, keys_N=taken.keys_N[mine_N]
        )
        self._pushed_score_C[slots_N] = taken.scores_N[mine_N]
        self._updates_C[slots_N] -= taken.updates_N[mine_N]
        self._gathered_C[slots_N] = self._updates_C[slots_N]
        self._gather_start_s_C[slots_N] = np.where(self._updates_C[slots_N] > 0, now_s, 0)
        self._serving_C[slots_N] = True
        self._last_pushed_s_C[slots_N] = now_s

    def abandon(self) -> None:
        """The outstanding version did not become durable: everything stays pending.

        If it did all the same, serving holds rows that nothing here knows of: the next version must be full.
        """
        self._outstanding = None
        self._taken_C[:] = False
        self._deleted_keys.update(
            dict.fromkeys(key for key, serving in self._deleted_since_take.items() if serving)
        )
        self._deleted_since_take = {}


def _without(keys_M: npt.NDArray[np.int64], others_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The keys that are not among the others, ascending; both distinct.

    np.setdiff1d makes the others distinct first, in a hash table that misses the cache at each of them: ten
    times as long, while training stands still.
    """
    keys_M = np.sort(keys_M)
    if not len(others_N):
        return keys_M
    others_N = np.sort(others_N)
    place_M = np.minimum(np.searchsorted(others_N, keys_M), len(others_N) - 1)
    left_K: npt.NDArray[np.int64] = keys_M[others_N[place_M] != keys_M]
    return left_K
