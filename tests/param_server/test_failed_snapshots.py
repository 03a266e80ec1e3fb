"""What a failed snapshot, or a version that never came to be, leaves on the disk: nothing that stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from param_server.errors import LogDamageError, LogError
from param_server.manifest import Manifest, Version, blob_ref, content_name
from param_server.shard import SNAPSHOT_WAIT_S, Shard
from param_server.signature import ServingSignature, SignatureFeature, encode_signature
from param_server.staged_blobs import ArrivedBlob
from param_server.version_log import VersionLog
from proto.row_segment import RowSegment, encode
from proto.tensor_blob import encode_tensors
from tests.simulation.disk import SimulatedDisk, SimulatedStore

SEGMENTS = "segments/"
DENSE = encode_tensors({"weight": np.zeros(2, np.float32)}, metadata={})
SIGNATURE = ServingSignature(
    model_name="m",
    schema_hash="s",
    features=(SignatureFeature(name="item_id", class_id=4, table="t", dim=8),),
    domains=("d",),
    tasks=("click",),
)
SHARED = (("program", b"program"), ("signature", encode_signature(SIGNATURE)))


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk(1)


@pytest.fixture
def shard(disk: SimulatedDisk) -> Shard:
    made = Shard(VersionLog(SimulatedStore(disk, owner="shard-0")), snapshot_every=2)
    made.open_generation(0)
    return made


def publish(shard: Shard) -> Manifest:
    """Rows and a dense blob, each in a segment of its own, without a commit."""
    head = shard.log.head
    same = head is not None and head.generation == shard.log.fenced_generation
    version = Version(shard.log.fenced_generation, head.sequence + 1 if same and head is not None else 1)
    ids = np.arange(50, dtype=np.int64)
    rows_ND = np.full((len(ids), 8), version.sequence, np.float32)
    rows = encode(RowSegment("t", ids, rows_ND, np.zeros(0, np.int64)), row_format="float32")
    shard.log.roll_segment()
    shard.publish([ArrivedBlob(version, "rows", "t-0", rows)])
    shard.log.roll_segment()
    shard.publish([ArrivedBlob(version, "dense", "dense", DENSE)])
    shard.publish([ArrivedBlob(version, kind, content_name(kind, data), data) for kind, data in SHARED])
    return Manifest(
        version=version,
        parent=head,
        kind="full" if head is None else "delta",
        blobs=(
            blob_ref("rows", "t-0", rows, table="t", num_rows=len(ids)),
            blob_ref("dense", "dense", DENSE),
            *(blob_ref(kind, content_name(kind, data), data) for kind, data in SHARED),
        ),
        schema_hash="s",
        watermark_ms=0,
        produced_ms_newest=0,
        created_ms=0,
    )


def num_segments(shard: Shard) -> int:
    return len(shard.log.store.list(SEGMENTS))


def test_what_a_failed_snapshot_appended_is_dropped(disk, shard):
    for _ in range(3):
        shard.commit(publish(shard))
    dense = shard.log.read(Version(1, 3)).blob("dense")
    assert dense is not None
    disk.flip_bit(dense.segment)
    before = shard.log.store.list(SEGMENTS)
    for _ in range(4):
        with pytest.raises(LogDamageError, match="dense"):
            shard.snapshot()
        assert shard.log.store.list(SEGMENTS) == before


def test_a_failed_snapshot_is_tried_again_later_and_not_at_once(disk, shard):
    for _ in range(3):
        shard.commit(publish(shard))
    disk.faults.full = True
    shard.maintain(now_s=100.0)
    disk.faults.full = False
    shard.maintain(now_s=100.0 + SNAPSHOT_WAIT_S - 1)
    assert shard.status().num_snapshots == 0
    shard.maintain(now_s=100.0 + SNAPSHOT_WAIT_S)
    assert shard.status().num_snapshots == 1


def test_a_snapshot_does_not_stand_on_a_segment_that_a_publishers_sync_lost(disk, shard, monkeypatch):
    """The publisher alone hears that the sync failed; the snapshot's own comes in the segment after."""
    for _ in range(2):
        shard.commit(publish(shard))
    append = VersionLog.append_snapshot
    told = []

    def append_and_lose(self: VersionLog, *arguments: Any, **options: Any) -> tuple[str, int]:
        place = append(self, *arguments, **options)
        if not told:
            disk.faults.error_rate = 1.0
            with pytest.raises(LogError) as caught:
                shard.log.sync()
            disk.faults.error_rate = 0.0
            told.append(str(caught.value))
        return place

    monkeypatch.setattr(VersionLog, "append_snapshot", append_and_lose)
    with pytest.raises(LogError, match="could not be made durable, and so no snapshot"):
        shard.snapshot()
    assert told
    assert [str(info.version) for info in shard.versions()] == ["1.1", "1.2"]
    monkeypatch.setattr(VersionLog, "append_snapshot", append)
    made = shard.snapshot()
    assert made is not None
    assert made.version == Version(1, 2)
    shard.log.close()
    disk.lose_power("shard-0")
    again = VersionLog(SimulatedStore(disk, owner="shard-0"))
    assert (again.head, again.damage) == (Version(1, 2), [])


def test_what_fenced_writers_left_is_dropped_when_a_generation_is_opened(disk, shard):
    shard.commit(publish(shard))
    publish(shard)
    shard.open_generation(0)
    before = num_segments(shard)
    for _ in range(5):
        publish(shard)
        shard.open_generation(0)
        assert num_segments(shard) == before
    head = Version(1, 1)
    assert bytes(shard.log.read_blob(shard.log.read(head), "dense")) == DENSE
    shard.commit(publish(shard))
    again = VersionLog(SimulatedStore(disk, owner="shard-0"))
    assert (again.damage, again.head) == ([], Version(7, 1))
