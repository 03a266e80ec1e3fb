"""The version log: commits, fencing, idempotence, retention, damage."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from param_server import durable_files, local_store, log_recovery
from param_server.errors import (
    BadBlobError,
    ConflictError,
    FencedError,
    GapError,
    LimitError,
    LogDamageError,
    LogError,
    MissingBlobError,
)
from param_server.fsspec_store import open_fsspec_store
from param_server.local_store import LocalStore
from param_server.log_recovery import recover
from param_server.manifest import Manifest, Version, blob_ref, content_name, encode_manifest
from param_server.version_log import VersionLog

PROGRAM, SIGNATURE = b"program", b"signature"
PROGRAM_NAME = content_name("program", PROGRAM)


def make_manifest(
    version: Version, kind: str, *, parent: Version | None, program: bytes = PROGRAM
) -> Manifest:
    rows = f"rows of {version}".encode()
    return Manifest(
        version=version,
        parent=parent,
        kind=kind,
        blobs=(
            blob_ref("rows", "t-0", rows, table="t"),
            blob_ref("dense", "dense", b"dense"),
            blob_ref("program", content_name("program", program), program),
            blob_ref("signature", content_name("signature", SIGNATURE), SIGNATURE),
        ),
        schema_hash="",
        watermark_ms=0,
        produced_ms_newest=0,
        created_ms=0,
    )


def stage(log: VersionLog, manifest: Manifest, *, program: bytes | None = PROGRAM) -> None:
    version = manifest.version
    log.stage(version, kind="rows", name="t-0", data=f"rows of {version}".encode())
    log.stage(version, kind="dense", name="dense", data=b"dense")
    if program is not None:
        log.stage(version, kind="program", name=content_name("program", program), data=program)
        name = content_name("signature", SIGNATURE)
        log.stage(version, kind="signature", name=name, data=SIGNATURE)


def open_log(folder: Path, **options) -> VersionLog:
    return VersionLog(LocalStore(folder, owner="shard-0"), **options)


def commit(log: VersionLog, sequence: int, kind: str = "delta", *, generation: int = 1) -> Manifest:
    manifest = make_manifest(Version(generation, sequence), kind, parent=log.head)
    stage(log, manifest)
    assert log.commit(manifest) is False
    return manifest


def fill(folder: Path, kinds: str, *, keep_full: int = 9, **options) -> VersionLog:
    """One version a letter: F full, d delta."""
    log = open_log(folder, keep_full=keep_full, **options)
    log.open_generation(0)
    for sequence, letter in enumerate(kinds, start=1):
        commit(log, sequence, "full" if letter == "F" else "delta")
    return log


def sequences(versions) -> list[int]:
    return [version.sequence for version in versions]


def reopen(log: VersionLog, folder: Path, **options) -> VersionLog:
    log.close()
    return open_log(folder, **{"keep_full": 9, **options})


def plan(log: VersionLog, held: Version | None) -> list[int]:
    return sequences(manifest.version for manifest in log.plan_after(held))


def read(log: VersionLog, version: Version, name: str = "t-0") -> bytes:
    return bytes(log.read_blob(log.read(version), name))


def names(folder: Path, below: str) -> list[str]:
    return sorted(path.name for path in (folder / below).iterdir())


def test_committed_versions_are_there_after_a_restart(tmp_path):
    log = fill(tmp_path, "Fdd")
    before = log.manifests()
    log = reopen(log, tmp_path)
    assert log.manifests() == before
    assert log.head == Version(1, 3)
    assert log.damage == []
    assert read(log, Version(1, 2)) == b"rows of 1.2"
    assert log.read(Version(1, 1)).kind == "full"


def test_a_reader_gets_what_follows_it_or_the_newest_full_version(tmp_path):
    log = fill(tmp_path, "FddFdd")
    assert plan(log, None) == [4, 5, 6]
    assert plan(log, Version(1, 5)) == [6]
    assert plan(log, Version(1, 4)) == [5, 6]
    assert plan(log, Version(1, 2)) == [4, 5, 6], "fewer bytes than 3, 4, 5, 6"
    assert plan(log, Version(1, 6)) == []
    assert plan(log, Version(0, 9)) == [4, 5, 6], "not an ancestor"
    assert plan(log, Version(1, 7)) == [], "ahead of the log: it waits"
    assert open_log(tmp_path / "empty").plan_after(None) == []
    assert [log.num_after(held) for held in (None, Version(1, 2), Version(1, 6), Version(1, 9))] == [
        6,
        4,
        0,
        0,
    ]


def test_staged_blobs_without_a_commit_are_gone_after_a_restart(tmp_path):
    log = fill(tmp_path, "F")
    stage(log, make_manifest(Version(1, 2), "delta", parent=log.head), program=b"other")
    log = reopen(log, tmp_path)
    assert log.head == Version(1, 1)
    assert log.damage == []
    with pytest.raises(MissingBlobError, match="publish the version again"):
        log.commit(make_manifest(Version(1, 2), "delta", parent=log.head))
    log.collect()
    assert len(names(tmp_path, "content")) == 2


def test_a_torn_tail_that_no_manifest_names_is_no_damage_and_goes_with_its_segment(tmp_path):
    log = fill(tmp_path, "F")
    stage(log, make_manifest(Version(1, 2), "delta", parent=log.head))
    log.close()
    (segment,) = (tmp_path / "segments" / "shard-0").iterdir()
    segment.write_bytes(segment.read_bytes()[:-20])
    log = open_log(tmp_path, keep_full=1)
    assert log.damage == []
    assert read(log, Version(1, 1)) == b"rows of 1.1"
    for sequence, kind in ((2, "delta"), (3, "full")):
        commit(log, sequence, kind)
    log.collect()
    assert names(tmp_path, "segments/shard-0") == ["00000002"]
    assert read(log, Version(1, 3)) == b"rows of 1.3"


def test_a_repeated_commit_and_publish_change_nothing(tmp_path):
    log = fill(tmp_path, "Fd")
    manifest = log.read(Version(1, 2))
    stage(log, manifest)
    assert log.commit(manifest) is True
    assert log.head == Version(1, 2)
    with pytest.raises(ConflictError):
        log.stage(Version(1, 2), kind="rows", name="t-0", data=b"other rows")
    with pytest.raises(ConflictError):
        log.commit(make_manifest(Version(1, 2), "full", parent=Version(1, 1)))
    assert read(log, Version(1, 2)) == b"rows of 1.2"


def test_an_older_generation_is_fenced_for_good(tmp_path):
    log = fill(tmp_path, "F")
    assert log.open_generation(0) == (2, Version(1, 1))
    assert log.open_generation(10) == (11, Version(1, 1))
    log = reopen(log, tmp_path)
    assert log.fenced_generation == 11
    for generation in (1, 10):
        manifest = make_manifest(Version(generation, 2), "delta", parent=log.head)
        with pytest.raises(FencedError, match="generation 11"):
            stage(log, manifest)
        with pytest.raises(FencedError, match="generation 11"):
            log.commit(manifest)
    commit(log, 1, "full", generation=11)
    assert log.head == Version(11, 1)


def test_a_new_generation_drops_what_the_old_one_had_staged(tmp_path):
    log = fill(tmp_path, "F")
    for sequence in range(2, 6):
        stage(log, make_manifest(Version(1, sequence), "delta", parent=log.head))
    generation, head = log.open_generation(0)
    stage(log, make_manifest(Version(generation, 1), "full", parent=head))  # there is room for it again
    log.commit(make_manifest(Version(generation, 1), "full", parent=head))


@pytest.mark.parametrize(
    ("version", "kind", "parent"),
    [
        (Version(1, 4), "delta", Version(1, 3)),
        (Version(1, 4), "delta", Version(1, 2)),
        (Version(1, 4), "full", None),
        (Version(1, 3), "delta", Version(1, 1)),
        (Version(2, 1), "delta", Version(1, 1)),
    ],
)
def test_a_version_that_does_not_follow_the_head_is_refused(tmp_path, version, kind, parent):
    log = fill(tmp_path, "Fd")
    manifest = make_manifest(version, kind, parent=parent)
    stage(log, manifest)
    with pytest.raises(GapError, match=str(version)):
        log.commit(manifest)
    assert log.head == Version(1, 2)


def test_the_first_version_of_a_log_must_be_full(tmp_path):
    log = open_log(tmp_path)
    manifest = make_manifest(Version(1, 2), "delta", parent=Version(1, 1))
    stage(log, manifest)
    with pytest.raises(GapError):
        log.commit(manifest)
    assert log.head is None


def test_an_unchanged_program_need_not_be_sent_again(tmp_path):
    log = fill(tmp_path, "F")
    manifest = make_manifest(Version(1, 2), "delta", parent=log.head)
    stage(log, manifest, program=None)
    log.commit(manifest)
    assert read(log, Version(1, 2), content_name("program", PROGRAM)) == PROGRAM
    unknown = make_manifest(Version(1, 3), "delta", parent=log.head, program=b"never sent")
    stage(log, unknown, program=None)
    with pytest.raises(MissingBlobError, match="program-"):
        log.commit(unknown)


def test_a_program_under_a_wrong_name_is_refused(tmp_path):
    log = open_log(tmp_path)
    name = content_name("program", b"something else")
    with pytest.raises(BadBlobError, match="SHA-256"):
        log.stage(Version(1, 1), kind="program", name=name, data=PROGRAM)


def test_a_blob_that_differs_from_the_manifest_is_refused_and_can_be_replaced(tmp_path):
    log = open_log(tmp_path)
    manifest = make_manifest(Version(1, 1), "full", parent=None)
    stage(log, manifest)
    log.stage(Version(1, 1), kind="rows", name="t-0", data=b"rows of 9.9")
    with pytest.raises(BadBlobError, match="'t-0'"):
        log.commit(manifest)
    assert log.head is None
    log.stage(Version(1, 1), kind="rows", name="t-0", data=b"rows of 1.1")
    assert log.commit(manifest) is False


def test_what_a_given_up_attempt_left_is_not_part_of_the_version(tmp_path):
    log = open_log(tmp_path)
    log.stage(Version(1, 1), kind="rows", name="t-7", data=b"given up")
    commit(log, 1, "full")
    log = reopen(log, tmp_path)
    assert sorted(blob.name for blob in log.read(Version(1, 1)).blobs)[:2] == ["dense", f"{PROGRAM_NAME}"]
    assert "t-7" not in {blob.name for blob in log.read(Version(1, 1)).blobs}


def test_the_number_of_staged_versions_is_bounded(tmp_path):
    log = fill(tmp_path, "F")
    for sequence in range(2, 6):
        log.stage(Version(1, sequence), kind="rows", name="t-0", data=b"x")
    with pytest.raises(LimitError, match=r"1\.6"):
        log.stage(Version(1, 6), kind="rows", name="t-0", data=b"x")


@pytest.mark.parametrize("keep_full", [1, 2])
def test_retention_keeps_the_newest_full_versions_and_what_follows(tmp_path, keep_full):
    log = fill(tmp_path, "FddFdFdd", keep_full=keep_full, segment_bytes_max=1)
    old = log.read(Version(1, 1))
    assert log.retain() == (5 if keep_full == 1 else 3)
    kept = [6, 7, 8] if keep_full == 1 else [4, 5, 6, 7, 8]
    assert sequences(manifest.version for manifest in log.manifests()) == kept
    assert names(tmp_path, "manifests") == [f"{position:012d}" for position in kept]
    assert len(names(tmp_path, "segments/shard-0")) == 2 * len(kept), "a rows and a dense record a version"
    log = reopen(log, tmp_path, keep_full=keep_full)
    assert log.damage == []
    assert sequences(manifest.version for manifest in log.manifests()) == kept
    with pytest.raises(MissingBlobError, match="not in the log"):
        log.read_blob(old, "t-0")


def test_retention_drops_programs_that_no_version_names(tmp_path):
    log = fill(tmp_path, "Fd", keep_full=1)
    manifest = make_manifest(Version(1, 3), "full", parent=log.head, program=b"new")
    stage(log, manifest, program=b"new")
    log.commit(manifest)
    log.retain()
    expected = sorted([content_name("program", b"new"), content_name("signature", SIGNATURE)])
    assert names(tmp_path, "content") == expected


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def rot(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [tear, rot, remove])
@pytest.mark.parametrize("part", ["rows", "manifest"])
@pytest.mark.parametrize(
    ("broken", "left"),
    [(6, [1, 2, 3, 4, 5]), (5, [1, 2, 3, 4]), (4, [1, 2, 3]), (2, [1, 4, 5, 6]), (1, [4, 5, 6])],
)
def test_damage_is_named_and_the_head_is_the_newest_whole_chain(tmp_path, damage, part, broken, left):
    log = fill(tmp_path, "FddFdd", segment_bytes_max=1)
    segment = next(blob.segment for blob in log.read(Version(1, broken)).blobs if blob.name == "t-0")
    damage(tmp_path / (segment if part == "rows" else f"manifests/{broken:012d}"))
    reader = recover(LocalStore(tmp_path), repair=False)
    log = reopen(log, tmp_path)
    assert [entry.manifest for entry in reader.entries] == log.manifests()
    assert sequences(manifest.version for manifest in log.manifests()) == left
    for manifest in log.manifests():
        log.read_blob(manifest, "t-0")
    removed_manifest = damage is remove and part == "manifest"
    if removed_manifest and broken in (1, 6):
        return  # a log whose first or last manifest is not there looks like a shorter log
    # Which version is broken is said, or, where its manifest is not even there, which one follows it.
    assert any(f"1.{broken}" in line or f"{broken:012d}" in line for line in log.damage)
    assert list((tmp_path / "damaged").iterdir())
    if 6 not in left:
        # Lost version numbers must not be used twice: their writer is fenced.
        assert log.fenced_generation == 2
        with pytest.raises(FencedError):
            commit(log, left[-1] + 1, "full")
    again = reopen(log, tmp_path)
    assert again.damage == []
    assert sequences(manifest.version for manifest in again.manifests()) == left
    generation, _ = again.open_generation(0)
    commit(again, 1, "full", generation=generation)


def test_readers_go_on_across_what_recovery_has_set_aside(tmp_path):
    log = fill(tmp_path, "FddFdd", segment_bytes_max=1)
    rot(tmp_path / "manifests/000000000002")
    log = reopen(log, tmp_path)
    assert sequences(manifest.version for manifest in log.manifests()) == [1, 4, 5, 6]
    commit(log, 7)
    for held, after in ((1, [4, 5, 6, 7]), (4, [5, 6, 7]), (5, [6, 7]), (6, [7]), (7, [])):
        assert plan(log, Version(1, held)) == after
        assert log.num_after(Version(1, held)) == len(after)


def test_a_repair_that_raises_the_generation_keeps_the_writers_name(tmp_path):
    log = open_log(tmp_path)
    log.open_generation(0, writer="trainer-a")
    for sequence, kind in ((1, "full"), (2, "delta")):
        commit(log, sequence, kind)
    rot(tmp_path / "manifests/000000000002")
    log = reopen(log, tmp_path)
    assert (log.fenced_generation, log.fenced_by) == (2, "trainer-a")


def test_a_damaged_program_breaks_the_versions_that_name_it(tmp_path):
    log = fill(tmp_path, "Fd")
    rot(tmp_path / "content" / content_name("program", PROGRAM))
    log = reopen(log, tmp_path)
    assert log.head is None
    assert any("program-" in line for line in log.damage)
    generation, _ = log.open_generation(0)
    commit(log, 1, "full", generation=generation)
    assert reopen(log, tmp_path).head == Version(generation, 1)


def test_rot_while_running_is_found_when_the_blob_is_read(tmp_path):
    log = fill(tmp_path, "F")
    path = tmp_path / "segments" / "shard-0" / "00000001"
    path.write_bytes(path.read_bytes().replace(b"rows of", b"rowz of"))
    with pytest.raises(LogDamageError, match=r"version 1\.1: blob 't-0'"):
        read(log, Version(1, 1))


def test_a_damaged_generation_file_never_lets_an_old_writer_in(tmp_path):
    log = fill(tmp_path, "F")
    (tmp_path / "generation").write_bytes(b"\x00\xff")
    log = reopen(log, tmp_path)
    assert any("generation" in line for line in log.damage)
    assert log.fenced_generation >= 1
    assert log.open_generation(0)[0] > 1


def test_a_generation_of_another_number_under_the_old_seal_is_damage(tmp_path):
    log = fill(tmp_path, "F")
    log.open_generation(0, writer="me")
    log = reopen(log, tmp_path)
    assert (log.fenced_generation, log.fenced_by) == (2, "me")
    path = tmp_path / "generation"
    path.write_bytes(path.read_bytes().replace(b"2 me", b"1 me"))
    log = reopen(log, tmp_path)
    assert any("object generation: torn or rotten" in line for line in log.damage)
    assert (log.fenced_generation, log.fenced_by) == (1, "")


def test_one_process_at_a_time_has_the_log_open(tmp_path):
    log = open_log(tmp_path)
    with pytest.raises(LogError, match="another process"):
        open_log(tmp_path)
    log.close()
    open_log(tmp_path).close()


class FsyncWatch:
    """What was written or named and not synced since."""

    def __init__(self, monkeypatch) -> None:
        self.synced: set[int] = set()
        self.unsynced_folders: set[Path] = set()
        self.links: list[tuple[str, set[Path], set[int]]] = []
        self.unsynced_segments: set[int] = set()
        for name in ("fsync", "fdatasync", "replace", "link", "pwritev"):
            monkeypatch.setattr(os, name, self._watching(name, getattr(os, name)))

    def _watching(self, name, function):
        def call(*arguments):
            if name in ("fsync", "fdatasync"):
                inode = os.fstat(arguments[0]).st_ino
                self.synced.add(inode)
                self.unsynced_segments.discard(inode)
                self.unsynced_folders.discard(Path(os.readlink(f"/proc/self/fd/{arguments[0]}")))
            elif name == "pwritev":
                self.unsynced_segments.add(os.fstat(arguments[0]).st_ino)
            else:
                source, target = Path(arguments[0]), Path(arguments[1])
                assert os.stat(source).st_ino in self.synced, f"{target} is named before it is durable"
                if name == "link" and target.parent.name == "manifests":
                    self.links.append((target.name, set(self.unsynced_folders), set(self.unsynced_segments)))
                function(*arguments)
                self.unsynced_folders.add(target.parent)
                return None
            return function(*arguments)

        return call


def test_everything_is_durable_before_the_manifest_and_the_manifest_before_the_answer(tmp_path, monkeypatch):
    log = open_log(tmp_path)
    watch = FsyncWatch(monkeypatch)
    log.open_generation(0)
    assert watch.unsynced_folders == set()
    for sequence, kind in ((1, "full"), (2, "delta")):
        commit(log, sequence, kind)
        assert watch.unsynced_folders == set(), "a name that a crash of the machine could lose"
    assert watch.links == [("000000000001", set(), set()), ("000000000002", set(), set())]
    stage(log, make_manifest(Version(1, 3), "delta", parent=log.head))
    assert len(watch.unsynced_segments) == 1
    log.sync()
    assert watch.unsynced_segments == set(), "what publish answers for is durable"


def test_a_failed_sync_forgets_what_nobody_knows_of_and_the_version_can_be_sent_again(tmp_path, monkeypatch):
    log = fill(tmp_path, "F")
    manifest = make_manifest(Version(1, 2), "delta", parent=log.head)
    stage(log, manifest)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(LogError, match="No space left"):
            log.sync()
    with pytest.raises(MissingBlobError, match="publish the version again"):
        log.commit(manifest)
    assert log.head == Version(1, 1)
    stage(log, manifest)
    log.commit(manifest)
    log = reopen(log, tmp_path)
    assert (log.head, log.damage) == (Version(1, 2), [])


@pytest.mark.parametrize("who", ["snapshot", "publisher"])
def test_a_sync_that_failed_for_another_thread_is_no_success_for_this_one(tmp_path, monkeypatch, who):
    log = fill(tmp_path, "F")
    manifest = make_manifest(Version(1, 2), "delta", parent=log.head)
    stage(log, manifest)
    real = os.fdatasync
    failing, go_on = threading.Event(), threading.Event()

    def fail_once(descriptor: int) -> None:
        monkeypatch.setattr(os, "fdatasync", real)
        failing.set()
        go_on.wait(10)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail_once)
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(log.roll_segment if who == "snapshot" else log.sync)
        assert failing.wait(10)
        mine = threads.submit(log.sync)
        go_on.set()
        with pytest.raises(LogError, match="Input/output"):
            other.result(10)
        with pytest.raises(LogError):
            mine.result(10)
    with pytest.raises(MissingBlobError, match="publish the version again"):
        log.commit(manifest)
    stage(log, manifest)
    log.commit(manifest)
    assert reopen(log, tmp_path).damage == []


def test_a_manifest_that_no_reader_would_take_is_refused_before_it_exists(tmp_path, monkeypatch):
    log = fill(tmp_path, "F")
    manifest = make_manifest(Version(1, 2), "delta", parent=log.head)
    stage(log, manifest)
    monkeypatch.setattr(log_recovery, "MANIFEST_BYTES_MAX", len(encode_manifest(manifest)) + 1)
    with pytest.raises(LimitError, match="with the places of its 4 blobs"):
        log.commit(manifest)
    monkeypatch.undo()
    log.commit(manifest)
    assert reopen(log, tmp_path).head == Version(1, 2)


def test_a_commit_that_failed_after_its_manifest_was_created_is_found_again(tmp_path, monkeypatch):
    log = fill(tmp_path, "F")
    manifest = make_manifest(Version(1, 2), "delta", parent=log.head)
    stage(log, manifest)
    log.sync()
    real = os.unlink

    def fail(path) -> None:
        real(path)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        with pytest.raises(LogError, match="Input/output"):
            log.commit(manifest)
    assert log.head == Version(1, 1)
    assert sequences(one.version for one in log.catch_up()) == [2]
    assert log.head == Version(1, 2)
    assert log.commit(manifest) is True


def test_of_two_processes_that_coordinate_one_loses_and_the_log_stays_whole(tmp_path):
    """A bucket has no lock. The second one is opened before the first commits, and follows the same head."""
    first = VersionLog(open_fsspec_store(f"file://{tmp_path}"))
    first.open_generation(0)
    commit(first, 1, "full")
    first, second = (VersionLog(open_fsspec_store(f"file://{tmp_path}"), keep_full=9) for _ in range(2))
    second.open_generation(1)
    winner = make_manifest(Version(1, 2), "delta", parent=first.head)
    stage(first, winner)
    first.commit(winner)
    loser = make_manifest(Version(2, 1), "full", parent=second.head)
    with pytest.raises(LogError, match="is there already"):
        stage(second, loser)  # both begin the same segment
    stage(second, loser)
    with pytest.raises(ConflictError, match="another process coordinates"):
        second.commit(loser)
    again = VersionLog(open_fsspec_store(f"file://{tmp_path}"), keep_full=9)
    assert sequences(one.version for one in again.manifests()) == [1, 2]
    assert again.damage == []


def test_a_log_keeps_its_number_of_shards(tmp_path):
    fill(tmp_path, "F").close()
    with pytest.raises(LogError, match="made for 1 shards, not for 2"):
        open_log(tmp_path, num_shards=2)


@pytest.mark.parametrize(("shard", "num_shards"), [(0, 0), (1, 1), (-1, 2)])
def test_a_shard_that_cannot_be_leaves_no_log(tmp_path, shard, num_shards):
    with pytest.raises(LimitError, match=f"shard {shard} is not one of {num_shards} shards"):
        open_log(tmp_path, shard=shard, num_shards=num_shards)
    assert not (tmp_path / "shards").exists()


def test_a_log_opens_on_a_full_disk(tmp_path, monkeypatch):
    fill(tmp_path, "Fd").close()

    def full(*_: object) -> None:
        raise LogError("No space left on device")

    monkeypatch.setattr(LocalStore, "create", full)
    monkeypatch.setattr(LocalStore, "replace", full)
    log = open_log(tmp_path)
    assert sequences(one.version for one in log.manifests()) == [1, 2]
    log.close()


def test_a_program_whose_creation_failed_at_its_end_is_made_durable_by_the_next_try(tmp_path, monkeypatch):
    """The name was given, and the folder's sync failed: it may be gone after a power loss."""
    log = open_log(tmp_path)
    log.open_generation(0)
    real, synced = durable_files.fsync_directory, []

    def fsync_directory(directory: Path) -> None:
        if directory.name == "content" and "failed" not in synced:
            synced.append("failed")
            raise OSError(5, "Input/output error")
        real(directory)
        synced.append(directory.name)

    for module in (durable_files, local_store):
        monkeypatch.setattr(module, "fsync_directory", fsync_directory)
    name = content_name("program", PROGRAM)
    with pytest.raises(LogError, match="Input/output error"):
        log.stage(Version(1, 1), kind="program", name=name, data=PROGRAM)
    log.stage(Version(1, 1), kind="program", name=name, data=PROGRAM)
    assert "content" in synced[synced.index("failed") :]
    log.close()
