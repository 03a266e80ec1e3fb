"""The row store: full and delta versions, atomic switches, absent keys, slots that are reused."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from param_server.errors import BadBlobError, GapError
from param_server.manifest import Manifest, Version
from param_server.row_store import RowStore
from proto.row_segment import RowSegment

NO_IDS = np.zeros(0, np.int64)


def make_manifest(sequence: int, kind: str, *, parent: int | None) -> Manifest:
    return Manifest(
        version=Version(1, sequence),
        parent=None if parent is None else Version(1, parent),
        kind=kind,
        blobs=(),
        schema_hash="",
        watermark_ms=0,
        produced_ms_newest=0,
        created_ms=0,
    )


def segment(ids, value: float, *, deletes=(), table: str = "t", dim: int = 4) -> RowSegment:
    rows_ND = np.full((len(ids), dim), value, np.float32)
    return RowSegment(table, np.array(ids, np.int64), rows_ND, np.array(deletes, np.int64))


def apply(store: RowStore, sequence: int, kind: str, *segments: RowSegment) -> None:
    parent = None if store.version is None else store.version.sequence
    manifest = make_manifest(sequence, kind, parent=parent)
    store.switch(store.prepare(manifest, segments))


def rows_of(store: RowStore, ids, table: str = "t") -> dict[int, list[float]]:
    gathered = store.gather({table: np.array(ids, np.int64)})
    found = {}
    for one, row, present in zip(ids, gathered.rows_ND[table], gathered.present_N[table], strict=True):
        if present:
            found[one] = row.tolist()
        else:
            assert not row.any(), "an absent key must have a row of zeros"
    return found


def test_nothing_prepared_is_visible_before_the_switch():
    store = RowStore()
    apply(store, 1, "full", segment([1, 2], 1.0))
    prepared = store.prepare(make_manifest(2, "delta", parent=1), [segment([2, 3], 2.0, deletes=[1])])
    assert rows_of(store, [1, 2, 3]) == {1: [1.0] * 4, 2: [1.0] * 4}
    assert store.version == Version(1, 1)
    store.switch(prepared)
    assert rows_of(store, [1, 2, 3]) == {2: [2.0] * 4, 3: [2.0] * 4}
    assert store.num_rows == 2


def test_a_full_version_replaces_everything():
    store = RowStore()
    apply(store, 1, "full", segment([1, 2], 1.0), segment([1], 1.0, table="u", dim=8))
    apply(store, 2, "full", segment([3], 2.0))
    assert rows_of(store, [1, 2, 3]) == {3: [2.0] * 4}
    assert rows_of(store, [1], table="u") == {}
    assert store.dims == {"t": 4}


def test_random_versions_equal_a_plain_dictionary_while_slots_are_reused_and_tables_grow():
    rng = np.random.default_rng(5)
    store, truth = RowStore(), {}
    apply(store, 1, "full", segment(range(10), 0.0))
    truth = dict.fromkeys(range(10), 0.0)
    for sequence in range(2, 120):
        ids = rng.choice(3000, size=int(rng.integers(0, 200)), replace=False).tolist()
        cut = len(ids) // 3
        apply(store, sequence, "delta", segment(ids[cut:], float(sequence), deletes=ids[:cut]))
        for one in ids[:cut]:
            truth.pop(one, None)
        truth.update(dict.fromkeys(ids[cut:], float(sequence)))
        if sequence % 20 == 0:
            assert rows_of(store, range(3000)) == {one: [value] * 4 for one, value in truth.items()}
    assert store.num_rows == len(truth) > 1024


def test_an_abandoned_preparation_costs_nothing():
    store = RowStore()
    apply(store, 1, "full", segment([1], 1.0))
    for _ in range(20):
        store.prepare(make_manifest(2, "delta", parent=1), [segment(range(500), 9.0)])
    old = store.prepare(make_manifest(2, "delta", parent=1), [segment([5], 9.0)])
    apply(store, 2, "delta", segment([7], 2.0))
    assert rows_of(store, range(500)) == {1: [1.0] * 4, 7: [2.0] * 4}
    with pytest.raises(GapError, match="another version"):
        store.switch(old)


def test_versions_never_go_back_and_gaps_are_refused():
    store = RowStore()
    apply(store, 5, "full", segment([1], 1.0))
    with pytest.raises(GapError, match="never go back"):
        store.prepare(make_manifest(5, "full", parent=4), [])
    with pytest.raises(GapError, match="newest full version"):
        store.prepare(make_manifest(8, "delta", parent=7), [])
    assert store.version == Version(1, 5)


@pytest.mark.parametrize(
    ("kind", "segments", "message"),
    [
        ("delta", [segment([1], 1.0), segment([1], 2.0)], "two segments"),
        ("delta", [segment([1], 1.0), segment([], 2.0, deletes=[1])], "two segments"),
        ("delta", [segment([1], 1.0, dim=8)], "dim"),
        ("full", [segment([1], 1.0, dim=8), segment([2], 1.0)], "dims"),
        ("full", [segment([1], 1.0, deletes=[2])], "no deletes"),
    ],
)
def test_a_version_that_contradicts_itself_is_refused_and_changes_nothing(kind, segments, message):
    store = RowStore()
    apply(store, 1, "full", segment([1], 1.0))
    with pytest.raises(BadBlobError, match=message):
        store.prepare(make_manifest(2, kind, parent=1), segments)
    assert rows_of(store, [1, 2]) == {1: [1.0] * 4}


def test_a_table_that_appears_in_a_delta_is_there_after_it():
    store = RowStore()
    apply(store, 1, "full")
    assert store.gather({"t": np.array([1])}).rows_ND["t"].shape == (1, 0)
    apply(store, 2, "delta", segment([1], 3.0))
    assert rows_of(store, [1, 2]) == {1: [3.0] * 4}


def test_a_concurrent_reader_only_ever_sees_whole_versions():
    """Every version writes its number into every row of both tables."""
    store = RowStore()
    apply(store, 1, "full", segment(range(50), 1.0), segment(range(50), 1.0, table="u"))
    done = threading.Event()
    seen, torn = set(), []

    def read() -> None:
        ids = np.arange(80)
        last = 0
        while not done.is_set():
            gathered = store.gather({"t": ids, "u": ids})
            number = gathered.version.sequence
            for table in ("t", "u"):
                found = set(gathered.rows_ND[table][gathered.present_N[table]].ravel().tolist())
                if found != {float(number)} or number < last:
                    torn.append((number, found))
            seen.add(number)
            last = number

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(2, 20_000):
        if number > 400 and len(seen) > 10:
            break
        # Every version changes all rows that there are, and the set of rows with it.
        ids, gone = range(number % 30, 50), range(number % 30)
        both = [segment(ids, float(number), deletes=gone, table=table) for table in ("t", "u")]
        if number % 50 == 0:
            both = [segment(ids, float(number), table=table) for table in ("t", "u")]
            apply(store, number, "full", *both)
        else:
            apply(store, number, "delta", *both)
    done.set()
    for reader in readers:
        reader.join()
    assert torn == []
    assert len(seen) > 10
