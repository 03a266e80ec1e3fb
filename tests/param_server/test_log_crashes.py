"""kill -9 at every single file operation of a real writer: what was committed stays, nothing else does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from param_server.local_store import LocalStore
from param_server.manifest import Manifest, Version
from param_server.version_log import VersionLog

ROOT = Path(__file__).resolve().parents[2]

# Kills itself right before the n-th call that changes the disk (so right after the call before it); says
# on standard output which commits had returned. One process plays many lives: it forks for each.
WRITER = """
import os, signal, sys, json
from pathlib import Path
from param_server.manifest import Manifest, Version, blob_ref, content_name
from param_server.local_store import LocalStore
from param_server.version_log import VersionLog

def live(folder, fatal_call):
    calls = 0
    def deadly(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    for name in ("open", "pwritev", "fdatasync", "fsync", "link", "replace", "unlink", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    log = VersionLog(LocalStore(folder, owner="shard-0"), keep_full=1, segment_bytes_max=700)
    generation, head = log.open_generation(0)
    for sequence, kind in enumerate(("full", "delta", "full", "delta"), start=1):
        version = Version(generation, sequence)
        rows = str(version).encode() * 50
        program = str(sequence // 3).encode()
        blobs = (
            blob_ref("rows", "t-0", rows, table="t"),
            blob_ref("dense", "dense", b"dense"),
            blob_ref("program", content_name("program", program), program),
            blob_ref("signature", content_name("signature", b"s"), b"s"),
        )
        for blob, data in zip(blobs, (rows, b"dense", program, b"s")):
            log.stage(version, kind=blob.kind, name=blob.name, data=data)
        manifest = Manifest(version=version, parent=log.head, kind=kind, blobs=blobs, schema_hash="",
            watermark_ms=0, produced_ms_newest=0, created_ms=0)
        log.commit(manifest)
        log.retain()
        os.write(1, (json.dumps([str(folder), str(version)]) + "\\n").encode())
    os.write(1, (json.dumps([str(folder), "end"]) + "\\n").encode())
    os._exit(0)

root, start, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for fatal_call in range(start, stop):
    for life in range(2):
        child = os.fork()
        if child == 0:
            live(root / str(fatal_call), fatal_call if life == 0 else fatal_call + 9)
        os.waitpid(child, 0)
"""

CALLS = 190


def open_log(folder: Path) -> VersionLog:
    return VersionLog(LocalStore(folder, owner="shard-0"), keep_full=1)


@pytest.fixture(scope="module")
def lives(tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """Folders after two lives that ended at a chosen call, and the commits that had returned in each."""
    root = tmp_path_factory.mktemp("lives")
    finished = subprocess.run(
        [sys.executable, "-c", WRITER, str(root), "1", str(CALLS)],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=200,
    )
    returned: dict[str, list[str]] = {}
    for line in finished.stdout.splitlines():
        folder, what = json.loads(line)
        returned.setdefault(Path(folder).name, []).append(what)
    return root, returned


def test_the_kills_reach_from_the_first_operation_to_behind_the_last(lives):
    _, returned = lives
    assert "end" not in returned.get("1", [])
    assert returned[str(CALLS - 1)].count("end") >= 1, "raise CALLS: the last operations are not covered"
    assert len({len(commits) for commits in returned.values()}) >= 4


def test_a_commit_that_returned_is_there_after_any_kill(lives):
    root, returned = lives
    checked = 0
    for fatal_call in range(1, CALLS):
        log = open_log(root / str(fatal_call))
        assert log.damage == [], f"killed at {fatal_call}"
        commits = [Version.parse(text) for text in returned.get(str(fatal_call), []) if text != "end"]
        newest = max(commits, default=None)
        if newest is not None:
            # The head is the newest commit that returned, or the one that was under way.
            assert log.head is not None
            assert newest <= log.head, f"killed at {fatal_call}: {newest} was lost"
            checked += 1
        for manifest in log.manifests():
            for blob in manifest.blobs:
                log.read_blob(manifest, blob.name)
        if log.head is not None:
            plan = log.plan_after(None)
            assert plan[0].kind == "full"
            assert plan[-1].version == log.head
        generation, _ = log.open_generation(0)
        assert log.head is None or generation > log.head.generation
        log.close()
    assert checked > CALLS // 2


def test_nothing_that_was_never_committed_is_left_after_recovery_and_the_next_collection(lives):
    root, _ = lives
    for fatal_call in range(1, CALLS):
        folder = root / str(fatal_call)
        log = open_log(folder)
        # A record above the head could still be waiting for its commit, so a version must pass it first.
        generation, head = log.open_generation(0)
        version = Version(generation, 1)
        manifest = Manifest(
            version=version,
            parent=head,
            kind="full",
            blobs=(),
            schema_hash="",
            watermark_ms=0,
            produced_ms_newest=0,
            created_ms=0,
        )
        log.commit(manifest)
        log.collect()
        log.close()
        assert [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "shard-0"] == []
        assert len(list((folder / "manifests").iterdir())) == 1
        content = folder / "content"
        assert not content.exists() or list(content.iterdir()) == []
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert files <= {"lock-shard-0", "generation", "shards"}
