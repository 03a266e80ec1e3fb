"""A shard beside the coordinator follows the log through retention, repair and rot, or says it cannot."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import structlog

from feature_eviction import owner_of
from param_server import shard_process
from param_server.errors import GapError, ManifestError
from param_server.log_recovery import MANIFESTS, SNAPSHOTS, ordinal_name
from param_server.manifest import Manifest, Version, blob_ref
from param_server.shard import Shard
from param_server.snapshots import make_snapshot
from param_server.staged_blobs import ArrivedBlob
from param_server.version_log import VersionLog
from proto.row_segment import RowSegment, encode
from tests.simulation.disk import SimulatedDisk, SimulatedStore

IDS = np.arange(40, dtype=np.int64)
OWN_IDS = IDS[owner_of(IDS, num_owners=2) == 1]
"""Those of shard 1."""


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk(1)


def open_log(disk: SimulatedDisk, shard: int, **options) -> VersionLog:
    return VersionLog(SimulatedStore(disk, owner=f"shard-{shard}"), shard=shard, num_shards=2, **options)


def describe(log: VersionLog, kind: str, *, value: float) -> tuple[Manifest, bytes]:
    """A version whose one blob holds all rows of shard 1."""
    head = log.head
    version = Version(log.fenced_generation, head.sequence + 1 if head is not None else 1)
    rows_ND = np.full((len(OWN_IDS), 2), value, np.float32)
    data = encode(RowSegment("t", OWN_IDS, rows_ND, np.zeros(0, np.int64)), row_format="float32")
    blob = blob_ref("rows", "t-1", data, table="t", num_rows=len(OWN_IDS), shard=1)
    manifest = Manifest(
        version=version,
        parent=head,
        kind=kind,
        blobs=(blob,),
        schema_hash="",
        watermark_ms=0,
        produced_ms_newest=0,
        created_ms=0,
    )
    return manifest, data


def commit(first: Shard, other: Shard, kind: str, *, value: float) -> Version:
    """Through both shards, as a publisher does it; shard 1 is not told of the commit."""
    manifest, data = describe(first.log, kind, value=value)
    other.publish([ArrivedBlob(manifest.version, "rows", "t-1", data)])
    first.commit(msgspec.structs.replace(manifest, blobs=tuple(other.prepare_part(manifest))))
    return manifest.version


def make_shards(disk: SimulatedDisk, *, keep_full: int = 9) -> tuple[Shard, Shard]:
    first = Shard(open_log(disk, 0, keep_full=keep_full), num_shards=2)
    first.open_generation(0)
    other = Shard(open_log(disk, 1), num_shards=2)
    other.open_generation(0)
    return first, other


def test_a_shard_whose_next_version_was_dropped_says_so_and_starts_again(disk):
    first, other = make_shards(disk, keep_full=1)
    commit(first, other, "full", value=1)
    other.take_over()
    commit(first, other, "delta", value=2)
    first.rollback(Version(1, 1), now_ms=0)
    assert first.snapshot() is not None
    with pytest.raises(GapError, match="start this shard again"):
        other.take_over()
    again = Shard(open_log(disk, 1), num_shards=2)
    assert again.log.head == Version(1, 3)
    assert again.pull("t", OWN_IDS).version == Version(1, 3)


def test_a_shard_that_holds_nothing_says_that_the_beginning_is_gone(disk):
    first, other = make_shards(disk, keep_full=1)
    late = Shard(open_log(disk, 1), num_shards=2)
    for value in (1, 2):
        commit(first, other, "full", value=value)
        other.take_over()
    with pytest.raises(GapError, match="whose beginning is gone"):
        late.take_over()
    assert Shard(open_log(disk, 1), num_shards=2).log.head == Version(1, 2)


def test_a_shard_learns_that_the_coordinators_head_fell_back(disk):
    first, other = make_shards(disk)
    for kind, value in (("full", 1), ("delta", 2), ("delta", 3)):
        commit(first, other, kind, value=value)
    assert other.take_over() == 1
    disk.flip_bit(ordinal_name(MANIFESTS, 3))
    repaired = open_log(disk, 0)
    assert (repaired.head, len(repaired.damage)) == (Version(1, 2), 2)
    with pytest.raises(GapError, match=r"version 1.3, this shard's head, is not in the log any more"):
        other.take_over()
    assert open_log(disk, 1).head == Version(1, 2)


def test_a_coordinator_writes_rotten_manifests_anew_so_that_other_shards_can_start(disk):
    first, other = make_shards(disk)
    for kind, value in (("full", 1), ("delta", 2)):
        commit(first, other, kind, value=value)
    first.snapshot()
    rotten = [ordinal_name(MANIFESTS, 2), ordinal_name(SNAPSHOTS, 2)]
    for name in rotten:
        disk.flip_bit(name)
    with pytest.raises(ManifestError, match="torn or rotten"):
        Shard(open_log(disk, 1), num_shards=2).take_over()
    mended = [first.log.scrub() for _ in range(8)]
    assert sorted(name for name in mended if name) == sorted(rotten)
    assert [line for line in first.log.damage if "written anew" in line] == first.log.damage
    assert open_log(disk, 1).head == first.log.head == Version(1, 2)
    assert open_log(disk, 0).damage == []


def test_the_work_beside_a_shard_waits_until_a_rotten_manifest_is_mended_and_says_so_once(disk):
    first, other = make_shards(disk)
    for kind, value in (("full", 1), ("delta", 2)):
        commit(first, other, kind, value=value)
    disk.flip_bit(ordinal_name(MANIFESTS, 2))

    class Turns:
        """The signal to stop, which comes after the tenth turn; before the sixth the coordinator mends."""

        num = 0

        def wait(self, timeout_s: float) -> bool:
            self.num += 1
            while self.num == 6 and not first.log.scrub():
                pass
            return self.num > 10

    with structlog.testing.capture_logs() as logs:
        shard_process.maintain(other, Turns())
    said = [line["reason"] for line in logs if line["event"].startswith("the log cannot be maintained")]
    assert said == [f"object {ordinal_name(MANIFESTS, 2)}: its checksum differs; it is torn or rotten"]
    assert other.log.head == first.log.head == Version(1, 2)


def test_rot_in_a_shards_rows_keeps_it_at_the_version_before_until_a_full_one_comes(disk):
    first, other = make_shards(disk)
    commit(first, other, "full", value=1)
    other.take_over()
    other.log.roll_segment()
    commit(first, other, "delta", value=2)
    (segment,) = [blob.segment for blob in first.log.read(Version(1, 2)).blobs]
    disk.flip_bit(segment)
    again = Shard(open_log(disk, 1), num_shards=2)
    assert again.log.head == Version(1, 2)
    pulled = again.pull("t", OWN_IDS)
    assert pulled.version == Version(1, 1)
    assert set(pulled.segment.rows_ND.ravel()) == {1.0}
    with pytest.raises(GapError, match=r"changes 1.2, but 1.1 is held"):
        commit(first, again, "delta", value=3)
    commit(first, again, "full", value=4)
    again.take_over()
    pulled = again.pull("t", OWN_IDS)
    assert pulled.version == again.log.head == Version(1, 3)
    assert set(pulled.segment.rows_ND.ravel()) == {4.0}


def test_a_view_taken_in_the_midst_of_retention_begins_with_a_base(disk):
    first, other = make_shards(disk, keep_full=1)
    for kind, value in (("full", 1), ("delta", 2), ("delta", 3)):
        commit(first, other, kind, value=value)
    other.take_over()
    assert make_snapshot(first.log, Version(1, 3), num_shards=2) is not None
    store = SimulatedStore(disk, owner="shard-0")
    store.delete(ordinal_name(MANIFESTS, 1))
    other.log.refresh()
    assert [entry.manifest.version for entry in other.log.entries] == [Version(1, 3)]
    assert other.log.chain_to(Version(1, 3))[0].kind == "full"


def test_a_shard_that_cannot_read_a_manifest_drops_nothing_that_it_may_name(disk):
    first, other = make_shards(disk, keep_full=1)
    for kind in ("full", "delta", "delta", "delta", "full"):
        other.log.roll_segment()
        commit(first, other, kind, value=1)
        other.take_over()
        if kind == "full" and first.log.promoted() is None:
            first.log.promote(Version(1, 1))
    disk.flip_bit(ordinal_name(MANIFESTS, 3))
    other = Shard(open_log(disk, 1), num_shards=2)
    known = [entry.manifest.version.sequence for entry in other.log.entries]
    assert known == [1, 2, 5], "the fourth builds on the one that cannot be read"
    assert [one.version.sequence for one in other.log.chain_to(Version(1, 2))] == [1, 2]
    commit(first, other, "full", value=2)
    other.take_over()
    while not first.log.scrub():
        pass
    other.log.refresh()
    for log in (first.log, other.log):
        assert [entry.manifest.version.sequence for entry in log.entries] == [1, 2, 3, 4, 5, 6]
        for manifest in log.manifests():
            log.read_blob(manifest, "t-1")


def test_segments_of_a_fenced_writer_are_dropped_by_their_shard(disk):
    first, other = make_shards(disk)
    commit(first, other, "full", value=1)
    other.take_over()
    folder = "segments/shard-1/"
    before = len(other.log.store.list(folder))
    for generation in range(2, 6):
        manifest, data = describe(first.log, "delta", value=generation)
        other.publish([ArrivedBlob(manifest.version, "rows", "t-1", data)])
        first.open_generation(0)
        other.open_generation(0)
        other.log.roll_segment()
        other.take_over()
        assert len(other.log.store.list(folder)) == before
    assert set(other.pull("t", OWN_IDS).segment.rows_ND.ravel()) == {1.0}
