"""kill -9 at every numbered step of a shard's work: nothing that was answered is lost."""

from __future__ import annotations

import resource
import subprocess
import threading

import numpy as np
import pytest

from param_server.blob_parts import to_message
from param_server.client import (
    FencedError,
    MissingBlobError,
    ParamServerClient,
    ParamServerError,
    ReplicaClient,
    UnavailableError,
)
from param_server.failpoints import FAILPOINTS
from param_server.receive import receive_versions
from param_server.row_blobs import read_segment
from param_server.row_store import RowStore
from param_server.transport import open_channel
from proto import param_server_pb2, param_server_pb2_grpc

SNAPSHOT_EVERY = ("--snapshot-every", "4")


class Steadfast:
    """A trainer that repeats what failed, and starts the shard again when it is gone."""

    def __init__(self, trainer, restart) -> None:
        self.trainer = trainer
        self._restart = restart
        self.num_restarts = 0

    def restart_if_killed(self, shard, fired) -> None:
        """A shard killed between two calls: the next would wait for it until its deadline."""
        if fired.exists() and not self.num_restarts:
            shard.process.wait(timeout=20)
            self._start_again()

    def _start_again(self) -> None:
        self.num_restarts += 1
        self._restart()

    def repeat(self, call):
        for _ in range(10):
            try:
                return call()
            except UnavailableError:
                self._start_again()
            except MissingBlobError:
                continue  # staged before the kill: `call` sends it again
        raise AssertionError("the shard does not stay up")

    def publish(self, kind: str, keys, deletes=()) -> None:
        trainer = self.trainer
        for one in deletes:
            trainer.rows.pop(one, None)
        manifest, blobs = trainer.describe(kind, list(keys), list(deletes))

        def send() -> None:
            trainer.client.publish(manifest.version, blobs)
            trainer.client.commit(manifest)

        self.repeat(send)
        trainer.head, trainer.shared_sent = manifest.version, True


def subscribed_rows(address: str, head) -> dict[int, bytes]:
    """What a replica that begins anew holds at the head."""
    channel = open_channel(address)
    stub = param_server_pb2_grpc.ParamServerStub(channel)
    stream = stub.Subscribe(param_server_pb2.SubscribeRequest(replica="t", held=to_message(None)), timeout=60)
    store = RowStore()
    for received in receive_versions(stream, shared={}):
        manifest = received.manifest
        rows = [read_segment(manifest.version, one, received.blobs[one.name]) for one in manifest.rows_blobs]
        store.switch(store.prepare(manifest, rows))
        if store.version == head:
            break
    stream.cancel()
    channel.close()
    keys, slots = store._tables["t"].slots.items()
    rows_CD = store._tables["t"].rows_CD
    return {key: rows_CD[slot].tobytes() for key, slot in zip(keys.tolist(), slots.tolist(), strict=True)}


FAST = ("publish_synced", "commit_created", "snapshot_synced", "retain_manifests")
"""One of each kind; `make test-slow` has the others."""


@pytest.mark.parametrize(
    "failpoint", [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in FAILPOINTS]
)
def test_a_shard_that_is_killed_at_any_step_has_lost_nothing(kit, children, tmp_path, failpoint):
    fired = tmp_path / "fired"
    hit = 1 if failpoint.startswith(("generation", "snapshot")) else 3
    armed = {"FRESHET_FAILPOINT": f"{failpoint}:{hit}:kill", "FRESHET_FAILPOINT_LOG": str(fired)}
    shard = children.shard("127.0.0.1:0", *SNAPSHOT_EVERY, keep_full=1, env=armed)
    keys = kit.all_keys()

    def has_snapshot() -> bool:
        try:
            with ParamServerClient(shard.address, timeout_s=1) as quick:
                return quick.status().num_snapshots > 0
        except UnavailableError:
            return False  # it is killed just now

    with ParamServerClient(shard.address, timeout_s=60) as client:
        steadfast = Steadfast(
            kit.trainer(client), lambda: children.shard(shard.address, *SNAPSHOT_EVERY, keep_full=1)
        )
        trainer = steadfast.trainer
        steadfast.repeat(trainer.open)
        trainer.train(keys)
        steadfast.publish("full", keys)
        for step in range(60):
            changed = keys[step % 7 :: 5]
            trainer.train(changed)
            steadfast.publish(
                "delta", changed, deletes=[keys[(3 * step) % len(keys)]] if step % 3 == 1 else []
            )
            if step >= 9 and fired.exists():
                break
            if step >= 9:
                kit.wait_until(lambda: fired.exists() or has_snapshot())
                steadfast.restart_if_killed(shard, fired)
        assert fired.read_text() == f"{failpoint}:{hit}\n"
        assert steadfast.num_restarts >= 1
        steadfast.publish("delta", [])
        state = client.status()
        assert (state.head, state.damage) == (trainer.head, ())
        _, segment = client.pull("t", np.array(keys, np.int64))
        truth = {key: row.tobytes() for key, row in trainer.rows.items()}
        pulled = zip(segment.ids_N.tolist(), segment.rows_ND, strict=True)
        assert {key: row.tobytes() for key, row in pulled} == truth
        assert subscribed_rows(shard.address, trainer.head) == truth


def test_a_zombie_trainer_is_fenced_across_a_kill_of_the_shard(kit, children):
    shard = children.shard()
    with (
        ParamServerClient(shard.address, timeout_s=60) as first,
        ParamServerClient(shard.address, timeout_s=60) as second,
    ):
        zombie, successor = kit.trainer(first), kit.trainer(second)
        zombie.open()
        zombie.train(kit.all_keys())
        zombie.full()
        late, blobs = zombie.describe("delta", kit.all_keys()[:3], [])
        first.publish(late.version, blobs)
        successor.open()
        successor.train(kit.all_keys())
        shard.kill()
        children.shard(shard.address)
        for call in (lambda: first.commit(late), lambda: first.publish(late.version, blobs)):
            with pytest.raises(FencedError, match="generation 2 has been opened"):
                call()
        successor.full()
        assert second.status().head == successor.head
        assert second.status().refused == {"FencedError": 2}


def test_a_replica_that_starts_in_the_middle_of_publishing_gets_every_row(kit, children):
    shard = children.shard("127.0.0.1:0", *SNAPSHOT_EVERY, keep_full=1)
    keys = kit.all_keys()
    with ParamServerClient(shard.address, timeout_s=60) as client:
        trainer = kit.trainer(client)
        trainer.open()
        trainer.train(keys)
        trainer.full()
        stop = threading.Event()

        def publish() -> None:
            step = 0
            while not stop.is_set():
                changed = keys[step % 11 :: 9]
                trainer.train(changed)
                trainer.delta(changed)
                step += 1

        publisher = threading.Thread(target=publish)
        publisher.start()
        try:
            replica = children.replica(shard.address)
            with ReplicaClient(replica.address, timeout_s=60) as one:
                kit.wait_until(lambda: one.status().ready and len(one.status().applied) > 5)
                stop.set()
                publisher.join()
                kit.wait_for_version(one, trainer.head)
                inputs = kit.make_inputs(np.random.default_rng(3), 50)
                expected = trainer.expected(inputs)
                for task, values in one.predict(inputs).outputs.items():
                    np.testing.assert_allclose(values, expected[task], atol=1e-6, rtol=0)
                assert one.status().num_reloads == 0
        finally:
            stop.set()
            publisher.join()


def test_a_full_disk_refuses_the_version_by_name_and_goes_on_when_there_is_room(kit, children, tmp_path):
    """A file size limit for the process stands for a disk that takes no more: writes come back short."""
    shard = children.shard("127.0.0.1:0")
    resource.prlimit(shard.process.pid, resource.RLIMIT_FSIZE, (60_000, -1))
    keys = kit.all_keys()
    with ParamServerClient(shard.address, timeout_s=60) as client:
        trainer = kit.trainer(client)
        trainer.open()
        trainer.train(keys)
        trainer.full()
        held = trainer.head
        refused = None
        for _ in range(60):
            trainer.train(keys)
            try:
                trainer.delta(keys)
            except ParamServerError as error:
                refused = error
                break
            held = trainer.head
        assert refused is not None
        assert "segments/shard-0/00000001" in str(refused)
        assert "File too large" in str(refused)
        assert client.status().head == held
        assert client.status().refused == {"LogError": 1}
        shard.kill()
        children.shard(shard.address)
        assert (client.status().head, client.status().damage) == (held, ())
        trainer.delta(keys)
        _, segment = client.pull("t", np.array(keys, np.int64))
        for one, row in zip(segment.ids_N.tolist(), segment.rows_ND, strict=True):
            np.testing.assert_array_equal(row, trainer.rows[one])


def test_an_unknown_failpoint_of_the_shard_ends_it_in_one_line(children, tmp_path):
    process = children.popen(
        "shard",
        "--log-dir",
        str(tmp_path / "log"),
        env={"FRESHET_FAILPOINT": "commit_created:x:kill"},
        stderr=subprocess.PIPE,
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert b"FRESHET_FAILPOINT must be NAME:HIT:kill|stop" in errors.splitlines()[-1]
