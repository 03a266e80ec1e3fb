"""Streams that hold a shard's threads: how many, how long one may be silent, and who still gets in."""

from __future__ import annotations

import threading
from itertools import count

import grpc
import pytest
import structlog

from param_server import shard_service, subscriptions
from param_server.blob_parts import split_blob, to_message
from param_server.client import LimitError, ParamServerClient, Version
from param_server.follower import Follower
from param_server.history_service import HistoryServicer
from param_server.local_store import LocalStore
from param_server.replica import Replica
from param_server.shard import Shard
from param_server.shard_service import ShardServicer
from param_server.sources import ShardSource
from param_server.transport import open_channel, open_server, translate
from param_server.version_log import VersionLog
from proto import param_server_pb2, param_server_pb2_grpc

NUM_KEYS = 40_000
NUM_VERSIONS = 8
"""So many that they do not all fit between a shard and a replica that does not read."""


class Served:
    """A shard in this process with room for two subscribers, a replay, two publishers and one short call."""

    def __init__(self, kit, folder) -> None:
        self.server, self.address = open_server("127.0.0.1:0", num_threads=2 + 1 + 2 + 1)
        self.shard = Shard(VersionLog(LocalStore(folder, owner="shard-0")))
        self.servicer = ShardServicer(self.shard, clock_ms=lambda: 0)
        history = HistoryServicer(self.shard.log, subscriptions=self.shard.subscriptions)
        param_server_pb2_grpc.add_ParamServerServicer_to_server(self.servicer, self.server)
        param_server_pb2_grpc.add_HistoryServicer_to_server(history, self.server)
        self.server.start()
        self.channel = open_channel(self.address)
        self._versions = param_server_pb2_grpc.ParamServerStub(self.channel)
        self._history = param_server_pb2_grpc.HistoryStub(self.channel)
        self._silence = threading.Event()
        self.client = ParamServerClient(self.address, timeout_s=30)
        self.trainer = kit.trainer(self.client)
        self.trainer.open()
        keys = [kit.key(4, number) for number in range(NUM_KEYS)]
        self.trainer.train(keys)
        self.trainer.full()
        for _ in range(NUM_VERSIONS - 1):
            self.trainer.delta(keys)

    def subscribe(self):
        return self._versions.Subscribe(param_server_pb2.SubscribeRequest(replica="silent"))

    def replay(self):
        until = to_message(self.shard.log.head)
        return self._history.Replay(param_server_pb2.ReplayRequest(replica="silent", until=until))

    def publish(self, first=()):
        """A call that sends these parts and then nothing."""

        def parts():
            yield from first
            self._silence.wait()

        return self._versions.Publish.future(parts())

    def stop(self) -> None:
        self._silence.set()
        self.client.close()
        self.channel.close()
        self.servicer.stop()
        self.server.stop(None).wait()
        self.shard.log.close()


@pytest.fixture
def served(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(subscriptions, "SUBSCRIBERS_MAX", 2)
    monkeypatch.setattr(subscriptions, "REPLAYS_MAX", 1)
    monkeypatch.setattr(shard_service, "PUBLISHERS_MAX", 2)
    one = Served(kit, tmp_path / "log")
    yield one
    one.stop()


def is_refused(call) -> bool:
    return call.done() and call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_streams_of_every_kind_beyond_their_number_leave_a_thread_for_short_calls(kit, served):
    held = []
    for begin, num_places in ((served.subscribe, 2), (served.replay, 1), (served.publish, 2)):
        calls = [begin() for _ in range(8)]
        held += calls  # one that nobody names any more would be cancelled
        kit.wait_until(lambda calls=calls, num=num_places: sum(map(is_refused, calls)) == 8 - num)
    assert sum(call.done() for call in held) == 24 - 5
    assert served.client.status().num_subscribers == 2
    assert served.client.status().head == served.trainer.head


def test_a_publish_that_sends_nothing_more_is_ended_and_gives_its_place_back(kit, served, monkeypatch):
    """Many times over, so that also the threads that waited for a part are there again."""
    monkeypatch.setattr(shard_service, "PUBLISH_IDLE_S", 0.1)
    manifest, blobs = served.trainer.describe("full", list(served.trainer.rows), [])
    begun = next(split_blob(manifest.version, *blobs[0]))
    for first in ((), (begun,)) * 3:
        calls = [served.publish(first) for _ in range(2)]
        for call in calls:
            error = translate(call.exception(timeout=60), where="shard")
            assert isinstance(error, LimitError)
            assert "publish: nothing came for 0.1 s, the call is ended" in str(error)
    monkeypatch.setattr(shard_service, "PUBLISH_IDLE_S", 60.0)
    served.trainer.full()
    assert served.client.status().head == served.trainer.head == Version(1, NUM_VERSIONS + 1)


@pytest.mark.parametrize("kind", ["subscribe", "replay"])
def test_a_stream_that_nobody_reads_is_ended_and_another_takes_its_place(kit, served, kind):
    begin = getattr(served, kind)
    num_places = 2 if kind == "subscribe" else 1
    calls = [begin() for _ in range(num_places + 1)]
    kit.wait_until(lambda: any(map(is_refused, calls)))
    silent = [call for call in calls if not is_refused(call)]
    turns = count()

    def are_cut_off() -> bool:
        served.shard.maintain(now_s=next(turns) * 2 * subscriptions.UNREAD_S)
        return served.client.status().num_cut_off == num_places

    kit.wait_until(are_cut_off)
    served.shard.maintain(now_s=next(turns) * 2 * subscriptions.UNREAD_S)
    for call in silent:
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() == grpc.StatusCode.CANCELLED
    again = begin()
    assert next(again).WhichOneof("part") == "manifest"
    again.cancel()


def test_a_replica_that_finds_no_place_for_its_replay_comes_again_and_reloads_nothing(kit, served):
    served.shard.log.promote(served.trainer.head)
    silent = served.replay()
    assert next(silent).WhichOneof("part") == "manifest"
    source = ShardSource(served.address, name="stable")
    replica = Replica(clock_ms=lambda: 0, channel="stable")
    follower = Follower(replica, source, name="stable")
    following = threading.Thread(target=follower.follow)
    with structlog.testing.capture_logs() as logs:
        following.start()
        kit.wait_until(lambda: any("at most 1 replicas can replay" in str(line) for line in logs))
        silent.cancel()
        kit.wait_until(lambda: replica.store.version == served.trainer.head)
    follower.stop()
    following.join()
    source.close()
    assert (replica.num_reloads, replica.last_refusal) == (0, "")
    assert replica.store.num_rows == NUM_KEYS
