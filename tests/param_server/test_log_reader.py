"""Readers beside the shards: what they read is whole, and what retention drops meanwhile is no damage."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from param_server.errors import GapError, LogDamageError, ManifestError, MissingBlobError
from param_server.fsspec_store import open_fsspec_store
from param_server.local_store import LocalStore
from param_server.log_reader import LogReader
from param_server.log_recovery import recover
from param_server.manifest import Manifest, Version, blob_ref
from param_server.version_log import VersionLog


def commit(log: VersionLog, kind: str = "delta", *, generation: int = 1) -> Manifest:
    head = log.head
    same = head is not None and head.generation == generation
    version = Version(generation, head.sequence + 1 if same and head is not None else 1)
    rows = f"rows of {version}".encode()
    manifest = Manifest(
        version=version,
        parent=head,
        kind=kind,
        blobs=(blob_ref("rows", "t-0", rows, table="t"),),
        schema_hash="",
        watermark_ms=0,
        produced_ms_newest=0,
        created_ms=0,
    )
    log.stage(version, kind="rows", name="t-0", data=rows)
    log.commit(manifest)
    return manifest


@pytest.fixture(params=["folder", "memory"])
def log(request, tmp_path: Path):
    """A writer's log, in both kinds of store, with 1.1 (full) .. 1.3."""
    if request.param == "folder":
        store = LocalStore(tmp_path / "log", owner="shard-0")
    else:
        store = open_fsspec_store(f"memory://{tmp_path.name}/log")
    writer = VersionLog(store, keep_full=1)
    writer.open_generation(0)
    for kind in ("full", "delta", "delta"):
        commit(writer, kind)
    yield writer
    writer.close()


def sequences(manifests: list[Manifest]) -> list[int]:
    return [manifest.version.sequence for manifest in manifests]


def test_a_reader_sees_each_version_as_soon_as_it_is_committed(log):
    reader = LogReader(log.store)
    plan = reader.plan_after(None)
    assert sequences(plan) == [1, 2, 3]
    assert [bytes(reader.read_blob(one, "t-0")) for one in plan] == [
        f"rows of 1.{number}".encode() for number in (1, 2, 3)
    ]
    assert reader.plan_after(Version(1, 3)) == []
    commit(log)
    assert sequences(reader.plan_after(Version(1, 3))) == [4]
    log.promote(Version(1, 2))
    assert reader.promoted() == Version(1, 2)
    assert sequences(reader.chain_to(Version(1, 2))) == [1, 2]


def test_a_reader_in_the_middle_of_a_version_that_retention_drops_is_told_and_begins_anew(log):
    reader = LogReader(log.store)
    plan = reader.plan_after(None)
    commit(log, "full")
    log.roll_segment()
    commit(log, "full")
    log.collect()
    with pytest.raises(MissingBlobError, match=r"not in the log \(any more\)"):
        reader.read_blob(plan[0], "t-0")
    assert len(reader.plan_after(None)) == 1
    with pytest.raises(MissingBlobError, match=r"version 1\.2 is not in the log"):
        reader.chain_to(Version(1, 2))


def test_rot_is_named_as_damage(log):
    reader = LogReader(log.store)
    plan = reader.plan_after(None)
    segment = plan[0].blobs[0].segment
    size = log.store.size(segment)
    log.store.delete(segment)
    log.store.replace(segment, b"\0" * size)
    with pytest.raises(LogDamageError, match=r"version 1\.1"):
        reader.read_blob(plan[0], "t-0")


def test_what_a_repair_put_in_the_place_of_lost_versions_is_seen(log):
    reader = LogReader(log.store)
    assert sequences(reader.plan_after(None)) == [1, 2, 3]
    log.store.set_aside("manifests/000000000003")
    assert sequences(reader.plan_after(None)) == [1, 2]
    log.store.set_aside("manifests/000000000002")
    again = VersionLog(log.store, keep_full=1)
    again.open_generation(1)
    written = commit(again, generation=again.fenced_generation)
    assert [one.version for one in reader.plan_after(None)] == [Version(1, 1), written.version]


def test_a_hole_that_is_not_repaired_yet_is_a_gap_and_no_version(log):
    log.store.set_aside("manifests/000000000002")
    with pytest.raises(GapError, match=r"version 1\.3 follows 1\.2, before it lies 1\.1"):
        LogReader(log.store).plan_after(None)


def rot(log: VersionLog, name: str) -> None:
    data = bytearray(log.store.read(name))
    data[-1] ^= 1
    log.store.replace(name, bytes(data))


def add_snapshot(log: VersionLog, version: Version) -> None:
    assert log.add_snapshot(msgspec.structs.replace(log.read(version), kind="full"))


def test_a_rotten_manifest_costs_only_the_versions_that_need_it(log):
    reader = LogReader(log.store)
    assert sequences(reader.plan_after(None)) == [1, 2, 3]
    commit(log, "full")
    commit(log)
    rot(log, "manifests/000000000002")
    for one in (reader, LogReader(log.store)):
        assert sequences(one.plan_after(None)) == [4, 5]
        assert sequences(one.chain_to(Version(1, 1))) == [1]
    for ordinal in (1, 4):
        rot(log, f"manifests/{ordinal:012d}")
    with pytest.raises(ManifestError, match="no version of the log can be loaded"):
        LogReader(log.store).plan_after(None)


def test_a_snapshot_that_was_set_aside_is_not_begun_with(log):
    reader = LogReader(log.store)
    add_snapshot(log, Version(1, 3))
    assert [one.kind for one in reader.plan_after(None)] == ["full"]
    log.store.set_aside("snapshots/000000000003")
    assert sequences(reader.plan_after(None)) == [1, 2, 3]


def test_a_rotten_snapshot_is_not_begun_with(log):
    add_snapshot(log, Version(1, 3))
    rot(log, "snapshots/000000000003")
    assert sequences(LogReader(log.store).plan_after(None)) == [1, 2, 3]


def test_retention_keeps_the_promoted_version_and_what_it_builds_on(log):
    log.promote(Version(1, 2))
    for _ in range(3):
        commit(log, "full")
        log.retain()
    assert sequences(log.manifests()) == [1, 2, 3, 4, 5, 6]
    reader = LogReader(log.store)
    assert [bytes(reader.read_blob(one, "t-0")) for one in reader.chain_to(Version(1, 2))] == [
        b"rows of 1.1",
        b"rows of 1.2",
    ]
    log.promote(Version(1, 5))
    log.retain()
    assert sequences(log.manifests()) == [5, 6]


class RetainsMeanwhile:
    """A store that drops old versions, as a live shard does, at the Nth object that is read."""

    def __init__(self, log: VersionLog, *, at_read: int) -> None:
        self._log = log
        self._left = at_read

    def read(self, name: str, *, start: int = 0, num_bytes: int | None = None) -> bytes:
        self._left -= 1
        if self._left == 0:
            self._log.collect()
        return self._log.store.read(name, start=start, num_bytes=num_bytes)

    def __getattr__(self, name: str):
        return getattr(self._log.store, name)


@pytest.mark.parametrize("at_read", range(1, 16))
def test_what_retention_removes_while_a_command_reads_the_log_is_no_damage(tmp_path, at_read):
    log = VersionLog(LocalStore(tmp_path / "log", owner="shard-0"), keep_full=9, segment_bytes_max=1)
    log.open_generation(0)
    for kind in ("full", "delta", "full", "delta"):
        commit(log, kind)
    log._keep_full = 1
    recovered = recover(RetainsMeanwhile(log, at_read=at_read), repair=False)
    assert recovered.damage == []
    assert sequences([entry.manifest for entry in recovered.entries])[-2:] == [3, 4]
    if at_read < 8:
        assert sequences(log.manifests()) == [3, 4], "retention ran while the log was read"
    log.close()
