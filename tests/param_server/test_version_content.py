"""Snapshots, rollbacks and diffs: the content of a version, bit for bit, against a plain dictionary."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from feature_eviction import owner_of
from param_server.errors import GapError, LogDamageError, LogError, MissingBlobError
from param_server.local_store import LocalStore
from param_server.log_reader import LogReader
from param_server.manifest import Manifest, Version, blob_ref
from param_server.replica import Replica
from param_server.row_blobs import encode_rows, split_by_shard
from param_server.row_store import RowStore
from param_server.serving_config import ServingConfig
from param_server.shard import Shard
from param_server.sources import StoreSource
from param_server.staged_blobs import ArrivedBlob
from param_server.version_content import rows_of_chain, segments_of
from param_server.version_log import VersionLog
from proto import failpoints
from proto.row_segment import RowSegment, encode

DIM = 3
NO_IDS = np.zeros(0, np.int64)


def open_shard(folder, *, keep_full: int = 99, **options) -> Shard:
    return Shard(VersionLog(LocalStore(folder, owner="shard-0"), keep_full=keep_full), **options)


def publish(shard: Shard, kind: str, segments, *, row_format="float32", watermark_ms=None) -> Version:
    """One version; the dense blob says which one it is."""
    head = shard.log.head
    generation = shard.log.fenced_generation
    following = head is not None and head.generation == generation
    version = Version(generation, head.sequence + 1 if following else 1)
    blobs = []
    for number, segment in enumerate(segments):
        data = encode(segment, row_format=row_format)
        counts = {"num_rows": len(segment), "num_deletes": len(segment.deleted_ids_M)}
        blobs.append((blob_ref("rows", f"r-{number}", data, table=segment.table, **counts), data))
    shard.publish([ArrivedBlob(version, "rows", ref.name, data) for ref, data in blobs])
    manifest = Manifest(
        version=version,
        parent=head,
        kind=kind,
        blobs=tuple(ref for ref, _ in blobs),
        schema_hash="",
        watermark_ms=version.sequence if watermark_ms is None else watermark_ms,
        produced_ms_newest=0,
        created_ms=0,
    )
    shard.commit(manifest)
    return version


def segment(rows: dict[int, np.ndarray], deletes=(), *, table: str = "t", scores=None) -> RowSegment:
    return RowSegment(
        table,
        np.array(list(rows), np.int64),
        np.array(list(rows.values()), np.float32).reshape(-1, DIM),
        np.array(list(deletes), np.int64),
        scores_N=None if scores is None else np.array(scores, np.float32),
    )


def content(shard: Shard, version: Version) -> dict[str, dict[int, bytes]]:
    """What a reader that begins anew holds at a version."""
    store = RowStore()
    chain = shard.log.chain_to(version)
    for manifest in chain:
        rows = [one for _, _, one in segments_of([manifest], shard.log.read_blob)]
        store.switch(store.prepare(manifest, rows))
    found = {}
    for table, dim in store.dims.items():
        keys = np.arange(400)
        gathered = store.gather({table: keys})
        present = gathered.present_N[table]
        assert gathered.rows_ND[table].shape[1] == dim
        rows_ND = gathered.rows_ND[table][present]
        found[table] = {key: row.tobytes() for key, row in zip(keys[present].tolist(), rows_ND, strict=True)}
    return found


def fill(
    shard: Shard, *, num_versions: int = 30, seed: int = 3
) -> dict[Version, dict[str, dict[int, bytes]]]:
    """Random versions in two tables; what each must hold."""
    rng = np.random.default_rng(seed)
    shard.open_generation(0)
    truth: dict[str, dict[int, np.ndarray]] = {"t": {}, "u": {}}
    expected = {}
    for number in range(num_versions):
        full = number in (0, num_versions // 2)
        segments = []
        for table, rows in truth.items():
            ids = rng.choice(300, size=int(rng.integers(0, 60)), replace=False).tolist()
            cut = len(ids) // 3
            for one in ids[:cut]:
                rows.pop(one, None)
            fresh = {one: rng.normal(size=DIM).astype(np.float32) for one in ids[cut:]}
            rows.update(fresh)
            segments.append(segment(rows if full else fresh, () if full else ids[:cut], table=table))
        version = publish(shard, "full" if full else "delta", segments)
        expected[version] = {
            table: {key: row.tobytes() for key, row in rows.items()} for table, rows in truth.items()
        }
    return expected


@pytest.fixture
def shard(tmp_path):
    one = open_shard(tmp_path / "log")
    yield one
    one.log.close()


def test_every_version_has_the_rows_of_a_plain_dictionary(shard):
    expected = fill(shard)
    for version, rows in expected.items():
        assert content(shard, version) == rows
        found: dict[str, dict[int, bytes]] = {}
        for one in rows_of_chain(shard.log.chain_to(version), shard.log.read_blob):
            assert not len(one.deleted_ids_M)
            ids = one.ids_N.tolist()
            assert not set(ids) & set(found.get(one.table, {})), "an id comes once"
            found.setdefault(one.table, {}).update(
                zip(ids, (row.tobytes() for row in one.rows_ND), strict=True)
            )
        assert found == rows


def test_a_snapshot_has_its_versions_content_and_a_reader_begins_with_it(shard, tmp_path):
    expected = fill(shard)
    head = shard.log.head
    snapshot = shard.snapshot()
    assert (snapshot.version, snapshot.kind) == (head, "full")
    assert shard.log.plan_after(None) == [snapshot]
    assert content(shard, head) == expected[head]
    assert shard.snapshot() is None, "nothing is new"
    shard.log.close()
    again = open_shard(tmp_path / "log")
    assert again.log.damage == []
    assert again.log.plan_after(None) == [snapshot]
    assert content(again, head) == expected[head]
    assert again.status().num_snapshots == 1
    again.log.close()


def test_retention_counts_snapshots_and_drops_the_segments_before_them(tmp_path):
    shard = open_shard(tmp_path / "log", keep_full=1, snapshot_every=4)
    shard.open_generation(0)
    rng = np.random.default_rng(1)
    rows = {key: rng.normal(size=DIM).astype(np.float32) for key in range(50)}
    publish(shard, "full", [segment(rows)])
    for step in range(20):
        rows[step] = rng.normal(size=DIM).astype(np.float32)
        publish(shard, "delta", [segment({step: rows[step]})])
        shard.maintain(now_s=0.0)
    assert len(shard.log.plan_after(None)) <= 4
    assert shard.log.entries[0].ordinal > 15, "the only full version of the trainer is long gone"
    shard.log.collect()
    segments = list((tmp_path / "log" / "segments" / "shard-0").iterdir())
    assert len(segments) <= 4
    head = shard.log.head
    assert content(shard, head) == {"t": {key: row.tobytes() for key, row in rows.items()}}
    shard.log.close()
    again = open_shard(tmp_path / "log", keep_full=1)
    assert (again.log.damage, again.log.head) == ([], head)
    assert content(again, head) == {"t": {key: row.tobytes() for key, row in rows.items()}}
    again.log.close()


def test_retention_in_the_middle_of_a_snapshot_leaves_it_whole(tmp_path):
    shard = open_shard(tmp_path / "log", keep_full=2)
    shard.open_generation(0)
    rows = {key: np.full(DIM, key, np.float32) for key in range(20)}
    for kind in ("full", "full", "delta"):
        publish(shard, kind, [segment(rows)])
    head = shard.log.head
    failpoints.arm("snapshot_synced", hit=1, act=lambda: publish(shard, "full", [segment(rows)]))
    try:
        snapshot = shard.snapshot()
    finally:
        failpoints.disarm()
    assert snapshot.version == head < shard.log.head
    assert shard.log.entries[0].manifest.version > Version(1, 1), "retention has run meanwhile"
    shard.log.close()
    again = open_shard(tmp_path / "log", keep_full=2)
    assert again.log.damage == []
    assert content(again, head) == {"t": {key: row.tobytes() for key, row in rows.items()}}
    again.log.close()


def test_a_snapshot_that_retention_overtakes_is_given_up(tmp_path):
    shard = open_shard(tmp_path / "log", keep_full=1)
    shard.open_generation(0)
    for kind in ("full", "delta"):
        publish(shard, kind, [segment({1: np.ones(DIM, np.float32)})])
    failpoints.arm("snapshot_appended", hit=1, act=lambda: publish(shard, "full", [segment({})]))
    try:
        assert shard.snapshot() is None
    finally:
        failpoints.disarm()
    shard.log.close()
    again = open_shard(tmp_path / "log", keep_full=1)
    assert (again.log.damage, again.log.head) == ([], Version(1, 3))
    again.log.close()


def test_a_damaged_snapshot_is_put_aside_and_the_chain_serves(shard, tmp_path):
    expected = fill(shard)
    head = shard.log.head
    snapshot = shard.snapshot()
    shard.log.close()
    path = tmp_path / "log" / snapshot.rows_blobs[0].segment
    path.write_bytes(path.read_bytes()[:-30])
    again = open_shard(tmp_path / "log")
    assert any("snapshot of version" in line for line in again.log.damage)
    assert again.log.head == head
    assert content(again, head) == expected[head]
    again.log.close()


def test_a_snapshot_stands_in_for_a_damaged_delta(shard, tmp_path):
    expected = fill(shard)
    head = shard.log.head
    blob = shard.log.read(head).rows_blobs[0]
    shard.snapshot()
    following = publish(shard, "delta", [segment({1: np.ones(DIM, np.float32)})])
    shard.log.close()
    path = tmp_path / "log" / blob.segment
    data = bytearray(path.read_bytes())
    data[blob.segment_offset + 120] ^= 1
    path.write_bytes(data)
    again = open_shard(tmp_path / "log")
    assert any("its snapshot stands in" in line for line in again.log.damage)
    assert again.log.head == following
    assert content(again, head) == expected[head]
    again.log.close()


@pytest.mark.parametrize("back_to", [1, 7, 16, 25, 29])
def test_a_rollback_has_the_old_versions_rows_bit_for_bit_and_goes_forward(shard, tmp_path, back_to):
    """Versions 1 and 16 are full: behind 16 a rollback to an older one is a full version, else a delta."""
    expected = fill(shard)
    old, head = Version(1, back_to), shard.log.head
    made = shard.rollback(old, now_ms=5)
    assert made == Version(1, 31) > head
    manifest = shard.log.read(made)
    assert (manifest.parent, manifest.rollback_of, manifest.created_ms) == (head, old, 5)
    assert manifest.kind == ("full" if back_to < 16 else "delta")
    assert manifest.watermark_ms == shard.log.read(old).watermark_ms
    assert content(shard, made) == expected[old]
    # The shard's own rows, and those of a replica that held the head, are the same.
    for table, rows in expected[old].items():
        pulled = shard.pull(table, np.arange(400)).segment
        assert dict(zip(pulled.ids_N.tolist(), (r.tobytes() for r in pulled.rows_ND), strict=True)) == rows
    shard.log.close()
    again = open_shard(tmp_path / "log")
    assert content(again, made) == expected[old]
    again.log.close()


def test_a_rollback_gives_replicas_with_lifetimes_back_what_they_let_go(shard, tmp_path):
    """Event time that ran ahead made them forget rows that no version touched."""

    def seen(ids, at_s):
        rows_ND = np.ones((len(ids), DIM), np.float32)
        at_s_N = np.full(len(ids), at_s, np.int64)
        return RowSegment("t", np.array(ids, np.int64), rows_ND, NO_IDS, last_seen_s_N=at_s_N)

    def follow(replica: Replica) -> int:
        plan = replica.plan()
        replica.begin(plan)
        for received in StoreSource(LogReader(LocalStore(tmp_path / "log"))).follow(plan.held, shared={}):
            replica.apply(received, plan)
        return replica.store.num_rows

    config = ServingConfig(lifetime_s=100)
    followed = Replica(clock_ms=lambda: 0, config=config)
    old = publish(shard, "full", [seen(range(100), 1000)], watermark_ms=1_000_000)
    assert follow(followed) == 100
    publish(shard, "delta", [seen([0], 4000)], watermark_ms=4_000_000)
    assert follow(followed) == 1
    made = shard.rollback(old, now_ms=0)
    assert shard.log.read(made).kind == "full"
    assert follow(followed) == follow(Replica(clock_ms=lambda: 0, config=config)) == 100


def test_a_rollback_of_quantised_rows_restores_what_readers_had(shard):
    shard.open_generation(0)
    rng = np.random.default_rng(2)
    rows = {key: rng.normal(size=DIM).astype(np.float32) for key in range(20)}
    first = publish(shard, "full", [segment(rows)], row_format="int8")
    before = content(shard, first)
    publish(shard, "delta", [segment({key: row + 1 for key, row in rows.items()}, [30])], row_format="int8")
    made = shard.rollback(first, now_ms=0)
    assert content(shard, made) == before


def test_a_rollback_that_cannot_be_is_refused_and_changes_nothing(shard):
    fill(shard)
    head = shard.log.head
    with pytest.raises(GapError, match="is the head"):
        shard.rollback(head, now_ms=0)
    with pytest.raises(MissingBlobError, match=r"version 9\.9 is not in the log"):
        shard.rollback(Version(9, 9), now_ms=0)
    assert shard.log.head == head
    assert shard.status().refused == {"GapError": 1, "MissingBlobError": 1}


def test_a_trainer_behind_a_rollback_is_told_and_a_full_version_of_a_new_generation_goes_on(shard):
    expected = fill(shard)
    shard.rollback(Version(1, 20), now_ms=0)
    late = segment({1: np.ones(DIM, np.float32)})
    data = encode(late, row_format="float32")
    with pytest.raises(GapError, match=r"made by a rollback to 1\.20.*Open a new generation"):
        shard.publish([ArrivedBlob(Version(1, 31), "rows", "r-0", data)])
    generation, head = shard.open_generation(1)
    assert (generation, head) == (2, Version(1, 31))
    publish(shard, "full", [late])
    # A rollback while a new generation has not published yet takes that generation's first number.
    shard.open_generation(2)
    made = shard.rollback(Version(1, 31), now_ms=0)
    assert made == Version(3, 1)
    assert content(shard, made) == expected[Version(1, 20)]


def test_rot_stops_a_rollback_by_name(shard, tmp_path):
    fill(shard)
    blob = shard.log.read(Version(1, 20)).rows_blobs[0]
    path = tmp_path / "log" / blob.segment
    data = bytearray(path.read_bytes())
    data[blob.segment_offset + 120] ^= 1
    path.write_bytes(data)
    with pytest.raises(LogDamageError, match=r"version 1\.20"):
        shard.rollback(Version(1, 25), now_ms=0)
    assert shard.log.head == Version(1, 30)


def test_rows_are_cut_by_owner_and_joined_up_to_a_blobs_size():
    rows = segment({key: np.full(DIM, key, np.float32) for key in range(100)}, range(200, 260))
    parts = dict(split_by_shard(rows, num_shards=3))
    assert sorted(parts) == [0, 1, 2]
    for shard, part in parts.items():
        ids = np.concatenate([part.ids_N, part.deleted_ids_M])
        assert (owner_of(ids, num_owners=3) == shard).all()
    assert sum(len(part) for part in parts.values()) == 100
    blobs = list(encode_rows(parts.values(), prefix="x", shard=2))
    assert [ref.name for ref, _ in blobs] == ["x-shard2-000000", "x-shard2-000001"], "rows, then deletes"
    assert sum(ref.num_rows for ref, _ in blobs) == 100
    assert sum(ref.num_deletes for ref, _ in blobs) == 60


def test_the_rows_of_the_highest_scores_stay_in_memory_and_the_log_has_all(tmp_path):
    one_row = 4 * DIM + 40 + 4
    shard = open_shard(tmp_path / "log", memory_bytes_max=100 * one_row)
    shard.open_generation(0)
    rng = np.random.default_rng(4)
    scores = rng.permutation(300).astype(np.float32)
    rows = {key: rng.normal(size=DIM).astype(np.float32) for key in range(300)}
    publish(shard, "full", [segment(rows, scores=scores)])
    status = shard.status()
    assert (status.num_rows, status.num_left_out) == (100, 200)
    assert status.memory_bytes <= 100 * one_row
    pulled = shard.pull("t", np.arange(300))
    assert set(pulled.segment.ids_N.tolist()) == set(np.argsort(scores)[-100:].tolist())
    assert not pulled.complete
    np.testing.assert_array_equal(pulled.segment.scores_N, scores[pulled.segment.ids_N])
    # A delta pushes out the lowest scores that are left.
    lowest = int(np.argsort(scores)[-100])
    publish(shard, "delta", [segment({399: np.ones(DIM, np.float32)}, scores=[1000.0])])
    pulled = shard.pull("t", np.arange(400))
    assert lowest not in pulled.segment.ids_N
    assert 399 in pulled.segment.ids_N
    assert shard.status().num_rows <= 100
    head = shard.log.head
    assert len(content(shard, head)["t"]) == 301
    snapshot = shard.snapshot()
    assert sum(blob.num_rows for blob in snapshot.rows_blobs) == 301
    assert content(shard, head)["t"][lowest] == rows[lowest].tobytes()
    shard.log.close()


def test_a_pull_brings_the_columns_that_the_version_carried(shard):
    shard.open_generation(0)
    one = RowSegment(
        "t",
        np.array([5, 6]),
        np.ones((2, DIM), np.float32),
        NO_IDS,
        state_N=np.array([0.5, 0.25], np.float32),
        last_seen_s_N=np.array([70, 80]),
    )
    publish(shard, "full", [one])
    pulled = shard.pull("t", np.array([6, 9, 5]))
    assert pulled.complete
    assert pulled.segment.ids_N.tolist() == [6, 5]
    assert pulled.segment.state_N.tolist() == [0.25, 0.5]
    assert pulled.segment.last_seen_s_N.tolist() == [80, 70]
    assert pulled.segment.scores_N is None


def test_a_full_disk_at_any_step_leaves_the_last_version_and_goes_on_when_there_is_room(tmp_path):
    """A real file system of one megabyte that fills up, grows, and holds every version that was answered."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        shard = open_shard(disk / "log")
        shard.open_generation(0)
        rows = {key: np.full(DIM, key, np.float32) for key in range(300)}
        publish(shard, "full", [segment(rows)])
        refused: list[tuple[str, bool]] = []
        for step in range(4000):
            # Small versions at the end, so that also the manifest finds no room, and not only the rows.
            ids = list(rows) if step < 80 else [step % 300]
            changed = {key: np.full(DIM, step, np.float32) for key in ids}
            head = shard.log.head
            try:
                publish(shard, "delta", [segment(changed)])
                rows.update(changed)
            except LogError as error:
                refused.append((str(error), shard.log.head == head))
                if len(refused) == 200:
                    break
        assert len(refused) == 200
        assert all("No space left on device" in message and unchanged for message, unchanged in refused)
        assert shard.status().refused == {"LogError": 200}
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        publish(shard, "delta", [segment({})])
        expected = {"t": {key: row.tobytes() for key, row in rows.items()}}
        assert content(shard, shard.log.head) == expected
        head = shard.log.head
        shard.log.close()
        again = open_shard(disk / "log")
        assert (again.log.damage, again.log.head) == ([], head)
        assert content(again, head) == expected
        again.log.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
