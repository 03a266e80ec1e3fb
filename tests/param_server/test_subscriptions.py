"""Subscribers: a bounded backlog, a clear end for a slow one, and a replica ten thousand versions behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from param_server.errors import LimitError
from param_server.local_store import LocalStore
from param_server.log_recovery import recover
from param_server.manifest import Manifest, Version, blob_ref
from param_server.row_store import RowStore
from param_server.shard import Shard
from param_server.staged_blobs import ArrivedBlob
from param_server.subscriptions import STUCK_S, UNREAD_S
from param_server.version_content import segments_of
from param_server.version_log import VersionLog
from proto.param_server_pb2 import VersionPart
from proto.row_segment import RowSegment, encode

DIM = 2
NO_IDS = np.zeros(0, np.int64)


def publish(shard: Shard, sequence: int, ids, *, kind: str = "delta") -> None:
    rows_ND = np.full((len(ids), DIM), sequence, np.float32)
    data = encode(RowSegment("t", np.array(ids, np.int64), rows_ND, NO_IDS), row_format="float32")
    version = Version(1, sequence)
    shard.publish([ArrivedBlob(version, "rows", "r", data)])
    manifest = Manifest(
        version=version,
        parent=shard.log.head,
        kind=kind,
        blobs=(blob_ref("rows", "r", data, table="t", num_rows=len(ids)),),
        schema_hash="",
        watermark_ms=0,
        produced_ms_newest=0,
        created_ms=0,
    )
    shard.commit(manifest)


@pytest.fixture
def shard(tmp_path):
    # In memory where that is possible: thousands of commits would wait for the disk.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield from filled_shard(Path(folder))


def filled_shard(folder: Path) -> Iterator[Shard]:
    one = Shard(VersionLog(LocalStore(folder, owner="shard-0")), backlog_versions_max=5)
    one.open_generation(0)
    publish(one, 1, range(100), kind="full")
    yield one
    one.log.close()


def catch_up(shard: Shard, subscription, *, store: RowStore | None = None) -> int:
    """Load all there is; how many versions."""
    plan = shard.subscriptions.take(subscription, timeout_s=0.01)
    for manifest in plan:
        if store is not None:
            rows = [one for _, _, one in segments_of([manifest], shard.log.read_blob)]
            store.switch(store.prepare(manifest, rows))
        subscription.cursor = manifest.version
    return len(plan)


def subscribe(shard: Shard, name: str, held: Version | None = None, *, cancel=lambda: None):
    return shard.subscriptions.add(name, held, shards=frozenset(), cancel=cancel)


def test_a_subscriber_too_far_behind_is_cut_off_and_the_others_are_not(shard):
    slow, fast = subscribe(shard, "slow"), subscribe(shard, "fast")
    for one in (slow, fast):
        assert catch_up(shard, one) == 1
        assert catch_up(shard, one) == 0, "at the head: from here on its backlog is bounded"
    for sequence in range(2, 8):
        publish(shard, sequence, [sequence])
        assert catch_up(shard, fast) == 1
    message = r"replica 'slow' is 6 versions behind, 5 are allowed: it is cut off"
    with pytest.raises(LimitError, match=message):
        slow.check()
    with pytest.raises(LimitError, match=message):
        shard.subscriptions.take(slow, timeout_s=0.01)
    fast.check()
    assert shard.status().num_cut_off == 1
    # It comes again from where it was and gets everything.
    shard.subscriptions.remove(slow)
    again = subscribe(shard, "slow", slow.cursor)
    assert catch_up(shard, again) == 6
    assert again.cursor == shard.log.head


def test_a_new_subscriber_may_be_any_number_of_versions_behind(shard):
    late = subscribe(shard, "late", Version(1, 1))
    for sequence in range(2, 30):
        publish(shard, sequence, [sequence])
    late.check()
    assert catch_up(shard, late) == 28


def test_one_that_was_cut_off_and_does_not_even_read_is_cancelled(shard):
    cancelled = []
    stuck = subscribe(shard, "stuck", cancel=lambda: cancelled.append(True))
    catch_up(shard, stuck)
    catch_up(shard, stuck)
    for sequence in range(2, 9):
        publish(shard, sequence, [sequence])
    shard.maintain(now_s=100.0)
    shard.maintain(now_s=100.0 + STUCK_S)
    assert cancelled == []
    shard.maintain(now_s=101.0 + STUCK_S)
    assert cancelled == [True]


def test_the_number_of_subscribers_is_bounded(shard):
    for number in range(96):
        subscribe(shard, str(number))
    with pytest.raises(LimitError, match="at most 96 replicas"):
        subscribe(shard, "one more")


def subscribed(shard: Shard, cancelled: list[str]):
    return subscribe(shard, "silent", cancel=lambda: cancelled.append("silent"))


def replaying(shard: Shard, cancelled: list[str]):
    return shard.subscriptions.add_replay("silent", cancel=lambda: cancelled.append("silent"))


@pytest.mark.parametrize("begin", [subscribed, replaying])
def test_one_that_does_not_take_its_next_part_is_cut_off_then_cancelled(shard, begin):
    cancelled: list[str] = []
    silent = begin(shard, cancelled)
    parts = silent.send([VersionPart(), VersionPart(), VersionPart()])
    shard.maintain(now_s=0.0)
    shard.maintain(now_s=2 * UNREAD_S)
    next(parts)
    shard.maintain(now_s=3 * UNREAD_S)
    next(parts)
    shard.maintain(now_s=5 * UNREAD_S)
    shard.maintain(now_s=6 * UNREAD_S)
    assert shard.status().num_cut_off == 0, "it has taken one since, and this one is not too old yet"
    shard.maintain(now_s=6 * UNREAD_S + 1)
    assert shard.status().num_cut_off == 1
    assert cancelled == []
    with pytest.raises(LimitError, match="replica 'silent' took nothing for 600 s: it is cut off"):
        next(parts)
    shard.maintain(now_s=6 * UNREAD_S + STUCK_S + 2)
    assert cancelled == ["silent"]
    assert shard.status().num_cut_off == 1


def test_the_number_of_replays_is_bounded_and_they_are_no_subscribers(shard):
    replays = [shard.subscriptions.add_replay(str(number), cancel=lambda: None) for number in range(8)]
    assert shard.status().num_subscribers == 0
    with pytest.raises(LimitError, match="at most 8 replicas can replay versions at once"):
        shard.subscriptions.add_replay("one more", cancel=lambda: None)
    shard.subscriptions.remove(replays[3])
    shard.subscriptions.add_replay("one more", cancel=lambda: None)


@pytest.mark.slow
def test_a_replica_ten_thousand_versions_behind_gets_there(shard):
    """By every delta where it holds the first version, by a snapshot where there is one."""
    for sequence in range(2, 10_002):
        publish(shard, sequence, [sequence % 500])
    expected = {key: max(one for one in range(1, 10_002) if one % 500 == key) for key in range(500)}

    def check(store: RowStore) -> None:
        gathered = store.gather({"t": np.arange(500)})
        assert gathered.version == Version(1, 10_001)
        assert gathered.rows_ND["t"][:, 0].tolist() == [float(expected[key]) for key in range(500)]

    store = RowStore()
    first = subscribe(shard, "first", Version(1, 1))
    manifest = shard.log.read(Version(1, 1))
    rows = [one for _, _, one in segments_of([manifest], shard.log.read_blob)]
    store.switch(store.prepare(manifest, rows))
    assert catch_up(shard, first, store=store) == 10_000
    check(store)
    shard.snapshot()
    second = subscribe(shard, "second", Version(1, 1))
    other: RowStore[None] = RowStore()
    assert catch_up(shard, second, store=other) == 1
    check(other)
    recovered = recover(LocalStore(shard.log.store.folder), repair=False)
    assert recovered.entries[-1].manifest.version == Version(1, 10_001)
    assert recovered.damage == []
