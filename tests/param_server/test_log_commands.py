"""python -m param_server log: clear output, exit codes, and errors in one line."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
import structlog

from param_server.__main__ import main
from param_server.client import ParamServerClient
from param_server.local_store import LocalStore
from param_server.manifest import Manifest, Version, blob_ref
from param_server.shard import Shard
from param_server.staged_blobs import ArrivedBlob
from param_server.version_log import VersionLog
from proto.row_segment import RowSegment, encode

NO_IDS = np.zeros(0, np.int64)


def publish(shard: Shard, kind: str, ids, value: float, deletes=()) -> None:
    rows_ND = np.full((len(ids), 2), value, np.float32)
    segment = RowSegment("t", np.array(ids, np.int64), rows_ND, np.array(deletes, np.int64))
    data = encode(segment, row_format="float32")
    head = shard.log.head
    version = Version(1, 1 if head is None else head.sequence + 1)
    shard.publish([ArrivedBlob(version, "rows", "r", data)])
    counts = {"num_rows": len(ids), "num_deletes": len(deletes)}
    shard.commit(
        Manifest(
            version=version,
            parent=head,
            kind=kind,
            blobs=(blob_ref("rows", "r", data, table="t", **counts),),
            schema_hash="abc",
            watermark_ms=0,
            produced_ms_newest=0,
            created_ms=1_700_000_000_000,
        )
    )


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """`main` lets the logs go to standard error, which is another one in the next test."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def folder(tmp_path):
    """Full, delta, delta, rollback to the first, and a snapshot of that."""
    shard = Shard(VersionLog(LocalStore(tmp_path / "log", owner="shard-0"), keep_full=9))
    shard.open_generation(0)
    publish(shard, "full", range(10), 1.0)
    publish(shard, "delta", [2, 3, 11], 2.0, deletes=[5])
    publish(shard, "delta", [12], 3.0)
    shard.rollback(Version(1, 1), now_ms=1_700_000_000_000)
    shard.snapshot()
    shard.log.close()
    return tmp_path / "log"


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["log", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_ls_shows_every_version(capsys, folder):
    code, output, errors = run(capsys, "ls", folder)
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["1.1", "full", "10", "0"],
        ["1.2", "delta", "3", "1"],
        ["1.3", "delta", "1", "0"],
        ["1.4", "delta", "3", "2"],
    ]
    assert lines[4].endswith("2023-11-14 22:13:20 snapshot rollback of 1.1")


def test_show_names_parent_blobs_and_places(capsys, folder):
    code, output, _ = run(capsys, "show", folder, "1.2")
    assert code == 0
    assert "version 1.2, delta, ordinal 2, parent 1.1" in output
    assert "rows r table t shard 0" in output
    assert "3 rows, 1 deletes" in output
    assert "segments/shard-0/00000001 at " in output
    _, output, _ = run(capsys, "show", folder, "1.4")
    assert "snapshot rows snapshot-shard0-000000" in output
    assert "rollback of 1.1" in output


def test_diff_names_what_was_added_changed_and_gone(capsys, folder):
    code, output, _ = run(capsys, "diff", folder, "1.1", "1.3")
    assert code == 1
    assert "table t: 10 rows in 1.1, 11 in 1.3: 2 added, 2 changed, 1 gone" in output
    assert "  added: 11, 12" in output
    assert "  changed: 2, 3" in output
    assert "  gone: 5" in output
    code, output, _ = run(capsys, "diff", folder, "1.1", "1.4")
    assert code == 0, "a rollback has the old content exactly"
    assert "0 added, 0 changed, 0 gone" in output


def test_verify_reads_everything_and_names_damage_without_changing_anything(capsys, folder):
    code, output, _ = run(capsys, "verify", folder)
    assert code == 0
    assert "4 versions with" in output
    assert "the head is 1.4" in output
    path = folder / "segments" / "shard-0" / "00000001"
    path.write_bytes(path.read_bytes()[:-100])
    before = sorted(str(one) for one in folder.rglob("*"))
    code, output, _ = run(capsys, "verify", folder)
    assert code == 1
    assert "damage: version 1.4: blob 'rollback-shard0-000001'" in output
    assert sorted(str(one) for one in folder.rglob("*")) == before


def test_gc_removes_what_retention_no_longer_keeps(capsys, folder):
    segments = len(list((folder / "segments" / "shard-0").iterdir()))
    code, output, _ = run(capsys, "gc", folder, "--keep-full", "1")
    left = len(list((folder / "segments" / "shard-0").iterdir()))
    assert (code, output) == (0, f"{segments - left} segments removed; 1 versions are left\n")
    assert [one.name for one in (folder / "manifests").iterdir()] == ["000000000004"]
    code, output, _ = run(capsys, "verify", folder)
    assert code == 0
    assert "1 versions with" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "{}", "9.9"), "version 9.9 is not in the log; it has 1.1 to 1.4"),
        (("show", "{}", "new"), "expected a version as generation.sequence, found 'new'"),
        (("ls", "{}/nothing"), "there is no such folder"),
        (("ls", "nowhere://x"), "nowhere"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(capsys, folder, arguments, message):
    code, output, errors = run(capsys, *(one.format(folder) for one in arguments))
    assert (code, output) == (1, "")
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_the_commands_read_beside_a_running_shard_and_gc_refuses(capsys, kit, children, tmp_path):
    shard = children.shard()
    with ParamServerClient(shard.address, timeout_s=60) as client:
        trainer = kit.trainer(client)
        trainer.open()
        trainer.train(kit.all_keys())
        trainer.full()
        old = trainer.head
        trainer.train(kit.all_keys()[:4])
        trainer.delta(kit.all_keys()[:4])
        log = tmp_path / "log"
        assert run(capsys, "verify", log)[0] == 0
        code, _, errors = run(capsys, "gc", log)
        assert code == 1
        assert "another process has it open as shard-0" in errors
        rolled = children.popen("rollback", shard.address, str(old), stdout=subprocess.PIPE)
        output, _ = rolled.communicate(timeout=120)
        assert output == b"1.3 has the content of 1.1\n"
        code, output, _ = run(capsys, "diff", log, "1.1", "1.3")
        assert code == 0


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_a_folder_without_a_log_is_refused(command, folder, tmp_path, capsys):
    """A check of a backup that is aimed at the wrong folder must not say that all is well."""
    assert main(["log", command, str(folder)]) == 0
    capsys.readouterr()
    assert main(["log", command, str(tmp_path)]) == 1
    assert f"{tmp_path}: holds no version log; name the folder" in capsys.readouterr().err
