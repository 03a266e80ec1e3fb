"""The rows that a replica answers from, always at exactly one version and inside its memory budget.

A version is prepared beside the live one: its rows are written to slots that no key points to. The switch
then only moves keys to these slots, under a lock; readers take the same lock for one gather. The model
of the version switches with it. Shapes: N keys of a gather, D the table's dim.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from param_server.errors import BadBlobError, GapError
from param_server.manifest import Manifest, Version, check_applies
from param_server.serving_config import ServingConfig
from param_server.serving_model import ServingModel
from param_server.serving_table import CAPACITY_MIN, Keys, ServingTable, bytes_per_row, capacity_within
from param_server.version_rows import VersionRows, expired, in_shard, join_segments
from proto.row_formats import RowFormat, unpack_rows
from proto.row_segment import PackedSegment

ROOM_SHARE = 8
"""At the budget's end one slot in so many stays free: an updated row is written to a fresh slot."""
SWEEPS_PER_LIFETIME = 32

Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class NotHeld:
    """Rows that versions brought and this replica does not hold, by reason; or that left again."""

    over_budget: int = 0
    expired: int = 0
    other_shard: int = 0

    def add(self, other: NotHeld) -> None:
        self.over_budget += other.over_budget
        self.expired += other.expired
        self.other_shard += other.other_shard


@dataclass(slots=True)
class _TableChange:
    keys_N: Keys
    slots_N: Keys
    deleted_M: Keys


@dataclass(slots=True)
class Prepared:
    """A version that is written but not visible. Only the newest one prepared can be switched to."""

    version: Version
    tables: dict[str, ServingTable]
    swept_s: int
    changes: dict[str, _TableChange] = field(default_factory=dict)
    not_held: NotHeld = field(default_factory=NotHeld)

    def dim(self, table: str) -> int | None:
        """None: the version has no such table."""
        return self.tables[table].dim if table in self.tables else None


@dataclass(frozen=True, slots=True)
class Gathered:
    """Rows of one version; a key that is absent has a row of zeros and present_N False."""

    version: Version | None
    model: ServingModel | None
    rows_ND: dict[str, Floats]
    present_N: dict[str, npt.NDArray[np.bool_]]


class ServingStore:
    """One writer (prepare, switch) and any number of readers (gather)."""

    def __init__(self, config: ServingConfig | None = None) -> None:
        self.config = config if config is not None else ServingConfig()
        self._lock = threading.Lock()
        self._tables: dict[str, ServingTable] = {}
        self._version: Version | None = None
        self._model: ServingModel | None = None
        self._newest_prepared: Prepared | None = None
        self._swept_s = 0
        self.not_held = NotHeld()

    @property
    def version(self) -> Version | None:
        return self._version

    @property
    def model(self) -> ServingModel | None:
        return self._model

    @property
    def num_rows(self) -> int:
        return sum(len(table.slots) for table in self._tables.values())

    @property
    def num_bytes(self) -> int:
        """Memory of the rows, their columns and their index."""
        return sum(table.num_bytes for table in self._tables.values())

    def prepare(self, manifest: Manifest, segments: Iterable[PackedSegment]) -> Prepared:
        """Write a version's rows beside the live ones. An abandoned preparation costs nothing.

        Raises: GapError if a delta does not follow the live version or any version is not above it,
            BadBlobError if an id occurs in two segments or a dim is not the table's.
        """
        version = manifest.version
        check_applies(manifest, held=self._version)
        by_table: dict[str, list[PackedSegment]] = {}
        for segment in segments:
            by_table.setdefault(segment.table, []).append(segment)
        full = manifest.kind == "full"
        now_s = manifest.watermark_ms // 1000
        prepared = Prepared(version=version, tables={} if full else dict(self._tables), swept_s=self._swept_s)
        rows = {
            name: self._joined(name, parts, prepared=prepared, manifest=manifest)
            for name, parts in by_table.items()
        }
        if full:
            self._prepare_full(prepared, rows)
            prepared.swept_s = now_s
        else:
            self._prepare_delta(prepared, rows, now_s=now_s)
        self._newest_prepared = prepared
        return prepared

    def _joined(
        self, name: str, segments: list[PackedSegment], *, prepared: Prepared, manifest: Manifest
    ) -> VersionRows:
        """A table's rows, without those that this replica does not hold whatever room there is."""
        now_s = manifest.watermark_ms // 1000
        where = f"version {prepared.version}: table '{name}'"
        table = prepared.tables.get(name)
        fixed: RowFormat | None = None if self.config.row_format == "as_sent" else self.config.row_format
        rows = join_segments(
            segments,
            where=where,
            row_format=table.row_format if table is not None else fixed,
            watermark_s=now_s,
            config=self.config,
        )
        if table is not None and table.dim != rows.dim:
            raise BadBlobError(f"{where}: expected dim {table.dim}, found {rows.dim}")
        if manifest.kind == "full" and len(rows.deleted_M):
            raise BadBlobError(f"{where}: a full version has no deletes")
        prepared.not_held.other_shard += len(rows.keep(in_shard(rows.keys_N, config=self.config)))
        if self.config.expires:
            dead_N = expired(rows.keys_N, rows.last_seen_s_N, now_s=now_s, config=self.config)
            gone = rows.keep(~dead_N)
            prepared.not_held.expired += len(gone)
            rows.deleted_M = np.concatenate([rows.deleted_M, gone])
        return rows

    def _prepare_full(self, prepared: Prepared, tables: dict[str, VersionRows]) -> None:
        budget = self.config.memory_budget_bytes
        wanted = {name: max(CAPACITY_MIN, len(rows) + len(rows) // 2) for name, rows in tables.items()}
        row_bytes = {name: self._bytes_per_row(rows.dim, rows.row_format) for name, rows in tables.items()}
        total = sum(wanted[name] * row_bytes[name] for name in tables)
        for name, rows in tables.items():
            capacity = wanted[name]
            if budget and total > budget:
                share = budget * wanted[name] * row_bytes[name] // total
                capacity = capacity_within(share, row_bytes=row_bytes[name])
                room = capacity - _spare(capacity)
                prepared.not_held.over_budget += len(rows.keep(_best(rows.worth_N, room)))
            table = prepared.tables[name] = self._new_table(rows, capacity=capacity)
            slots_N = table.slots.free_slots(len(rows))
            table.write(slots_N, rows.rows_NW, rows.last_seen_s_N, rows.worth_N)
            table.slots.assign(rows.keys_N, slots_N)

    def _prepare_delta(self, prepared: Prepared, tables: dict[str, VersionRows], *, now_s: int) -> None:
        for name, rows in tables.items():
            table = prepared.tables.get(name)
            if table is None:
                capacity = max(CAPACITY_MIN, len(rows) + len(rows) // 2)
                if self.config.memory_budget_bytes:
                    most = self._capacity_max(rows.dim, rows.row_format, beside=prepared.tables)
                    capacity = min(capacity, most)
                table = prepared.tables[name] = self._new_table(rows, capacity=capacity)
            self._grow(table, len(rows), beside=prepared.tables)
            # A row that finds no room must not stay as it was before: it is deleted.
            free = table.slots.capacity - len(table.slots)
            dropped = rows.keep(_best(rows.worth_N, free))
            victims = self._victims(table, rows, beside=prepared.tables)
            prepared.not_held.over_budget += len(dropped) + len(victims)
            slots_N = table.slots.free_slots(len(rows))
            table.write(slots_N, rows.rows_NW, rows.last_seen_s_N, rows.worth_N)
            deleted_M = np.concatenate([rows.deleted_M, dropped, victims])
            prepared.changes[name] = _TableChange(rows.keys_N, slots_N, deleted_M)
        if self._sweep_is_due(now_s):
            self._sweep(prepared, now_s=now_s)

    def _grow(self, table: ServingTable, num_fresh: int, *, beside: Mapping[str, ServingTable]) -> None:
        needed = len(table.slots) + num_fresh
        if needed <= table.slots.capacity:
            return
        capacity = max(needed, 2 * table.slots.capacity)
        if self.config.memory_budget_bytes:
            others = {name: one for name, one in beside.items() if one is not table}
            capacity = min(capacity, self._capacity_max(table.dim, table.row_format, beside=others))
        if capacity > table.slots.capacity:
            copies = table.grown(capacity)
            with self._lock:
                table.put_grown(copies)

    def _victims(self, table: ServingTable, rows: VersionRows, *, beside: Mapping[str, ServingTable]) -> Keys:
        """Keys that leave so that the next version finds free slots, where the table can grow no more."""
        if not self.config.memory_budget_bytes or table.worth_C is None:
            return rows.keys_N[:0]
        others = {name: one for name, one in beside.items() if one is not table}
        capacity = table.slots.capacity
        if self._capacity_max(table.dim, table.row_format, beside=others) > capacity + capacity // ROOM_SHARE:
            return rows.keys_N[:0]
        num_new = int(np.count_nonzero(table.slots.lookup(rows.keys_N) < 0))
        num_gone = int(np.count_nonzero(table.slots.lookup(rows.deleted_M) >= 0))
        surplus = len(table.slots) + num_new - num_gone - (capacity - _spare(capacity))
        if surplus <= 0:
            return rows.keys_N[:0]
        # A little more than must leave, so that not each version looks at every row.
        surplus += _spare(capacity) // 4
        keys, slots = table.slots.items()
        untouched = ~np.isin(keys, np.concatenate([rows.keys_N, rows.deleted_M]))
        keys, worth = keys[untouched], table.worth_C[slots[untouched]]
        everyone = np.concatenate([keys, rows.keys_N])
        kept = _best(np.concatenate([worth, rows.worth_N]), len(everyone) - surplus)
        rows.keep(kept[len(keys) :])
        return everyone[~kept]

    def _sweep_is_due(self, now_s: int) -> bool:
        lifetimes_s = [self.config.lifetime_s, *self.config.lifetime_s_by_class.values()]
        shortest_s = min((one for one in lifetimes_s if one), default=0)
        return bool(shortest_s) and now_s - self._swept_s >= max(1, shortest_s // SWEEPS_PER_LIFETIME)

    def _sweep(self, prepared: Prepared, *, now_s: int) -> None:
        """Delete what is past its lifetime and was not brought anew by this version."""
        for name, table in prepared.tables.items():
            change = prepared.changes.setdefault(name, _no_change())
            keys, slots = table.slots.items()
            assert table.last_seen_s_C is not None
            dead = keys[expired(keys, table.last_seen_s_C[slots], now_s=now_s, config=self.config)]
            dead = np.setdiff1d(dead, np.concatenate([change.keys_N, change.deleted_M]))
            prepared.not_held.expired += len(dead)
            change.deleted_M = np.concatenate([change.deleted_M, dead])
        prepared.swept_s = now_s

    def _new_table(self, rows: VersionRows, *, capacity: int) -> ServingTable:
        return ServingTable(
            rows.dim,
            rows.row_format,
            capacity=capacity,
            keeps_seen=self.config.expires,
            keeps_worth=bool(self.config.memory_budget_bytes),
        )

    def _bytes_per_row(self, dim: int, row_format: RowFormat) -> int:
        return bytes_per_row(
            dim,
            row_format,
            keeps_seen=self.config.expires,
            keeps_worth=bool(self.config.memory_budget_bytes),
        )

    def _capacity_max(self, dim: int, row_format: RowFormat, *, beside: Mapping[str, ServingTable]) -> int:
        left = self.config.memory_budget_bytes - sum(table.num_bytes for table in beside.values())
        return capacity_within(left, row_bytes=self._bytes_per_row(dim, row_format))

    def switch(self, prepared: Prepared, model: ServingModel | None = None) -> None:
        """Make a prepared version the live one, rows and model together."""
        if prepared is not self._newest_prepared:
            raise GapError(f"version {prepared.version}: another version was prepared after it")
        with self._lock:
            for name, change in prepared.changes.items():
                slots = prepared.tables[name].slots
                slots.delete(change.deleted_M)
                # The old slots become free here and are written again by the next prepare, which is
                # after this lock, so after every gather that could have read them.
                slots.assign(change.keys_N, change.slots_N)
            self._tables = prepared.tables
            self._version = prepared.version
            self._model = model
            self._newest_prepared = None
        self._swept_s = prepared.swept_s
        self.not_held.add(prepared.not_held)

    def gather(self, keys_N: Mapping[str, Keys]) -> Gathered:
        """The rows of some keys, table by table, all of one version, as float32.

        Args: keys_N: table -> int64 [N]. A table that does not exist has no keys: rows float32 [N, 0].
        """
        packed = {}
        with self._lock:
            for name, keys in keys_N.items():
                table = self._tables.get(name)
                packed[name] = None if table is None else (table.row_format, *table.gather(keys))
            version, model = self._version, self._model
        rows_ND: dict[str, Floats] = {}
        present_N: dict[str, npt.NDArray[np.bool_]] = {}
        for name, found in packed.items():
            if found is None:
                rows_ND[name] = np.zeros((len(keys_N[name]), 0), np.float32)
                present_N[name] = np.zeros(len(keys_N[name]), np.bool_)
                continue
            row_format, rows_NW, present_N[name] = found
            rows_ND[name] = unpack_rows(rows_NW, row_format)
            rows_ND[name][~present_N[name]] = 0.0
        return Gathered(version=version, model=model, rows_ND=rows_ND, present_N=present_N)


def _spare(capacity: int) -> int:
    return -(-capacity // ROOM_SHARE)


def _best(worth_N: npt.NDArray[np.float64], num: int) -> npt.NDArray[np.bool_]:
    """Which rows are among the `num` of the highest worth."""
    kept_N = np.ones(len(worth_N), np.bool_)
    surplus = len(worth_N) - max(0, num)
    if surplus > 0:
        kept_N[np.argpartition(worth_N, surplus - 1)[:surplus]] = False
    return kept_N


def _no_change() -> _TableChange:
    nothing = np.zeros(0, np.int64)
    return _TableChange(nothing, nothing, nothing)
