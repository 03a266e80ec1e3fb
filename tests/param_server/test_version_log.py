"""The version log: commits, fencing, idempotence, retention, damage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
from param_server.manifest import Manifest, Version, blob_ref, content_name
from param_server.version_log import VersionLog

PROGRAM, SIGNATURE = b"program", b"signature"


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


def commit(log: VersionLog, sequence: int, kind: str = "delta", *, generation: int = 1) -> Manifest:
    manifest = make_manifest(Version(generation, sequence), kind, parent=log.head)
    stage(log, manifest)
    assert log.commit(manifest) is False
    return manifest


def fill(folder: Path, kinds: str, *, keep_full: int = 9) -> VersionLog:
    """One version a letter: F full, d delta."""
    log = VersionLog(folder, keep_full=keep_full)
    log.open_generation(0)
    for sequence, letter in enumerate(kinds, start=1):
        commit(log, sequence, "full" if letter == "F" else "delta")
    return log


def sequences(versions) -> list[int]:
    return [version.sequence for version in versions]


def reopen(log: VersionLog, folder: Path, **options) -> VersionLog:
    log.close()
    return VersionLog(folder, **{"keep_full": 9, **options})


def test_committed_versions_are_there_after_a_restart(tmp_path):
    log = fill(tmp_path, "Fdd")
    before = log.manifests()
    log = reopen(log, tmp_path)
    assert log.manifests() == before
    assert log.head == Version(1, 3)
    assert log.damage == []
    assert log.read_blob(Version(1, 2), "t-0") == b"rows of 1.2"
    assert log.read(Version(1, 1)).kind == "full"


def test_a_subscriber_gets_what_follows_it_or_the_newest_full_version(tmp_path):
    log = fill(tmp_path, "FddFdd")
    assert sequences(log.versions_after(None)) == [4, 5, 6]
    assert sequences(log.versions_after(Version(1, 2))) == [3, 4, 5, 6]
    assert sequences(log.versions_after(Version(1, 5))) == [6]
    assert log.versions_after(Version(1, 6)) == []
    assert sequences(log.versions_after(Version(0, 9))) == [4, 5, 6], "not an ancestor"
    assert log.versions_after(Version(1, 7)) == [], "ahead of the log: it waits"
    assert VersionLog(tmp_path / "empty").versions_after(None) == []


def test_staged_blobs_without_a_commit_are_gone_after_a_restart(tmp_path):
    log = fill(tmp_path, "F")
    stage(log, make_manifest(Version(1, 2), "delta", parent=log.head), program=b"other")
    log = reopen(log, tmp_path)
    assert log.head == Version(1, 1)
    assert log.damage == []
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == ["1.1"]
    assert len(list((tmp_path / "content").iterdir())) == 2
    with pytest.raises(MissingBlobError, match="publish the version again"):
        log.commit(make_manifest(Version(1, 2), "delta", parent=log.head))


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
    assert log.read_blob(Version(1, 2), "t-0") == b"rows of 1.2"


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
    stage(log, make_manifest(Version(1, 2), "delta", parent=log.head))
    log.open_generation(0)
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == ["1.1"]


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
    log = VersionLog(tmp_path)
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
    assert log.read_blob(Version(1, 2), content_name("program", PROGRAM)) == PROGRAM
    unknown = make_manifest(Version(1, 3), "delta", parent=log.head, program=b"never sent")
    stage(log, unknown, program=None)
    with pytest.raises(MissingBlobError, match="program-"):
        log.commit(unknown)


def test_a_program_under_a_wrong_name_is_refused(tmp_path):
    log = VersionLog(tmp_path)
    name = content_name("program", b"something else")
    with pytest.raises(BadBlobError, match="SHA-256"):
        log.stage(Version(1, 1), kind="program", name=name, data=PROGRAM)


def test_a_blob_that_differs_from_the_manifest_is_refused_and_can_be_replaced(tmp_path):
    log = VersionLog(tmp_path)
    manifest = make_manifest(Version(1, 1), "full", parent=None)
    stage(log, manifest)
    log.stage(Version(1, 1), kind="rows", name="t-0", data=b"rows of 9.9")
    with pytest.raises(BadBlobError, match="'t-0'"):
        log.commit(manifest)
    assert log.head is None
    log.stage(Version(1, 1), kind="rows", name="t-0", data=b"rows of 1.1")
    assert log.commit(manifest) is False


def test_what_a_given_up_attempt_left_is_not_part_of_the_version(tmp_path):
    log = VersionLog(tmp_path)
    log.stage(Version(1, 1), kind="rows", name="t-7", data=b"given up")
    commit(log, 1, "full")
    assert sorted(path.name for path in (tmp_path / "versions" / "1.1").iterdir()) == ["dense", "t-0"]


def test_the_number_of_staged_versions_is_bounded(tmp_path):
    log = fill(tmp_path, "F")
    for sequence in range(2, 6):
        log.stage(Version(1, sequence), kind="rows", name="t-0", data=b"x")
    with pytest.raises(LimitError, match=r"1\.6"):
        log.stage(Version(1, 6), kind="rows", name="t-0", data=b"x")


@pytest.mark.parametrize("keep_full", [1, 2])
def test_retention_keeps_the_newest_full_versions_and_what_follows(tmp_path, keep_full):
    log = fill(tmp_path, "FddFdFdd", keep_full=keep_full)
    kept = [6, 7, 8] if keep_full == 1 else [4, 5, 6, 7, 8]
    assert sequences(manifest.version for manifest in log.manifests()) == kept
    names = sorted(f"1.{sequence}" for sequence in kept)
    for folder in ("manifests", "versions"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    log = reopen(log, tmp_path, keep_full=keep_full)
    assert log.damage == []
    assert sequences(manifest.version for manifest in log.manifests()) == kept
    with pytest.raises(MissingBlobError):
        log.read_blob(Version(1, 1), "t-0")


def test_retention_drops_programs_that_no_version_names(tmp_path):
    log = fill(tmp_path, "Fd", keep_full=1)
    manifest = make_manifest(Version(1, 3), "full", parent=log.head, program=b"new")
    stage(log, manifest, program=b"new")
    log.commit(manifest)
    names = sorted(path.name for path in (tmp_path / "content").iterdir())
    assert names == sorted([content_name("program", b"new"), content_name("signature", SIGNATURE)])


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def rot(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [tear, rot, remove])
@pytest.mark.parametrize("part", ["versions/1.{}/t-0", "manifests/1.{}"])
@pytest.mark.parametrize(
    ("broken", "left"),
    [(6, [1, 2, 3, 4, 5]), (5, [1, 2, 3, 4]), (4, [1, 2, 3]), (2, [1, 4, 5, 6]), (1, [4, 5, 6])],
)
def test_damage_is_named_and_the_head_is_the_newest_whole_chain(tmp_path, damage, part, broken, left):
    log = fill(tmp_path, "FddFdd")
    damage(tmp_path / part.format(broken))
    log = reopen(log, tmp_path)
    assert sequences(manifest.version for manifest in log.manifests()) == left
    for manifest in log.manifests():
        log.read_blob(manifest.version, "t-0")
    removed_manifest = damage is remove and part.startswith("manifests")
    if removed_manifest and broken in (1, 6):
        return  # a log whose first or last manifest is not there looks like a shorter log
    # Which version is broken is said, or, where its manifest is not even there, which one follows it.
    assert any(f"1.{broken}" in line for line in log.damage)
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
    rot(tmp_path / "versions" / "1.1" / "t-0")
    with pytest.raises(LogDamageError, match=r"version 1\.1: blob 't-0'"):
        log.read_blob(Version(1, 1), "t-0")


def test_a_damaged_generation_file_never_lets_an_old_writer_in(tmp_path):
    log = fill(tmp_path, "F")
    (tmp_path / "generation").write_bytes(b"\x00\xff")
    log = reopen(log, tmp_path)
    assert any("generation" in line for line in log.damage)
    assert log.fenced_generation >= 1
    assert log.open_generation(0)[0] > 1


def test_one_process_at_a_time_has_the_log_open(tmp_path):
    log = VersionLog(tmp_path)
    with pytest.raises(LogError, match="another process"):
        VersionLog(tmp_path)
    log.close()
    VersionLog(tmp_path).close()


class FsyncWatch:
    """Which inodes were fsynced, and when names changed in a folder since its last fsync."""

    def __init__(self, monkeypatch) -> None:
        self.synced: set[int] = set()
        self.unsynced_folders: set[Path] = set()
        self.links: list[tuple[str, set[Path]]] = []
        for name in ("fsync", "replace", "link"):
            monkeypatch.setattr(os, name, self._watching(name, getattr(os, name)))

    def _watching(self, name, function):
        def call(*arguments):
            if name == "fsync":
                self.synced.add(os.fstat(arguments[0]).st_ino)
                self.unsynced_folders.discard(Path(os.readlink(f"/proc/self/fd/{arguments[0]}")))
            else:
                source, target = Path(arguments[0]), Path(arguments[1])
                assert os.stat(source).st_ino in self.synced, f"{target} is named before it is durable"
                if name == "link":
                    self.links.append((target.name, set(self.unsynced_folders)))
                self.unsynced_folders.add(target.parent)
            return function(*arguments)

        return call


def test_everything_is_durable_before_the_manifest_and_the_manifest_before_the_answer(tmp_path, monkeypatch):
    log = VersionLog(tmp_path)
    watch = FsyncWatch(monkeypatch)
    log.open_generation(0)
    assert watch.unsynced_folders == set()
    for sequence, kind in ((1, "full"), (2, "delta")):
        commit(log, sequence, kind)
        assert watch.unsynced_folders == set(), "a name that a crash of the machine could lose"
    assert watch.links == [("1.1", set()), ("1.2", set())]
