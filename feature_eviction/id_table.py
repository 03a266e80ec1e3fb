"""IdTable: raw id to slot for one table shard, inside a hard budget of slots.

Legend: N keys or rows of a call, M new rows, K evicted rows, S slots, R rules.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from feature_eviction.answers import (
    OTHER_CLASSES,
    ClassCounters,
    Deleted,
    MapResult,
    TableCounters,
    TableRows,
    Why,
)
from feature_eviction.errors import InFlightError
from feature_eviction.eviction import SHRINK_PASSES
from feature_eviction.id_table_state import InFlight, State, restored_table, state_of
from feature_eviction.keys import Int64Array, as_keys, class_of
from feature_eviction.layout import (
    ADMITTED,
    BAD_SCORES,
    EVICTED_REASONS,
    NUM_REMEMBERED,
    NUM_ROWS_HELD,
    REFUSED_REASONS,
    ROW_LIMIT,
    bytes_of,
    empty_table,
    wheel_of,
)
from feature_eviction.leaving import NUM_EVICTED, NUM_NEW, Changes, Step, set_all_in_flight
from feature_eviction.mapping import Sightings, delete_rows, first_bad_sighting, map_sightings
from feature_eviction.policy import TablePolicy
from feature_eviction.restoring import RowColumns, insert_best_rows
from feature_eviction.row_cells import lookup_rows, rows_of_slots
from feature_eviction.user_score import Score, resolve_score

NOW_S_MAX = 2**32 - 1
IN_FLIGHT_MAX = 256
"""Batches mapped and not released; their slots are remembered until they are."""


class IdTable:
    """The scored id table of one shard; map calls are numbered batches.

    All behaviour follows from the policy and the sequence of calls alone.

    Threads: calls that change the table (map, release, delete, limit_rows, insert_rows) want it for
    themselves; lookup, rows, why, counters and state may run beside each other, beside a change under the
    caller's lock only. No call holds the interpreter's lock in its loops, so tables, or shards by
    owner_of, run in parallel on threads of their own.
    """

    def __init__(self, policy: TablePolicy, *, score: Score | None = None) -> None:
        """Args: score: a function with the decorator @score, used instead of policy.score.

        Raises: ScoreError with file and line for a score that cannot be used.
        """
        self.policy = policy
        self._score = resolve_score(policy.score, score)
        self._score_name = policy.score.kind if score is None else score.name
        self._table = empty_table(policy)
        self._batch = 0
        self._released = 0
        self._in_flight: InFlight = {}
        self._tick_s, _ = wheel_of(policy)

    @property
    def num_rows(self) -> int:
        return int(self._table.cursors[NUM_ROWS_HELD])

    @property
    def newest_batch(self) -> int:
        """The number of the last map call; 0 before the first."""
        return self._batch

    @property
    def bytes_used(self) -> int:
        """Equal to table_bytes(num_slots, policy=policy), at every moment."""
        return bytes_of(self._table)

    @property
    def expiry_resolution_s(self) -> int:
        """A row whose lifetime is over leaves in the first call that is so much later or earlier.

        The wheel does not turn back with event time: a row admitted behind the newest time, whose lifetime
        would end behind it too, leaves in the first call after that newest time.
        """
        return self._tick_s

    def map(
        self,
        keys_N: npt.ArrayLike,
        *,
        shows_N: npt.ArrayLike,
        positives_N: npt.ArrayLike,
        now_s: int,
    ) -> MapResult:
        """Give each key its slot: expire what is due, score those held, admit the rest, evicting if needed.

        The slots are in flight, and their rows cannot leave, until release() is told of the batch. A call
        protects its own ids from each other; where none has to leave for another (there is room), the same
        stream in calls of other lengths ends in the same table, bit for bit.

        Args:
            keys_N: int64 [N]; repeated keys are legal and get one slot. shows_N: integers [N], at least 1.
            positives_N: integers [N] in 0..shows. now_s: event time, unix seconds; may run back a little.
        Raises: ValueError for other shapes or values, InFlightError for 256 unreleased batches; then nothing
            has changed.
        """
        _check_now(now_s)
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
        if len(self._in_flight) >= IN_FLIGHT_MAX:
            raise InFlightError(
                f"map: {IN_FLIGHT_MAX} batches since {self._released} are not released, so that their rows "
                f"cannot leave. Call release(batch) when the step of a batch is done."
            )
        step = self._step(now_s)
        changes = self._room_for_changes(num_keys)
        map_sightings(self._table, step, sightings, changes)
        self._batch += 1
        # A copy: the caller may change what it was given.
        self._in_flight[self._batch] = sightings.slots_N.copy()
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
        for done in [one for one in self._in_flight if one <= batch]:
            set_all_in_flight(self._table.in_flight_B, self._in_flight.pop(done), False)
        for slots_N in self._in_flight.values():
            set_all_in_flight(self._table.in_flight_B, slots_N, True)

    def delete(self, keys_N: npt.ArrayLike, *, now_s: int) -> Deleted:
        """Evict these keys' rows, counted as deleted; rows in flight stay."""
        _check_now(now_s)
        keys_N = as_keys(keys_N)
        slots_N = np.empty(len(keys_N), np.int64)
        changes = self._room_for_changes(len(keys_N))
        delete_rows(self._table, self._step(now_s), keys_N, slots_N, changes)
        return Deleted(slots_N)

    def limit_rows(self, num_rows_max: int) -> None:
        """Hold at most so many rows from now on, up to num_slots: the table grows and shrinks in place.

        A lower limit is reached over the following map calls, each of which evicts a bounded number of rows
        by their scores, and one for each id that it admits; until then nothing is admitted without an
        eviction.
        Raises: ValueError for a limit outside 1..num_slots.
        """
        if not 1 <= num_rows_max <= self.policy.num_slots:
            raise ValueError(f"limit_rows: 1..{self.policy.num_slots} expected, found {num_rows_max}")
        self._table.cursors[ROW_LIMIT] = num_rows_max

    def lookup(self, keys_N: npt.ArrayLike) -> Int64Array:
        """Slots int64 [N], -1 = not held; changes nothing."""
        keys_N = as_keys(keys_N)
        slots_N = np.empty(len(keys_N), np.int64)
        lookup_rows(self._table.cells_C, keys_N, slots_N)
        return slots_N

    def rows(self, slots_N: npt.ArrayLike | None = None) -> TableRows:
        """The rows of these slots in this order; without an argument all that are held, by slot.

        Raises: ValueError for a slot that holds no row.
        """
        slots_N = (
            np.flatnonzero(self._table.homes_S >= 0)
            if slots_N is None
            else as_keys(slots_N, name="slots_N").copy()
        )
        rows = TableRows(
            keys_N=np.empty(len(slots_N), np.int64),
            slots_N=slots_N,
            scores_N=np.empty(len(slots_N), np.float32),
            last_seen_s_N=np.empty(len(slots_N), np.int64),
            updates_N=np.empty(len(slots_N), np.uint32),
        )
        columns = (rows.keys_N, rows.scores_N, rows.last_seen_s_N, rows.updates_N)
        bad = int(rows_of_slots(self._table.cells_C, self._table.homes_S, slots_N, *columns))
        if bad >= 0:
            raise ValueError(f"rows: only slots that hold a row have one, found slot {slots_N[bad]}")
        return rows

    def why(self, key: int) -> Why:
        """Is the key held, with which score, and why did it leave last?

        Of evictions the newest policy.evictions_remembered are known; deletions are among them.
        """
        slot = int(self.lookup([key])[0])
        recent_E, num_remembered = self._table.recent_E, int(self._table.cursors[NUM_REMEMBERED])
        known: dict[str, object] = {"key": key, "class_id": int(class_of([key])[0])}
        places = np.flatnonzero(recent_E["key"][:num_remembered] == key)
        if len(places):
            # The circle's newest place is the one furthest from its next.
            newest = recent_E[places[((places - num_remembered) % len(recent_E)).argmax()]]
            names = {code: name for name, code in EVICTED_REASONS.items()}
            known |= {
                "left_because": names[int(newest["reason"])],
                "left_at_s": int(newest["when_s"]),
                "left_with_score": float(newest["score"]),
            }
        if slot < 0:
            return msgspec.convert({"state": "absent", **known}, Why)
        rows = self.rows([slot])
        known |= {
            "slot": slot,
            "score": float(rows.scores_N[0]),
            "last_seen_s": int(rows.last_seen_s_N[0]),
            "updates": int(rows.updates_N[0]),
            "in_flight": bool(self._table.in_flight_B[slot >> 3] >> (slot & 7) & 1),
        }
        return msgspec.convert({"state": "held", **known}, Why)

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
        get slot -1 and count as evicted for their score, or their class's quota. Evicts nothing that is held.

        Returns: slots int64 [N].
        Raises: ValueError for a key given twice or held already, or values out of range; then nothing
        has changed.
        """
        columns = RowColumns.checked(
            keys_N, scores_N=scores_N, last_seen_s_N=last_seen_s_N, updates_N=updates_N
        )
        return insert_best_rows(self._table, columns, score=self._score, tick_s=self._tick_s)

    def counters(self) -> TableCounters:
        """A snapshot of all counters."""
        counts_RK, rows_R = self._table.counters_RK, self._table.rows_R
        class_ids = [OTHER_CLASSES, *(one.class_id for one in self.policy.classes)]
        classes = {
            class_id: ClassCounters(
                admitted=int(counts_K[ADMITTED]),
                evicted=_by_reason(counts_K, EVICTED_REASONS),
                refused=_by_reason(counts_K, REFUSED_REASONS),
                rows=int(num_rows),
            )
            for class_id, counts_K, num_rows in zip(class_ids, counts_RK, rows_R, strict=True)
        }
        sums_K = counts_RK.sum(axis=0)
        return TableCounters(
            admitted=int(sums_K[ADMITTED]),
            evicted=_by_reason(sums_K, EVICTED_REASONS),
            refused=_by_reason(sums_K, REFUSED_REASONS),
            rows=self.num_rows,
            classes=classes,
            bad_scores=int(self._table.cursors[BAD_SCORES]),
        )

    def state(self) -> State:
        """Everything needed to go on as if nothing had happened: flat arrays, copied."""
        return state_of(
            self._table,
            self.policy,
            score_name=self._score_name,
            batches=(self._batch, self._released),
            in_flight=self._in_flight,
        )

    @classmethod
    def load(cls, policy: TablePolicy, state: State, *, score: Score | None = None) -> IdTable:
        """The table that state() was taken from, for a policy of the same slots, classes, score and sketch.

        Lifetimes that make a wheel of the same size, quotas and the rest may be others: rows that they no
        longer allow leave over the following map calls, which report them.
        Raises: StateError naming the array that is damaged or belongs to another policy.
        """
        table = cls(policy, score=score)
        table._table, batches, table._in_flight = restored_table(policy, state, score_name=table._score_name)
        table._batch, table._released = batches
        return table

    def _step(self, now_s: int) -> Step:
        policy = self.policy
        return Step(
            now_s=int(now_s),
            score=self._score,
            window_cells=_window_cells(policy),
            expiry_scan=policy.expiry_scan,
            room_scan=policy.victim_window,
            tick_s=self._tick_s,
            count_window_s=policy.count_window_s,
        )

    def _room_for_changes(self, num_keys: int) -> Changes:
        """What a call can need at most; the kernels write without looking at the arrays' ends.

        Evictions: the passes of shrink and shrink_classes, due rows, and for each id admitted one; a pass of
        several makes room for as many ids, so that only the last one may have evicted more. No row that was
        admitted leaves in the same call.
        """
        num_slots, num_victims = self.policy.num_slots, self.policy.victims_at_once
        num_new_max = min(num_keys, num_slots)
        num_evicted_max = min(
            num_keys + (2 * SHRINK_PASSES + 1) * num_victims + self.policy.expiry_scan, num_slots
        )
        return Changes(
            new_keys_M=np.empty(num_new_max, np.int64),
            new_slots_M=np.empty(num_new_max, np.int64),
            evicted_keys_K=np.empty(num_evicted_max, np.int64),
            evicted_slots_K=np.empty(num_evicted_max, np.int64),
            counts=np.zeros(2, np.int64),
            victim_slots_V=np.empty(num_victims, np.int64),
            victim_cells_V=np.empty(num_victims, np.int64),
            victim_worths_V=np.empty(num_victims, np.float64),
            quota_failed_R=np.zeros(len(self._table.rows_R), np.bool_),
        )


def _window_cells(policy: TablePolicy) -> int:
    """The cells in which, in a full table, as many rows lie as the window has slots."""
    if policy.victim_window >= policy.num_slots:
        return policy.num_slots * 5 // 4 + 1
    return policy.victim_window * 5 // 4


def _check_now(now_s: int) -> None:
    if not 0 <= now_s <= NOW_S_MAX:
        raise ValueError(f"now_s must be unix seconds in 0..{NOW_S_MAX}, found {now_s}")


def _counts(counts_N: npt.ArrayLike, num_keys: int) -> Int64Array:
    array = as_keys(counts_N, name="shows_N and positives_N")
    if len(array) != num_keys:
        raise ValueError(f"shows_N and positives_N must be [{num_keys}] as keys_N is, found [{len(array)}]")
    return array


def _by_reason(counts_K: Int64Array, reasons: dict[str, int]) -> dict[str, int]:
    return {name: int(counts_K[code]) for name, code in reasons.items()}
