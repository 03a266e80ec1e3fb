"""What a replica holds: packed rows, a budget, lifetimes, one shard of rows; always a whole version."""

from __future__ import annotations

import threading

import msgspec
import numpy as np
import pytest

from feature_eviction.keys import make_keys, owner_of
from param_server.errors import BadBlobError, GapError
from param_server.manifest import Manifest, Version
from param_server.serving_config import ServingConfig
from param_server.serving_store import ServingStore
from proto.row_segment import PackedSegment, RowSegment, decode_packed, encode

DIM = 16


def make_manifest(sequence: int, kind: str, *, watermark_s: int = 0) -> Manifest:
    return Manifest(
        version=Version(1, sequence),
        parent=Version(1, sequence - 1) if sequence > 1 else None,
        kind=kind,
        blobs=(),
        schema_hash="",
        watermark_ms=1000 * watermark_s,
        produced_ms_newest=0,
        created_ms=0,
    )


def segment(
    ids, rows_ND, *, deletes=(), table="t", row_format="float32", scores=None, seen_s=None
) -> PackedSegment:
    whole = RowSegment(
        table=table,
        ids_N=np.array(ids, np.int64),
        rows_ND=np.asarray(rows_ND, np.float32),
        deleted_ids_M=np.array(deletes, np.int64),
        scores_N=None if scores is None else np.array(scores, np.float32),
        last_seen_s_N=None if seen_s is None else np.array(seen_s, np.int64),
    )
    return decode_packed(encode(whole, row_format=row_format), where="here")


def filled(ids, value: float, **options) -> PackedSegment:
    return segment(list(ids), np.full((len(ids), DIM), value), **options)


def apply(store: ServingStore, sequence: int, kind: str, *segments, watermark_s: int = 0) -> None:
    store.switch(store.prepare(make_manifest(sequence, kind, watermark_s=watermark_s), segments))


def held(store: ServingStore, ids, table: str = "t") -> dict[int, float]:
    """id -> the first number of its row; an absent id must have a row of zeros."""
    gathered = store.gather({table: np.array(list(ids), np.int64)})
    assert not gathered.rows_ND[table][~gathered.present_N[table]].any()
    present_N = gathered.present_N[table]
    return {
        one: float(row[0])
        for one, row, there in zip(ids, gathered.rows_ND[table], present_N, strict=True)
        if there
    }


@pytest.mark.parametrize("sent", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kept", ["as_sent", "float32", "float16", "int8"])
def test_rows_are_held_in_their_format_and_answer_within_its_error(sent, kept):
    rng = np.random.default_rng(3)
    rows_ND = rng.normal(size=(500, DIM)).astype(np.float32)
    store = ServingStore(ServingConfig(row_format=kept))
    apply(store, 1, "full", segment(range(500), rows_ND, row_format=sent))
    found_ND = store.gather({"t": np.arange(500)}).rows_ND["t"]
    error = np.sqrt(np.mean((found_ND - rows_ND) ** 2) / np.mean(rows_ND**2))
    formats = {sent, sent if kept == "as_sent" else kept}
    assert error <= max({"float32": 0.0, "float16": 5e-4, "int8": 6e-3}[one] for one in formats)
    # A delta in another format is brought to the table's.
    apply(store, 2, "delta", segment(range(500), -rows_ND, row_format="float32"))
    again_ND = store.gather({"t": np.arange(500)}).rows_ND["t"]
    assert np.sqrt(np.mean((again_ND + rows_ND) ** 2)) < 1e-2


def test_packed_rows_take_really_less_memory():
    rows_ND = np.random.default_rng(0).normal(size=(50_000, 40)).astype(np.float32)
    num_bytes = {}
    for row_format in ("float32", "float16", "int8"):
        store = ServingStore(ServingConfig(row_format=row_format))
        apply(store, 1, "full", segment(range(50_000), rows_ND))
        num_bytes[row_format] = store.num_bytes - 75_000 * 28
    assert num_bytes["float16"] == pytest.approx(num_bytes["float32"] / 2, rel=0.01)
    assert num_bytes["int8"] == pytest.approx(num_bytes["float32"] * 48 / 160, rel=0.01)


def test_int8_rows_equal_what_fbgemm_makes_of_the_same_bytes():
    torch = pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")
    rows_ND = np.random.default_rng(1).normal(size=(200, DIM)).astype(np.float32)
    one = segment(range(200), rows_ND, row_format="int8")
    store = ServingStore()
    apply(store, 1, "full", one)
    theirs = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(torch.from_numpy(one.rows_NW.copy())).numpy()
    np.testing.assert_allclose(store.gather({"t": np.arange(200)}).rows_ND["t"], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("row_format", ["float32", "float16", "int8"])
def test_random_versions_equal_a_plain_dictionary(row_format):
    rng = np.random.default_rng(5)
    store = ServingStore(ServingConfig(row_format=row_format))
    apply(store, 1, "full", filled(range(10), 0.0))
    truth = dict.fromkeys(range(10), 0.0)
    for sequence in range(2, 80):
        ids = rng.choice(3000, size=int(rng.integers(0, 200)), replace=False).tolist()
        cut = len(ids) // 3
        apply(store, sequence, "delta", filled(ids[cut:], float(sequence), deletes=ids[:cut]))
        for one in ids[:cut]:
            truth.pop(one, None)
        truth.update(dict.fromkeys(ids[cut:], float(sequence)))
        if sequence % 20 == 0:
            assert held(store, range(3000)) == truth
    assert store.num_rows == len(truth) > 1024


def test_nothing_prepared_is_visible_and_an_abandoned_preparation_costs_nothing():
    store = ServingStore()
    apply(store, 1, "full", filled([1, 2], 1.0))
    for _ in range(20):
        old = store.prepare(make_manifest(2, "delta"), [filled(range(500), 9.0)])
    assert held(store, range(5)) == {1: 1.0, 2: 1.0}
    store.switch(store.prepare(make_manifest(2, "delta"), [filled([2, 3], 2.0, deletes=[1])]))
    assert held(store, range(500)) == {2: 2.0, 3: 2.0}
    with pytest.raises(GapError, match="another version"):
        store.switch(old)


@pytest.mark.parametrize(
    ("kind", "segments", "message"),
    [
        ("delta", [filled([1], 1.0), filled([1], 2.0)], "two segments"),
        ("delta", [filled([1], 1.0), filled([], 2.0, deletes=[1])], "two segments"),
        ("delta", [segment([1], np.zeros((1, 8)))], "dim"),
        ("full", [segment([1], np.zeros((1, 8))), filled([2], 1.0)], "dims"),
        ("full", [filled([1], 1.0, deletes=[2])], "no deletes"),
        ("delta", [segment([1], np.full((1, DIM), 1e5))], "float16 rows reach"),
    ],
)
def test_a_version_that_contradicts_itself_is_refused_and_changes_nothing(kind, segments, message):
    store = ServingStore(ServingConfig(row_format="float16"))
    apply(store, 1, "full", filled([1], 1.0))
    with pytest.raises(BadBlobError, match=message):
        store.prepare(make_manifest(2, kind), segments)
    assert held(store, [1, 2]) == {1: 1.0}


# --- memory ---

BUDGET = 1 << 17


def test_memory_never_passes_the_budget_and_the_best_rows_are_held():
    """Thousands more rows than fit; the score of a row is its id. What is not held is counted."""
    store = ServingStore(ServingConfig(memory_budget_bytes=BUDGET))
    ids = np.random.default_rng(0).permutation(5000)
    apply(store, 1, "full", filled(ids, 1.0, scores=ids))
    assert store.num_bytes <= BUDGET
    found = sorted(held(store, range(5000)))
    assert len(found) > 1000
    assert found == list(range(5000 - len(found), 5000))
    assert store.not_held.over_budget == 5000 - len(found)


def test_deltas_push_the_lowest_scores_out_and_an_updated_row_is_never_left_old():
    store = ServingStore(ServingConfig(memory_budget_bytes=BUDGET))
    rng = np.random.default_rng(1)
    scores, truth = {}, {}
    apply(store, 1, "full", filled(range(100), 1.0, scores=np.ones(100)))
    truth.update(dict.fromkeys(range(100), 1.0))
    for sequence in range(2, 60):
        ids = rng.choice(8000, size=200, replace=False)
        for one in ids.tolist():
            scores[one] = float(rng.random() + one / 4000)
        apply(store, sequence, "delta", filled(ids, sequence, scores=[scores[one] for one in ids.tolist()]))
        truth.update(dict.fromkeys(ids.tolist(), float(sequence)))
        assert store.num_bytes <= BUDGET
        found = held(store, range(8000))
        assert all(truth[one] == value for one, value in found.items()), "a row of an older version"
    assert store.not_held.over_budget > 0
    assert len(found) > 900
    worth = np.array([scores.get(one, 1.0) for one in truth])
    assert np.mean([scores.get(one, 1.0) for one in found]) > worth.mean() + 0.4


def test_a_table_may_start_empty_and_grow_up_to_the_budget():
    store = ServingStore(ServingConfig(memory_budget_bytes=BUDGET))
    apply(store, 1, "full")
    for sequence in range(2, 30):
        apply(store, sequence, "delta", filled(range(50 * sequence, 50 * sequence + 50), 1.0))
        assert store.num_bytes <= BUDGET
    assert store.num_rows > 900


def test_the_oldest_rows_give_way_where_that_is_asked_for_or_no_scores_come():
    for over_budget, scores in (("oldest", np.arange(5000)[::-1]), ("lowest_score", None)):
        store = ServingStore(ServingConfig(memory_budget_bytes=BUDGET, over_budget=over_budget))
        apply(store, 1, "full", filled(range(5000), 1.0, scores=scores, seen_s=np.arange(5000)))
        found = sorted(held(store, range(5000)))
        assert found == list(range(5000 - len(found), 5000))


# --- lifetimes ---


def keys_of(class_id: int, ids) -> list[int]:
    return make_keys(np.array(list(ids)), class_id=class_id)[0].tolist()


def test_rows_past_their_serving_lifetime_are_dropped_by_class_and_counted():
    short, long = keys_of(4, range(3)), keys_of(5, range(3))
    store = ServingStore(ServingConfig(lifetime_s=1000, lifetime_s_by_class={"4": 100}))
    seen_s = [900, 950, 990]
    apply(
        store,
        1,
        "full",
        filled(short, 1.0, seen_s=seen_s),
        filled(long, 1.0, seen_s=seen_s),
        watermark_s=1020,
    )
    assert set(held(store, short)) == set(short[1:]), "the first was last seen 120 s before"
    assert set(held(store, long)) == set(long)
    assert store.not_held.expired == 1
    # The row in the middle is seen again and stays; the last one's lifetime ends.
    apply(store, 2, "delta", filled(short[1:2], 2.0, seen_s=[1080]), watermark_s=1100)
    assert held(store, short) == {short[1]: 2.0}
    assert store.not_held.expired == 2
    # What comes too late is not even loaded, and what was there under its id leaves.
    apply(store, 3, "delta", filled(short[1:2], 3.0, seen_s=[1080]), watermark_s=1200)
    assert held(store, short) == {}
    assert set(held(store, long)) == set(long)


def test_rows_without_a_sighting_live_from_the_event_time_of_their_version():
    store = ServingStore(ServingConfig(lifetime_s=100))
    apply(store, 1, "full", filled([1], 1.0), watermark_s=1000)
    apply(store, 2, "delta", watermark_s=1100)
    assert held(store, [1]) == {1: 1.0}
    apply(store, 3, "delta", watermark_s=1104)
    assert held(store, [1]) == {}


# --- one shard of rows ---


def test_replicas_of_all_shards_hold_every_row_once():
    ids = np.arange(1000)
    owners = owner_of(ids, num_owners=3)
    for rows_shard in range(3):
        store = ServingStore(ServingConfig(rows_shard=rows_shard, num_rows_shards=3))
        apply(store, 1, "full", filled(ids, 1.0))
        apply(store, 2, "delta", filled(ids[:100], 2.0, deletes=ids[100:200]))
        mine = set(ids[(owners == rows_shard) & ((ids < 100) | (ids >= 200))].tolist())
        assert set(held(store, ids.tolist())) == mine
        assert store.not_held.other_shard == 1100 - len(ids[owners == rows_shard]) - sum(
            owners[:100] == rows_shard
        )


def test_a_concurrent_reader_only_ever_sees_whole_versions():
    """Every version writes its number into every row of two tables of different formats."""
    store = ServingStore()

    def both(ids, number, deletes=()):
        return [
            filled(ids, float(number), table=table, deletes=deletes, row_format=row_format)
            for table, row_format in (("t", "int8"), ("u", "float32"))
        ]

    apply(store, 1, "full", *both(range(50), 1))
    done = threading.Event()
    seen, torn = set(), []

    def read() -> None:
        ids, last = np.arange(80), 0
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
    for number in range(2, 300):
        ids, gone = list(range(number % 30, 50)), list(range(number % 30))
        if number % 50 == 0:
            apply(store, number, "full", *both(ids, number))
        else:
            apply(store, number, "delta", *both(ids, number, gone))
    done.set()
    for reader in readers:
        reader.join()
    assert torn == []
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory_budget_bytes = 10", "memory_budget_bytes must be 0 or at least 65536"),
        ("lifetime_s = -1", "lifetime_s must not be negative"),
        ("rows_shard = 1", "rows_shard must be in 0..num_rows_shards-1, found 1 of 1"),
        ("[lifetime_s_by_class]\nitem = 3", "a feature class is 0..4095, found 'item'"),
        ("row_format = 'int4'", "int4"),
        ("budget = 1", "unknown field `budget`"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(text, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.toml.decode(text, type=ServingConfig)
