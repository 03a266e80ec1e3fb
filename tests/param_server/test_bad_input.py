"""What a shard refuses: a status whose message names the place, a counter, and nothing changed."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from param_server.client import (
    BadBlobError,
    ConflictError,
    GapError,
    LimitError,
    ManifestError,
    MissingBlobError,
    ParamServerClient,
    RowSegment,
    Version,
    blob_ref,
    encode,
)
from param_server.local_store import LocalStore
from param_server.shard import Shard
from param_server.shard_service import SERVER_THREADS, ShardServicer
from param_server.transport import open_server
from param_server.version_log import VersionLog
from proto import param_server_pb2_grpc
from proto.tensor_blob import encode_tensors

NO_IDS = np.zeros(0, np.int64)


@pytest.fixture
def trainer(kit, tmp_path):
    server, address = open_server("127.0.0.1:0", num_threads=SERVER_THREADS)
    shard = Shard(VersionLog(LocalStore(tmp_path / "log", owner="shard-0")))
    servicer = ShardServicer(shard, clock_ms=lambda: 0)
    param_server_pb2_grpc.add_ParamServerServicer_to_server(servicer, server)
    server.start()
    with ParamServerClient(address, timeout_s=30) as client:
        one = kit.trainer(client)
        one.open()
        one.train(kit.all_keys())
        one.full()
        yield one
    servicer.stop()
    server.stop(None).wait()
    shard.log.close()


def rows_blob(ids, rows_ND, *, deletes=(), table: str = "t") -> bytes:
    """A RowSegment as an enemy writes it: nothing is checked."""
    dim = rows_ND.shape[1]
    metadata = {
        "format": "freshet.row_segment",
        "format_version": "1",
        "table": table,
        "dim": str(dim),
        "row_format": "float32",
    }
    columns = {
        "rows": rows_ND.astype(np.float32),
        "ids_N": np.array(ids, np.int64),
        "deleted_ids_M": np.array(deletes, np.int64),
    }
    return encode_tensors(columns, metadata=metadata)


def with_value(value: float) -> np.ndarray:
    rows_ND = np.ones((3, 4), np.float32)
    rows_ND[1, 2] = value
    return rows_ND


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows_blob([1, 2, 3], with_value(np.nan)), "column 'rows' is not finite at id 2"),
        (rows_blob([1, 2, 3], with_value(np.inf)), "column 'rows' is not finite at id 2"),
        (rows_blob([1, 2, 2], np.ones((3, 4))), "id 2 occurs more than once"),
        (rows_blob([1, 2, 3], np.ones((3, 4)), deletes=[3]), "id 3 occurs more than once"),
        (rows_blob([1, 2, 3], np.ones((3, 5))), "table 't': expected dim 4, found 5"),
        (rows_blob([1, 2, 3], np.ones((3, 4)), table="other"), r"expected \(table, rows, deletes\)"),
        (rows_blob([1, 2], np.ones((3, 4))), "rows of dim 4: expected float32"),
        (b"\xff" * 64, "header"),
    ],
)
def test_bad_rows_are_refused_by_place_and_id_and_the_trainer_is_told(trainer, data, message):
    head, rows = trainer.head, dict(trainer.rows)
    manifest, blobs = trainer.describe("delta", [], [])
    num_deletes = 1 if "id 3" in message else 0
    reference = blob_ref("rows", "t-0", data, table="t", num_rows=3, num_deletes=num_deletes)
    bad = msgspec.structs.replace(
        manifest, blobs=tuple(reference if one.kind == "rows" else one for one in manifest.blobs)
    )
    trainer.client.publish(
        bad.version, [(kind, name, data if kind == "rows" else content) for kind, name, content in blobs]
    )
    with pytest.raises(BadBlobError, match=message) as caught:
        trainer.client.commit(bad)
    assert f"version {bad.version}" in str(caught.value)
    state = trainer.client.status()
    assert (state.head, state.num_rows, state.refused) == (head, len(rows), {"BadBlobError": 1})
    # The version is free for what it should have been.
    trainer.client.publish(manifest.version, blobs)
    assert trainer.client.commit(manifest) == (manifest.version, False)


def send(client: ParamServerClient, manifest, blobs) -> None:
    client.publish(manifest.version, blobs)
    client.commit(manifest)


def test_a_version_out_of_order_is_refused_and_the_next_one_goes_on(kit, trainer):
    trainer.delta(kit.all_keys()[:1])
    head = trainer.head
    for version, parent, error in (
        (Version(1, 9), head, GapError),
        (Version(1, 3), Version(1, 1), GapError),
        (Version(1, 1), None, ConflictError),
    ):
        manifest, blobs = trainer.describe("full", list(trainer.rows), [])
        manifest = msgspec.structs.replace(manifest, version=version, parent=parent)
        with pytest.raises(error, match=str(version)):
            send(trainer.client, manifest, blobs)
        assert trainer.client.status().head == head
    trainer.delta(kit.all_keys()[:1])
    assert trainer.client.status().head == trainer.head


def test_a_table_that_does_not_exist_is_named(trainer):
    with pytest.raises(ManifestError, match="table 'nothing' does not exist at version 1"):
        trainer.client.pull("nothing", np.array([1]))


@pytest.mark.parametrize("letter", ["n", "\N{CYRILLIC SMALL LETTER EN}"])
def test_an_error_with_a_long_text_keeps_its_kind_and_its_beginning(trainer, letter):
    with pytest.raises(ManifestError, match=rf"table '{letter}{{900}}.* characters more\)"):
        trainer.client.pull(letter * 40_000, np.array([1]))


def test_oversized_requests_are_refused_by_their_limit(kit, trainer):
    with pytest.raises(LimitError, match="at most 131072 are pulled at once, found 131073"):
        trainer.client.pull("t", np.arange((1 << 17) + 1))
    wide = RowSegment("t", np.arange(1 << 16), np.ones((1 << 16, 4), np.float32), NO_IDS)
    data = encode(wide, row_format="float32")
    manifest, _ = trainer.describe("delta", [], [])
    trainer.client.publish(manifest.version, [("rows", "t-0", data)])
    with pytest.raises(ManifestError, match=r"num_bytes must be in 1\.\.4194304, found 4194305"):
        blob_ref("rows", "t-0", b"x" * ((4 << 20) + 1), table="t")
    with pytest.raises(LimitError, match="at_least"):
        trainer.client.open_generation(2**62)
    assert trainer.client.status().head == trainer.head


def test_a_commit_without_its_blobs_says_so(trainer):
    manifest, _ = trainer.describe("full", list(trainer.rows), [])
    with pytest.raises(MissingBlobError, match=r"version 1\.2: blob 't-0' is not staged"):
        trainer.client.commit(manifest)


def test_a_rollback_to_what_is_not_there_is_refused(trainer):
    for version, error in ((Version(4, 4), MissingBlobError), (trainer.head, GapError)):
        with pytest.raises(error, match=str(version)):
            trainer.client.rollback(version)
    assert trainer.client.status().head == trainer.head


def test_a_rollback_over_the_wire_is_what_pull_answers_and_the_trainer_goes_on_with_a_full_version(
    kit, trainer
):
    keys = kit.all_keys()
    old, before = trainer.head, dict(trainer.rows)
    trainer.train(keys[:10])
    trainer.delta(keys[:10], deletes=keys[20:25])
    made = trainer.client.rollback(old)
    assert made > trainer.head
    _, segment = trainer.client.pull("t", np.array(keys, np.int64))
    pulled = zip(segment.ids_N.tolist(), segment.rows_ND, strict=True)
    assert {one: row.tobytes() for one, row in pulled} == {one: row.tobytes() for one, row in before.items()}
    infos = trainer.client.versions()
    assert [info.version for info in infos] == [old, trainer.head, made]
    assert (infos[-1].rollback_of, infos[-1].kind) == (old, "delta")
    with pytest.raises(GapError, match="made by a rollback"):
        trainer.delta(keys[:3])
    trainer.open()
    trainer.full()
    assert trainer.client.status().head == trainer.head == Version(2, 1)
