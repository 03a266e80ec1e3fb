"""The invariants of docs/architecture.md that one machine can show, on the real parts together.

A small table under constant eviction trains while versions go through a real shard process to a real
replica process. Invariant 3 has its own file (test_killed_trainer.py), as has the source-level half of
invariant 7 (test_architecture.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from param_server.client import (
    ParamServerClient,
    ParamServerClients,
    ReplicaClient,
    RulesConfig,
    UnavailableError,
    Version,
)
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.features import request_columns
from trainer.publish.publisher import Phase, Publisher
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions

REPOSITORY = Path(__file__).resolve().parents[2]
BYTES_LIMIT = 256 << 10
NUM_BATCHES = 160


@dataclass
class Rig:
    """Trainer parts in this process, shard and replica in their own."""

    config: Config
    recommender: Recommender
    publisher: Publisher
    shard: ParamServerClient
    shard_address: str
    clients: ParamServerClients
    replica: ReplicaClient
    now_ms: int = 1_000_000

    def advance(self) -> None:
        """What the training loop does between two steps."""
        self.now_ms += 100
        if self.publisher.phase is Phase.IDLE:
            self.publisher.begin(full=False, now_ms=self.now_ms, watermark_ms=1, positions=[])
        self.publisher.advance(
            all_done=self.publisher.job_done, any_failed=self.publisher.job_failed, now_ms=self.now_ms
        )

    def publish_all(self) -> Version:
        """Bring the version on its way to its end, then make another; the newest."""
        for _ in range(2):
            if self.publisher.phase is Phase.IDLE:
                self.publisher.begin(full=False, now_ms=self.now_ms, watermark_ms=1, positions=[])
            self.publisher.finish(self.flags, now_ms=lambda: self.now_ms)
        head = self.shard.status().head
        assert head is not None
        assert str(head) == self.publisher.totals.head
        return head

    def flags(self) -> tuple[bool, bool]:
        return self.publisher.job_done, self.publisher.job_failed

    def wait_until_served(self, version: Version) -> None:
        deadline_s = time.monotonic() + 30
        while (held := self.replica.status().version) != version:
            assert time.monotonic() < deadline_s, f"the replica holds {held}, not {version}"
            time.sleep(0.02)


def start(name: str, directory: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    ready = directory / f"{name}.json"
    command = [sys.executable, "-m", "param_server", *arguments, "--ready-file", str(ready)]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    deadline_s = time.monotonic() + 60
    while not ready.exists():
        assert process.poll() is None, f"{name} ended with {process.returncode}"
        assert time.monotonic() < deadline_s, f"{name} did not become ready"
        time.sleep(0.05)
    return process, str(json.loads(ready.read_text())["address"])


@pytest.fixture
def rig(ranks: Ranks, make_config: Callable[..., Config], tmp_path: Path) -> Iterator[Rig]:
    config = make_config(bytes_limit=BYTES_LIMIT)
    rules = RulesConfig(update_limit=3, update_limit_window_s=2)
    config = replace(config, publish=replace(config.publish, rules=rules, segment_bytes_max=1 << 16))
    shard_process, shard_address = start(
        "shard", tmp_path, "shard", "--address", "127.0.0.1:0", "--log-dir", str(tmp_path / "log")
    )
    replica_process, replica_address = start(
        "replica", tmp_path, "replica", "--shard", shard_address, "--address", "127.0.0.1:0"
    )
    recommender = Recommender(config, ranks=ranks)
    with (
        ParamServerClient(shard_address, 30) as shard,
        ParamServerClients([shard_address], 30) as clients,
        ReplicaClient(replica_address) as replica,
    ):
        publisher = Publisher(
            recommender, client=clients, config=config, ranks=ranks, trace_path=tmp_path / "versions.jsonl"
        )
        publisher.open(at_least=0)
        yield Rig(config, recommender, publisher, shard, shard_address, clients, replica)
        publisher.close()
    for process in (replica_process, shard_process):
        process.terminate()
        assert process.wait(timeout=20) == 0


@pytest.fixture
def batches(rig: Rig, make_batches: Callable[..., list[Impressions]]) -> list[tuple[Impressions, int]]:
    """(batch, its event time in seconds)."""
    found = make_batches(rig.config, NUM_BATCHES)
    return [(batch, int(batch.event_time_ms_N.max()) // 1000) for batch in found]


@pytest.mark.timeout(200)
def test_invariants_hold_on_the_way_from_impression_to_prediction(
    rig: Rig, batches: list[tuple[Impressions, int]]
) -> None:
    shard = rig.recommender.shards["dim16"]
    versions: list[Version] = []
    for number, (batch, now_s) in enumerate(batches):
        rig.recommender.train(batch, now_s=now_s)
        rig.advance()
        if number % 20 == 19:
            # However slow the machine is, some versions are served on the way.
            rig.wait_until_served(rig.publish_all())
        live = shard.ids.rows()
        # 1. two live ids never share a row
        assert len(np.unique(live.slots_N)) == len(np.unique(live.keys_N)) == len(live.keys_N)
        # 2. memory never passes its budget
        assert shard.bytes_used <= BYTES_LIMIT
        assert len(live.keys_N) <= shard.slots_per_rank
        # 4. versions never go back, and an answer names the one version that it comes from
        try:
            columns = request_columns(batch, rig.config.schema)
            versions.append(rig.replica.predict(columns).version)
        except UnavailableError:
            assert not versions, "a replica that had a version keeps answering"
    assert versions == sorted(versions)
    assert len(set(versions)) > 5

    # 6. nothing is dropped silently: every admitted id is held or was evicted for a counted reason
    counters = shard.ids.counters()
    assert counters.admitted == shard.ids.num_rows + sum(counters.evicted.values())
    assert counters.evicted["score"] > 500
    held_back = rig.publisher.totals.held_back
    assert held_back["update_limit"] > 0
    totals = rig.publisher.totals
    pushed_in_deltas = totals.rows_changed - sum(held_back.values())
    assert totals.rows_pushed >= pushed_in_deltas > 0

    # 5. after quiescence serving equals the trainer, deletes included; the rules' windows pass first
    rig.now_ms += 10_000
    head = rig.publish_all()
    rig.wait_until_served(head)
    live = shard.ids.rows()
    version, served = rig.shard.pull("dim16", live.keys_N)
    assert version == head
    np.testing.assert_array_equal(served.ids_N, live.keys_N)
    mine = shard.rows.rows_CD[torch.from_numpy(live.slots_N)].numpy()
    np.testing.assert_array_equal(served.rows_ND.view(np.uint32), mine.view(np.uint32))
    assert rig.shard.status().num_rows == len(live.keys_N), "a row that left training is still served"
    assert rig.replica.status().num_rows == len(live.keys_N)
    assert rig.publisher.totals.full == 1, "all of this came by deltas"

    for batch, _ in batches[-3:]:
        answer = rig.replica.predict(request_columns(batch, rig.config.schema))
        assert answer.version == head
        expected_NT = rig.recommender.predict(batch)
        for index, task in enumerate(rig.config.schema.task_names):
            np.testing.assert_allclose(answer.outputs[task], expected_NT[:, index], atol=1e-6)


@pytest.mark.timeout(120)
def test_a_newer_trainer_fences_an_older_one(
    rig: Rig, batches: list[tuple[Impressions, int]], ranks: Ranks, tmp_path: Path
) -> None:
    """The zombie's version is refused and it ends with an error; serving follows the new one."""
    for batch, now_s in batches[:3]:
        rig.recommender.train(batch, now_s=now_s)
    first = rig.publish_all()
    clients = ParamServerClients([rig.shard_address], 30)
    newer = Publisher(
        rig.recommender,
        client=clients,
        config=rig.config,
        ranks=ranks,
        trace_path=tmp_path / "newer.jsonl",
    )
    assert newer.open(at_least=0) > first.generation
    with pytest.raises(Exception, match="generation") as caught:
        rig.publish_all()
    assert type(caught.value).__name__ == "FencedError"
    for shard in rig.recommender.shards.values():
        shard.changed.abandon()
    newer.begin(full=False, now_ms=rig.now_ms, watermark_ms=1, positions=[])
    newer.finish(lambda: (newer.job_done, newer.job_failed), now_ms=lambda: rig.now_ms)
    newer.close()
    clients.close()
    rig.wait_until_served(Version(newer.generation, 1))


@pytest.mark.timeout(120)
def test_versions_go_on_after_the_shard_was_away(
    rig: Rig, batches: list[tuple[Impressions, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that could not be sent stays pending; the next one is full and brings everything."""
    shard = rig.recommender.shards["dim16"]
    for batch, now_s in batches[:5]:
        rig.recommender.train(batch, now_s=now_s)
    rig.publish_all()
    rig.recommender.train(batches[5][0], now_s=batches[5][1])

    def away(*_: object) -> None:
        raise UnavailableError("the shard is away")

    with monkeypatch.context() as patch:
        patch.setattr(rig.clients, "publish", away)
        rig.publisher.begin(full=False, now_ms=rig.now_ms, watermark_ms=1, positions=[])
        rig.publisher.finish(rig.flags, now_ms=lambda: rig.now_ms)
    assert rig.publisher.totals.failed == 1
    assert shard.changed.num_pending > 0
    head = rig.publish_all()
    rig.wait_until_served(head)
    assert rig.publisher.totals.full == 2
    live = shard.ids.rows()
    _, served = rig.shard.pull("dim16", live.keys_N)
    mine = shard.rows.rows_CD[torch.from_numpy(live.slots_N)].numpy()
    np.testing.assert_array_equal(served.rows_ND.view(np.uint32), mine.view(np.uint32))
