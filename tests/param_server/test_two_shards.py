"""Two shards, one log: rows where their ids belong, one manifest a version, either shard killed."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from feature_eviction import owner_of
from param_server.blob_parts import to_message
from param_server.client import (
    BadBlobError,
    Manifest,
    ManifestError,
    MissingBlobError,
    ParamServerClient,
    ParamServerClients,
    RowSegment,
    UnavailableError,
    Version,
    blob_ref,
    encode,
    split_by_shard,
)
from param_server.receive import receive_versions
from param_server.transport import open_channel
from proto import param_server_pb2, param_server_pb2_grpc

DIM = 4
NUM_SHARDS = 2


def start(children, number: int, address: str = "127.0.0.1:0", **options):
    more = ("--shard", str(number), "--num-shards", str(NUM_SHARDS))
    return children.shard(address, *more, keep_full=1, **options)


class Trainer:
    """Rows over two shards, and the truth beside."""

    def __init__(self, clients: ParamServerClients) -> None:
        self.clients = clients
        self.rng = np.random.default_rng(6)
        self.rows: dict[int, np.ndarray] = {}
        self.generation, self.head = clients.open_generation(0)

    def describe(self, kind: str, changed, deletes=()) -> tuple[Manifest, list]:
        for one in deletes:
            self.rows.pop(one, None)
        self.rows.update({one: self.rng.normal(size=DIM).astype(np.float32) for one in changed})
        segment = RowSegment(
            "t",
            np.array(list(changed), np.int64),
            np.array([self.rows[one] for one in changed], np.float32).reshape(-1, DIM),
            np.array(list(deletes), np.int64),
        )
        blobs = []
        for shard, part in split_by_shard(segment, num_shards=NUM_SHARDS):
            data = encode(part, row_format="float32")
            counts = {"num_rows": len(part), "num_deletes": len(part.deleted_ids_M)}
            blobs.append((blob_ref("rows", f"t-{shard}", data, table="t", shard=shard, **counts), data))
        following = self.head is not None and self.head.generation == self.generation
        manifest = Manifest(
            version=Version(self.generation, self.head.sequence + 1 if following else 1),
            parent=self.head,
            kind=kind,
            blobs=tuple(reference for reference, _ in blobs),
            schema_hash="",
            watermark_ms=0,
            produced_ms_newest=0,
            created_ms=0,
        )
        return manifest, blobs

    def publish(self, kind: str, changed, deletes=(), *, again=lambda: None) -> Manifest:
        manifest, blobs = self.describe(kind, changed, deletes)
        for _ in range(8):
            try:
                self.clients.publish(manifest.version, blobs)
                self.clients.commit(manifest)
                break
            except UnavailableError:
                again()
            except MissingBlobError:
                continue
        else:
            raise AssertionError("the shards do not stay up")
        self.head = manifest.version
        return manifest


def check_rows(trainer: Trainer, addresses) -> None:
    """Each shard holds exactly the rows that it owns."""
    ids = np.arange(300)
    owner_N = owner_of(ids, num_owners=NUM_SHARDS)
    for shard, address in enumerate(addresses):
        with ParamServerClient(address, timeout_s=60) as client:
            _, segment = client.pull("t", ids)
            expected = {one: row.tobytes() for one, row in trainer.rows.items() if owner_N[one] == shard}
            pulled = zip(segment.ids_N.tolist(), segment.rows_ND, strict=True)
            assert {one: row.tobytes() for one, row in pulled} == expected


@pytest.fixture
def shards(kit, children):
    """Both shards and a trainer with a full version and two deltas live."""
    started = [start(children, number) for number in range(NUM_SHARDS)]
    addresses = [one.address for one in started]
    with ParamServerClients(addresses, timeout_s=60) as clients:
        trainer = Trainer(clients)
        trainer.publish("full", range(200))
        trainer.publish("delta", range(0, 100, 3), [5, 7, 11])
        trainer.publish("delta", range(200, 220), range(20, 30))
        yield trainer, started, addresses


def wait_for_heads(kit, trainer) -> None:
    kit.wait_until(lambda: all(state.head == trainer.head for state in trainer.clients.status()))


def test_rows_lie_with_their_owners_and_one_manifest_names_both(kit, shards):
    trainer, _, addresses = shards
    wait_for_heads(kit, trainer)
    check_rows(trainer, addresses)
    states = trainer.clients.status()
    assert [(state.shard, state.num_shards) for state in states] == [(0, 2), (1, 2)]
    assert sum(state.num_rows for state in states) == len(trainer.rows)


def test_either_shard_streams_whole_versions_or_the_rows_of_one(kit, shards):
    trainer, _, addresses = shards
    wait_for_heads(kit, trainer)
    for address in addresses:
        channel = open_channel(address)
        stub = param_server_pb2_grpc.ParamServerStub(channel)
        for wanted in ([], [0], [1]):
            request = param_server_pb2.SubscribeRequest(replica="t", held=to_message(None), shards=wanted)
            stream = stub.Subscribe(request, timeout=60)
            received = next(receive_versions(stream, shared={}))
            found = {blob.shard for blob in received.manifest.rows_blobs}
            assert found == set(wanted or [0, 1])
            assert set(received.blobs) == {blob.name for blob in received.manifest.blobs}
            stream.cancel()
        channel.close()


def test_a_repeated_commit_is_known_at_both(kit, shards):
    trainer, _, _ = shards
    manifest, blobs = trainer.describe("delta", range(10))
    for repeated in (False, True):
        trainer.clients.publish(manifest.version, blobs)
        assert trainer.clients.commit(manifest) == (manifest.version, repeated)


def test_rows_of_another_shard_and_addresses_in_another_order_are_refused_by_name(kit, shards):
    trainer, _, addresses = shards
    with pytest.raises(ManifestError, match="address 1 of 2 is shard 1 of 2"):
        ParamServerClients(addresses[::-1], timeout_s=60).open_generation(0)
    head = trainer.head
    manifest, blobs = trainer.describe("delta", range(10))
    swapped = [
        (msgspec.structs.replace(reference, shard=1 - reference.shard), data) for reference, data in blobs
    ]
    wrong = msgspec.structs.replace(manifest, blobs=tuple(reference for reference, _ in swapped))
    trainer.clients.publish(manifest.version, swapped)
    with pytest.raises(BadBlobError, match=r"blob 't-0': id \d+ belongs to another of the 2 shards than 1"):
        trainer.clients.commit(wrong)
    assert trainer.clients.status()[0].head == head
    trainer.clients.publish(manifest.version, blobs)
    trainer.clients.commit(manifest)


@pytest.mark.parametrize(
    ("victim", "failpoint"),
    [
        (0, "publish_synced"),
        (1, "publish_appended"),
        pytest.param(0, "publish_appended", marks=pytest.mark.slow),
        pytest.param(1, "publish_synced", marks=pytest.mark.slow),
    ],
)
def test_a_shard_killed_in_the_middle_of_a_version_loses_nothing(kit, children, tmp_path, failpoint, victim):
    fired = tmp_path / "fired"
    armed = {
        "FRESHET_FAILPOINT": f"{failpoint}:4:kill:{victim}",
        "FRESHET_FAILPOINT_LOG": str(fired),
    }
    started = [start(children, number, env=armed) for number in range(NUM_SHARDS)]
    addresses = [one.address for one in started]
    restarted = []

    def again() -> None:
        restarted.append(start(children, victim, addresses[victim]))

    with ParamServerClients(addresses, timeout_s=60) as clients:
        trainer = Trainer(clients)
        trainer.publish("full", range(200), again=again)
        for step in range(6):
            trainer.publish("delta", range(step, 200, 7), [step + 1, step + 50], again=again)
        assert fired.read_text() == f"{failpoint}:4\n"
        assert len(restarted) == 1
        wait_for_heads(kit, trainer)
        check_rows(trainer, addresses)


def test_a_version_that_was_committed_while_a_shard_was_away_is_taken_over_by_it(kit, children, shards):
    """Prepared at shard 1 and then shard 1 dies: its part is durable, so shard 0 may commit without it."""
    trainer, started, addresses = shards
    manifest, blobs = trainer.describe("delta", range(50, 80), [81])
    trainer.clients.publish(manifest.version, blobs)
    with (
        ParamServerClient(addresses[0], timeout_s=60) as zero,
        ParamServerClient(addresses[1], timeout_s=60) as one,
    ):
        places = one.prepare(manifest)
        started[1].kill()
        located = tuple(
            msgspec.structs.replace(blob, segment=places[blob.name][0], segment_offset=places[blob.name][1])
            if blob.name in places
            else blob
            for blob in manifest.blobs
        )
        start(children, 1, addresses[1])
        assert zero.commit(msgspec.structs.replace(manifest, blobs=located)) == (manifest.version, False)
        kit.wait_until(lambda: one.status().head == manifest.version)
    check_rows(trainer, addresses)


def test_a_snapshot_and_a_rollback_span_both_shards(kit, children):
    started = [
        children.shard(
            "127.0.0.1:0", "--shard", str(number), "--num-shards", "2", "--snapshot-every", "2", keep_full=2
        )
        for number in range(NUM_SHARDS)
    ]
    addresses = [one.address for one in started]
    with ParamServerClients(addresses, timeout_s=60) as clients, ParamServerClient(addresses[0], 60) as zero:
        trainer = Trainer(clients)
        trainer.publish("full", range(150))
        trainer.publish("delta", range(10, 40), [1, 2])
        old_rows, old = dict(trainer.rows), trainer.head
        trainer.publish("delta", range(30, 160), [5, 6])
        kit.wait_until(lambda: zero.status().num_snapshots >= 1)
        made = zero.rollback(old)
        trainer.rows, trainer.head = old_rows, made
        wait_for_heads(kit, trainer)
        check_rows(trainer, addresses)
        for number in range(NUM_SHARDS):
            started[number].kill()
            start(children, number, addresses[number])
        check_rows(trainer, addresses)
        assert {info.version: info.rollback_of for info in zero.versions()}[made] == old
