"""The row store: the newest row of every id, always at exactly one version.

With a memory budget it holds the rows of the highest scores: when a version would pass the budget, the
rows of the lowest scores leave memory or never enter it (a row without a score has score 0). They are
counted, and the log still has them: snapshots, rollbacks and subscriptions are made from the log.

A version is prepared beside the live one: its rows are written to slots that no key points to. The
switch then only moves keys to these slots, under a lock; readers take the same lock for one gather.
Shapes: N keys of a gather, D the table's dim.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.slot_map import SlotMap
from param_server.errors import BadBlobError, GapError
from param_server.manifest import Manifest, Version, check_applies
from param_server.memory_budget import lowest_scores, row_bytes, rows_over_budget
from proto.row_segment import RowSegment

CAPACITY_MIN = 1024
COLUMNS: dict[str, type[Any]] = {
    "state_N": np.float32,
    "scores_N": np.float32,
    "last_seen_s_N": np.int64,
    "updates_N": np.uint32,
}
"""What a row may carry beside its values."""

Keys = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]


class _Table:
    """Rows by slot and the map from key to slot; a slot without a key is free."""

    def __init__(self, dim: int, *, num_keys: int = 0, columns: Iterable[str] = ()) -> None:
        self.dim = dim
        # Room for the deltas that follow: growing the map is the one slow thing done under the lock.
        self.slots = SlotMap(max(CAPACITY_MIN, num_keys + num_keys // 2))
        self.rows_CD: Rows = np.zeros((self.slots.capacity, dim), np.float32)
        self.columns: dict[str, npt.NDArray[Any]] = {}
        """Column name of a RowSegment -> [C]; a row that came without it has 0."""
        self.add_columns(columns)

    def add_columns(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.columns:
                # A new dictionary: a reader may be going through the old one.
                self.columns = {**self.columns, name: np.zeros(len(self.rows_CD), COLUMNS[name])}

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.dim, columns=(column.dtype for column in self.columns.values()))

    def write(self, slots_N: Keys, segments: list[RowSegment]) -> None:
        start = 0
        for segment in segments:
            slots = slots_N[start : start + len(segment)]
            self.rows_CD[slots] = segment.rows_ND
            for name, column in self.columns.items():
                values = getattr(segment, name)
                column[slots] = 0 if values is None else values
            start += len(segment)

    def grown_for(self, num_fresh: int) -> Rows | None:
        """A larger copy of the rows if `num_fresh` free slots are not there; None: they are."""
        needed = len(self.slots) + num_fresh
        if needed <= len(self.rows_CD):
            return None
        rows_CD = np.zeros((max(needed, 2 * len(self.rows_CD)), self.dim), np.float32)
        rows_CD[: len(self.rows_CD)] = self.rows_CD
        return rows_CD


@dataclass(slots=True)
class _TableChange:
    keys_N: Keys
    slots_N: Keys
    deleted_M: Keys


@dataclass(slots=True)
class Prepared:
    """A version that is written but not visible. Only the newest one prepared can be switched to."""

    version: Version
    full: bool
    tables: dict[str, _Table]
    num_left_out: int = 0
    """Rows that the memory budget sends away with this version."""
    changes: dict[str, _TableChange] = field(default_factory=dict)

    def dim(self, table: str) -> int | None:
        """None: the version has no such table."""
        return self.tables[table].dim if table in self.tables else None


@dataclass(frozen=True, slots=True)
class Gathered:
    """Rows of one version; a key that is absent has a row of zeros and present_N False."""

    version: Version | None
    rows_ND: dict[str, Rows]
    present_N: dict[str, npt.NDArray[np.bool_]]
    columns_N: dict[str, dict[str, npt.NDArray[Any]]] = field(default_factory=dict)
    """table -> column -> [N], of a store that keeps columns."""
    complete: bool = True
    """False: some rows left memory since the last full version, so an absent key may be in the log."""


class RowStore:
    """One writer (prepare, switch) and any number of readers (gather)."""

    def __init__(self, *, memory_bytes_max: int | None = None, keep_columns: bool = False) -> None:
        """Args: memory_bytes_max: for all rows together, None = no limit; while a version is prepared its
        rows lie beside them. keep_columns: hold optimizer state, scores, last-seen and update counts too.
        """
        self._memory_bytes_max = memory_bytes_max
        self._keep_columns = keep_columns
        self._num_left_out = 0
        self._lock = threading.Lock()
        self._tables: dict[str, _Table] = {}
        self._version: Version | None = None
        self._newest_prepared: Prepared | None = None

    @property
    def version(self) -> Version | None:
        return self._version

    @property
    def num_rows(self) -> int:
        return sum(len(table.slots) for table in self._tables.values())

    @property
    def num_left_out(self) -> int:
        """How often a row left memory, or never entered it, since the last full version."""
        return self._num_left_out

    @property
    def memory_bytes(self) -> int:
        """Of the rows held, with their columns and their part of the index."""
        return sum(len(table.slots) * table.row_bytes for table in list(self._tables.values()))

    @property
    def dims(self) -> dict[str, int]:
        return {name: table.dim for name, table in self._tables.items()}

    def prepare(self, manifest: Manifest, segments: Iterable[RowSegment]) -> Prepared:
        """Write a version's rows beside the live ones. An abandoned preparation costs nothing.

        Raises: GapError if a delta does not follow the live version or any version is not above it,
            BadBlobError if an id occurs in two segments or a dim is not the table's.
        """
        version = manifest.version
        check_applies(manifest, held=self._version)
        by_table: dict[str, list[RowSegment]] = {}
        for segment in segments:
            by_table.setdefault(segment.table, []).append(segment)
        if manifest.kind == "full":
            prepared = self._prepare_full(version, by_table)
        else:
            prepared = self._prepare_delta(version, by_table)
        self._newest_prepared = prepared
        return prepared

    def _prepare_full(self, version: Version, by_table: dict[str, list[RowSegment]]) -> Prepared:
        prepared = Prepared(version=version, full=True, tables={})
        for name, segments in by_table.items():
            keys_N, deleted_M = _joined_keys(segments, where=f"version {version}: table '{name}'")
            if len(deleted_M):
                raise BadBlobError(f"version {version}: table '{name}': a full version has no deletes")
            dim, columns = _dim(segments, version), self._columns(segments)
            room = self._memory_bytes_max
            if room is not None:
                taken = sum(len(one.slots) * one.row_bytes for one in prepared.tables.values())
                one_bytes = row_bytes(dim, columns=(np.dtype(COLUMNS[column]) for column in columns))
                over = rows_over_budget(len(keys_N), row_bytes=one_bytes, bytes_max=room - taken, slack=0.0)
                segments, keys_N = _without_lowest(segments, over)
                prepared.num_left_out += over
            table = _Table(dim, num_keys=len(keys_N), columns=columns)
            slots_N = table.slots.free_slots(len(keys_N))
            table.write(slots_N, segments)
            table.slots.assign(keys_N, slots_N)
            prepared.tables[name] = table
        return prepared

    def _prepare_delta(self, version: Version, by_table: dict[str, list[RowSegment]]) -> Prepared:
        prepared = Prepared(version=version, full=False, tables=dict(self._tables))
        for name, segments in by_table.items():
            keys_N, deleted_M = _joined_keys(segments, where=f"version {version}: table '{name}'")
            dim = _dim(segments, version)
            table = prepared.tables.get(name)
            if table is None:
                table = prepared.tables[name] = _Table(dim, num_keys=len(keys_N))
            table.add_columns(self._columns(segments))
            if table.dim != dim:
                raise BadBlobError(
                    f"version {version}: table '{name}': expected dim {table.dim}, found {dim}"
                )
            leaving_M = self._leaving(prepared, table, keys_N)
            prepared.num_left_out += len(leaving_M)
            deleted_M = np.concatenate([deleted_M, leaving_M])
            self._grow(table, len(keys_N))
            slots_N = table.slots.free_slots(len(keys_N))
            table.write(slots_N, segments)
            prepared.changes[name] = _TableChange(keys_N=keys_N, slots_N=slots_N, deleted_M=deleted_M)
        return prepared

    def _columns(self, segments: list[RowSegment]) -> list[str]:
        """Those that some segment carries; scores also where only the budget needs them."""
        kept = COLUMNS if self._keep_columns else ("scores_N",) if self._memory_bytes_max is not None else ()
        return [name for name in kept if any(getattr(one, name) is not None for one in segments)]

    def _grow(self, table: _Table, num_fresh: int) -> None:
        larger_CD = table.grown_for(num_fresh)
        if larger_CD is None:
            return
        larger = {name: np.zeros(len(larger_CD), column.dtype) for name, column in table.columns.items()}
        for name, column in table.columns.items():
            larger[name][: len(column)] = column
        with self._lock:
            table.rows_CD, table.columns = larger_CD, larger
            table.slots.grow(len(larger_CD))

    def _leaving(self, prepared: Prepared, table: _Table, coming_N: Keys) -> Keys:
        """The held keys of the lowest scores that make room for a delta; those that come now stay."""
        if self._memory_bytes_max is None:
            return coming_N[:0]
        num_fresh = int((table.slots.lookup(coming_N) < 0).sum())
        others = sum(len(one.slots) * one.row_bytes for one in prepared.tables.values() if one is not table)
        over = rows_over_budget(
            len(table.slots) + num_fresh,
            row_bytes=table.row_bytes,
            bytes_max=self._memory_bytes_max - others,
        )
        if not over:
            return coming_N[:0]
        keys_L, slots_L = table.slots.items()
        stays_L = np.isin(keys_L, coming_N)
        keys_L, slots_L = keys_L[~stays_L], slots_L[~stays_L]
        scores_C = table.columns.get("scores_N")
        scores_L = np.zeros(len(keys_L), np.float32) if scores_C is None else scores_C[slots_L]
        return keys_L[lowest_scores(scores_L, min(over, len(keys_L)))]

    def switch(self, prepared: Prepared) -> None:
        """Make a prepared version the live one."""
        if prepared is not self._newest_prepared:
            raise GapError(f"version {prepared.version}: another version was prepared after it")
        with self._lock:
            for name, change in prepared.changes.items():
                table = prepared.tables[name]
                table.slots.delete(change.deleted_M)
                # The old slots become free here and are written again by the next prepare, which is
                # after this lock, so after every gather that could have read them.
                table.slots.assign(change.keys_N, change.slots_N)
            self._tables = prepared.tables
            self._num_left_out = prepared.num_left_out + (0 if prepared.full else self._num_left_out)
            self._version = prepared.version
            self._newest_prepared = None

    def gather(self, keys_N: Mapping[str, Keys]) -> Gathered:
        """The rows of some keys, table by table, all of one version.

        Args: keys_N: table -> int64 [N]. A table that does not exist has no keys: rows float32 [N, 0].
        """
        rows_ND: dict[str, Rows] = {}
        present_N: dict[str, npt.NDArray[np.bool_]] = {}
        columns_N: dict[str, dict[str, npt.NDArray[Any]]] = {}
        with self._lock:
            for name, keys in keys_N.items():
                table = self._tables.get(name)
                if table is None:
                    rows_ND[name] = np.zeros((len(keys), 0), np.float32)
                    present_N[name] = np.zeros(len(keys), np.bool_)
                    continue
                slots = table.slots.lookup(keys)
                present_N[name] = slots >= 0
                rows_ND[name] = table.rows_CD[slots]
                if self._keep_columns:
                    columns_N[name] = {key: column[slots] for key, column in table.columns.items()}
            version = self._version
            complete = self._num_left_out == 0
        for name, present in present_N.items():
            rows_ND[name][~present] = 0.0
        return Gathered(
            version=version,
            rows_ND=rows_ND,
            present_N=present_N,
            columns_N=columns_N,
            complete=complete,
        )


def _joined_keys(segments: list[RowSegment], *, where: str) -> tuple[Keys, Keys]:
    """The keys and deletes of one table's segments; each key may occur once in a version."""
    keys_N = np.concatenate([segment.ids_N for segment in segments])
    deleted_M = np.concatenate([segment.deleted_ids_M for segment in segments])
    ordered = np.sort(np.concatenate([keys_N, deleted_M]))
    doubled = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(doubled):
        raise BadBlobError(f"{where}: id {int(doubled[0])} occurs in two segments")
    return keys_N, deleted_M


def _dim(segments: list[RowSegment], version: Version) -> int:
    dims = sorted({segment.dim for segment in segments})
    if len(dims) != 1:
        raise BadBlobError(f"version {version}: table '{segments[0].table}': found dims {dims}, expected one")
    return dims[0]


def _without_lowest(segments: list[RowSegment], num: int) -> tuple[list[RowSegment], Keys]:
    """Segments without the `num` rows of the lowest scores, and their keys."""
    if num:
        scores_N = np.concatenate(
            [np.zeros(len(one), np.float32) if one.scores_N is None else one.scores_N for one in segments]
        )
        keep_N = np.ones(len(scores_N), np.bool_)
        keep_N[lowest_scores(scores_N, num)] = False
        ends = np.cumsum([len(one) for one in segments])[:-1]
        segments = [_picked(one, mask) for one, mask in zip(segments, np.split(keep_N, ends), strict=True)]
    return segments, np.concatenate([segment.ids_N for segment in segments])


def _picked(segment: RowSegment, mask_N: npt.NDArray[np.bool_]) -> RowSegment:
    columns = {name: getattr(segment, name) for name in COLUMNS}
    picked: dict[str, Any] = {
        name: None if column is None else column[mask_N] for name, column in columns.items()
    }
    return replace(segment, ids_N=segment.ids_N[mask_N], rows_ND=segment.rows_ND[mask_N], **picked)
