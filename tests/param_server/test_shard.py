"""The shard over real gRPC: idempotence, fencing, gaps, bad blobs, subscriptions, pulls, restarts."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import msgspec
import numpy as np
import pytest

from param_server.blob_parts import split_blob, to_message
from param_server.client import (
    BadBlobError,
    ConflictError,
    FencedError,
    GapError,
    ManifestError,
    MissingBlobError,
    ParamServerClient,
    ParamServerClients,
    ParamServerError,
    UnavailableError,
    Version,
    blob_ref,
    crc32c,
    encode_manifest,
)
from param_server.local_store import LocalStore
from param_server.receive import receive_versions
from param_server.shard import Shard as ShardLogic
from param_server.shard_service import SERVER_THREADS, ShardServicer
from param_server.transport import open_channel, open_server
from param_server.version_log import VersionLog
from proto import param_server_pb2, param_server_pb2_grpc


class Shard:
    """A shard in this process, on loopback."""

    def __init__(self, folder: Path, *, keep_full: int = 2, **options) -> None:
        self.server, self.address = open_server("127.0.0.1:0", num_threads=SERVER_THREADS)
        self.log = VersionLog(LocalStore(folder, owner="shard-0"), keep_full=keep_full)
        self.shard = ShardLogic(self.log, **options)
        self.servicer = ShardServicer(self.shard, clock_ms=lambda: 77)
        param_server_pb2_grpc.add_ParamServerServicer_to_server(self.servicer, self.server)
        self.server.start()
        self.channel = open_channel(self.address)
        self.stub = param_server_pb2_grpc.ParamServerStub(self.channel)

    def subscribe(self, held: Version | None = None):
        request = param_server_pb2.SubscribeRequest(replica="test", held=to_message(held))
        return self.stub.Subscribe(request, timeout=60)

    def stop(self) -> None:
        self.channel.close()
        self.servicer.stop()
        self.server.stop(None).wait()
        self.log.close()


@pytest.fixture
def shard(tmp_path):
    started = Shard(tmp_path / "log")
    yield started
    started.stop()


@pytest.fixture
def trainer(kit, shard):
    client = ParamServerClient(shard.address, timeout_s=30)
    one = kit.trainer(client)
    one.open()
    one.train(kit.all_keys())
    yield one
    client.close()


def test_the_shard_holds_exactly_what_was_committed(kit, trainer, shard):
    trainer.full()
    keys = kit.all_keys()
    trainer.train(keys[:5])
    trainer.delta(keys[:5], deletes=keys[5:8])
    version, segment = trainer.client.pull("t", np.array([*keys, keys[0], 12345], np.int64))
    assert version == trainer.head
    assert segment.ids_N.tolist() == [one for one in keys if one in trainer.rows]
    for one, row in zip(segment.ids_N.tolist(), segment.rows_ND, strict=True):
        np.testing.assert_array_equal(row, trainer.rows[one])
    status = trainer.client.status()
    assert (status.head, status.num_full, status.num_delta) == (trainer.head, 1, 1)
    assert status.num_rows == len(trainer.rows)
    assert status.bytes_published > 0
    with pytest.raises(ManifestError, match="'nothing' does not exist"):
        trainer.client.pull("nothing", np.zeros(0, np.int64))


def test_publish_and_commit_can_be_repeated(kit, trainer):
    manifest, blobs = trainer.describe("full", list(trainer.rows), [])
    for _ in range(2):
        trainer.client.publish(manifest.version, blobs)
    assert trainer.client.commit(manifest) == (manifest.version, False)
    before = trainer.client.status()
    trainer.client.publish(manifest.version, blobs)
    assert trainer.client.commit(manifest) == (manifest.version, True)
    assert trainer.client.status().num_versions == before.num_versions == 1
    with pytest.raises(ConflictError):
        trainer.client.commit(msgspec.structs.replace(manifest, created_ms=0))


def test_a_fenced_writer_is_told_so_and_changes_nothing(kit, trainer, shard):
    trainer.full()
    head = trainer.head
    manifest, blobs = trainer.describe("delta", kit.all_keys()[:3], [])
    trainer.client.publish(manifest.version, blobs)
    with ParamServerClient(shard.address, timeout_s=30) as other:
        assert other.open_generation(0) == (2, head)
    for attempt in (
        lambda: trainer.client.commit(manifest),
        lambda: trainer.client.publish(manifest.version, blobs),
    ):
        with pytest.raises(FencedError, match="generation 2 has been opened"):
            attempt()
    assert trainer.client.status().head == head


def test_a_writer_that_never_heard_of_its_generation_is_not_fenced_by_it(shard):
    """The answer of the second call is lost; only what another writer opens ends this one."""
    with ParamServerClients([shard.address], 30) as writer, ParamServerClients([shard.address], 30) as newer:
        generation, _ = writer.open_generation(0)
        writer.open_generation(generation)
        writer.check_not_fenced(generation)
        generation, _ = writer.open_generation(generation)
        assert generation == 3
        newer.open_generation(0)
        with pytest.raises(FencedError, match="a newer trainer opened generation 4"):
            writer.check_not_fenced(generation)


def test_a_gap_is_refused_and_changes_nothing(kit, trainer):
    trainer.full()
    trainer.head = Version(1, 5)
    manifest, blobs = trainer.describe("delta", kit.all_keys()[:3], [])
    trainer.client.publish(manifest.version, blobs)
    with pytest.raises(GapError, match=r"version 1\.6 follows 1\.5, but the head is 1\.1"):
        trainer.client.commit(manifest)
    assert trainer.client.status().head == Version(1, 1)


def replaced(manifest, kind, **changes):
    blobs = tuple(
        msgspec.structs.replace(blob, **changes) if blob.kind == kind else blob for blob in manifest.blobs
    )
    return msgspec.structs.replace(manifest, blobs=blobs)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda m: replaced(m, "rows", crc32c=1), BadBlobError),
        (lambda m: replaced(m, "rows", num_bytes=1), BadBlobError),
        (lambda m: replaced(m, "rows", num_rows=1), BadBlobError),
        (lambda m: replaced(m, "rows", table="other"), BadBlobError),
        (lambda m: replaced(m, "rows", name="never-sent"), MissingBlobError),
        (lambda m: msgspec.structs.replace(m, schema_hash="other"), ManifestError),
    ],
)
def test_a_commit_that_contradicts_its_blobs_is_refused_and_changes_nothing(trainer, spoil, error):
    manifest, blobs = trainer.describe("full", list(trainer.rows), [])
    trainer.client.publish(manifest.version, blobs)
    with pytest.raises(error, match=r"version 1\.1"):
        trainer.client.commit(spoil(manifest))
    assert trainer.client.status().head is None
    assert trainer.client.commit(manifest) == (Version(1, 1), False)


def test_weights_that_are_not_finite_do_not_become_the_head(trainer):
    trainer.weights["bias"][1] = np.nan
    with pytest.raises(BadBlobError, match=r"version 1\.1: blob 'dense': weight 'bias' is not finite"):
        trainer.full()
    assert trainer.client.status().head is None


@pytest.mark.parametrize("kind", ["rows", "dense"])
def test_a_blob_of_garbage_with_a_right_checksum_is_refused(trainer, kind):
    manifest, blobs = trainer.describe("full", list(trainer.rows), [])
    blobs = [(k, name, b"garbage" if k == kind else data) for k, name, data in blobs]
    trainer.client.publish(manifest.version, blobs)
    spoiled = replaced(manifest, kind, crc32c=crc32c(b"garbage"), num_bytes=7)
    with pytest.raises(BadBlobError, match=r"version 1\.1: blob"):
        trainer.client.commit(spoiled)
    assert trainer.client.status().head is None


def messages(count: int = 1, **changes):
    found = list(split_blob(Version(1, 1), "dense", "dense", bytes((4 << 20) * (count - 1) + 10)))
    for message in found:
        for name, value in changes.items():
            setattr(message, name, value)
    return found


@pytest.mark.parametrize(
    ("stream", "code"),
    [
        (messages(crc32c=1), grpc.StatusCode.DATA_LOSS),
        (messages(name="../x"), grpc.StatusCode.DATA_LOSS),
        (messages(kind="code"), grpc.StatusCode.DATA_LOSS),
        (messages(kind="program"), grpc.StatusCode.DATA_LOSS),
        (messages(num_parts=0), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (messages(num_parts=10_000), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (messages(2)[:1], grpc.StatusCode.DATA_LOSS),
        (messages(2)[1:], grpc.StatusCode.DATA_LOSS),
        (messages(3)[::2], grpc.StatusCode.DATA_LOSS),
        (messages(2)[:1] + messages(1), grpc.StatusCode.DATA_LOSS),
    ],
)
def test_a_damaged_stream_of_parts_is_refused(trainer, shard, stream, code):
    with pytest.raises(grpc.RpcError) as caught:
        shard.stub.Publish(iter(stream))
    assert caught.value.code() == code
    assert "blob '" in caught.value.details()
    assert shard.log.head is None
    assert shard.shard.status().bytes_published == 0
    (name,) = shard.shard.status().refused
    assert name in ("BadBlobError", "LimitError")


def test_a_version_number_that_no_version_has_is_refused(trainer, shard):
    (message,) = messages()
    message.version.generation = 2**64 - 1
    with pytest.raises(grpc.RpcError) as caught:
        shard.stub.Publish(iter([message]))
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS


def test_a_manifest_damaged_on_the_way_is_refused(trainer, shard):
    data = encode_manifest(trainer.describe("full", [], [])[0])
    for request in (
        param_server_pb2.CommitRequest(manifest=data, crc32c=crc32c(data) ^ 1),
        param_server_pb2.CommitRequest(manifest=b"{", crc32c=crc32c(b"{")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            shard.stub.Commit(request)
        assert caught.value.code() in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.INVALID_ARGUMENT)


def test_a_large_blob_travels_in_parts(trainer):
    manifest, blobs = trainer.describe("full", list(trainer.rows), [])
    large = {"weight": np.arange(3 << 20, dtype=np.float32)}
    from param_server.client import decode_tensors, encode_tensors

    dense = encode_tensors(large, metadata={})
    blobs = [(kind, name, dense if kind == "dense" else data) for kind, name, data in blobs]
    refs = tuple(blob_ref("dense", "dense", dense) if one.kind == "dense" else one for one in manifest.blobs)
    manifest = msgspec.structs.replace(manifest, blobs=refs)
    trainer.client.publish(manifest.version, blobs)
    trainer.client.commit(manifest)
    channel = open_channel(trainer.client.where.split()[1])
    stub = param_server_pb2_grpc.ParamServerStub(channel)
    stream = stub.Subscribe(param_server_pb2.SubscribeRequest(replica="test"), timeout=60)
    received = next(receive_versions(stream, shared={}))
    tensors, _ = decode_tensors(received.blobs["dense"], where="here")
    np.testing.assert_array_equal(tensors["weight"], large["weight"])
    stream.cancel()
    channel.close()


def test_a_subscriber_gets_what_it_lacks_and_then_what_comes(kit, trainer, shard):
    keys = kit.all_keys()
    trainer.full()
    trainer.train(keys[:2])
    trainer.delta(keys[:2])
    fresh, following = shard.subscribe(), shard.subscribe(Version(1, 1))
    from_fresh = receive_versions(fresh, shared={})
    first = next(from_fresh)
    assert (first.manifest.version, first.manifest.kind) == (Version(1, 1), "full")
    assert next(from_fresh).manifest.version == Version(1, 2)
    from_following = receive_versions(following, shared=first.shared)
    assert next(from_following).manifest.version == Version(1, 2)
    kit.wait_until(lambda: trainer.client.status().num_subscribers == 2)
    assert trainer.client.status().subscribers == ("test", "test")
    trainer.delta(keys[2:3])
    for versions in (from_fresh, from_following):
        received = next(versions)
        assert received.manifest.version == Version(1, 3)
        assert set(received.blobs) == {blob.name for blob in received.manifest.blobs}
    fresh.cancel()
    following.cancel()
    kit.wait_until(lambda: trainer.client.status().num_subscribers == 0)


def test_an_unchanged_program_is_streamed_once(trainer, kit, shard):
    trainer.full()
    trainer.delta(kit.all_keys()[:1])
    stream = shard.subscribe()
    kinds = []
    while kinds.count("end") < 2:
        part = next(stream)
        kinds.append(part.blob.kind if part.HasField("blob") else part.WhichOneof("part"))
    assert kinds.count("program") == kinds.count("signature") == 1
    assert kinds.count("rows") == kinds.count("dense") == 2
    stream.cancel()


def test_a_subscriber_that_does_not_read_hurts_nobody(kit, trainer, shard):
    trainer.full()
    stuck = shard.subscribe()
    next(stuck)
    received = []

    def read() -> None:
        for one in receive_versions(shard.subscribe(), shared={}):
            received.append(one.manifest.version)
            if one.manifest.version == Version(1, 30):
                return

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(29):
        trainer.delta(kit.all_keys()[:3])
    reader.join(timeout=60)
    assert received[-1] == Version(1, 30)
    assert received == sorted(set(received))
    stuck.cancel()


def test_a_subscriber_that_retention_overtook_is_sent_to_the_newest_full_version(kit, trainer, shard):
    trainer.full()
    trainer.delta(kit.all_keys()[:1])
    for _ in range(3):
        trainer.full()
    versions = receive_versions(shard.subscribe(Version(1, 2)), shared={})
    assert next(versions).manifest.version == Version(1, 5)


def test_rot_in_the_log_is_named_to_the_subscriber(trainer, shard):
    trainer.full()
    blob = shard.log.read(Version(1, 1)).rows_blobs[0]
    path = shard.log.store.folder / blob.segment
    data = bytearray(path.read_bytes())
    data[blob.segment_offset + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(grpc.RpcError) as caught:
        list(shard.subscribe())
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    assert "version 1.1: blob 't-0'" in caught.value.details()


def test_a_restarted_shard_serves_the_same_rows(kit, trainer, shard, tmp_path):
    trainer.full()
    keys = kit.all_keys()
    trainer.train(keys[:4])
    trainer.delta(keys[:4], deletes=keys[4:6])
    _, before = trainer.client.pull("t", np.array(keys, np.int64))
    shard.stop()
    again = Shard(tmp_path / "log")
    with ParamServerClient(again.address, timeout_s=30) as client:
        version, after = client.pull("t", np.array(keys, np.int64))
        assert version == trainer.head
        np.testing.assert_array_equal(after.ids_N, before.ids_N)
        np.testing.assert_array_equal(after.rows_ND, before.rows_ND)
        assert client.open_generation(0) == (2, trainer.head)
    again.stop()


def test_a_damaged_head_is_reported_and_a_new_generation_goes_on(kit, trainer, shard, tmp_path):
    trainer.full()
    trainer.delta(kit.all_keys()[:2])
    shard.stop()
    blob = shard.log.read(Version(1, 2)).rows_blobs[0]
    path = tmp_path / "log" / blob.segment
    path.write_bytes(path.read_bytes()[: blob.segment_offset + 100])
    again = Shard(tmp_path / "log")
    with ParamServerClient(again.address, timeout_s=30) as client:
        status = client.status()
        assert status.head == Version(1, 1)
        assert any("version 1.2" in line for line in status.damage)
        trainer.client = client
        with pytest.raises(FencedError):
            trainer.delta(kit.all_keys()[:2])
        trainer.open()
        trainer.full()
        assert client.status().head == trainer.head > Version(1, 2)
    again.stop()


def test_an_absent_shard_is_unavailable_and_an_odd_address_is_refused():
    with ParamServerClient("127.0.0.1:1", timeout_s=0.3) as client, pytest.raises(UnavailableError):
        client.status()
    for address in ("0.0.0.0:5000", "10.1.2.3:5000", "example.org:80", "127.0.0.1", "127.0.0.1:99999", ":1"):
        with pytest.raises(ParamServerError, match="address"):
            ParamServerClient(address, timeout_s=1)
