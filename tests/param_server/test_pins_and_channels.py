"""Pins, promotions and sources: what an operator chose is there whole, alone, until told otherwise."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from param_server.client import HistoryClient, MissingBlobError, ParamServerClient, ReplicaClient, Version
from param_server.errors import GapError, LogDamageError
from param_server.follower import Follower
from param_server.history import read_promoted
from param_server.local_store import LocalStore
from param_server.replica import Replica
from param_server.replica_service import ReplicaService
from param_server.rollback import plan_rollback
from param_server.sources import StoreSource
from param_server.version_log import VersionLog
from proto import open_inference_pb2 as oip


class LocalClient:
    """A trainer's client that writes into a log of this process."""

    def __init__(self, log: VersionLog) -> None:
        self._log = log

    def open_generation(self, at_least: int):
        return self._log.open_generation(at_least)

    def publish(self, version, blobs) -> None:
        for kind, name, data in blobs:
            self._log.stage(version, kind=kind, name=name, data=data)

    def commit(self, manifest) -> None:
        self._log.commit(manifest)


@pytest.fixture
def history(kit, tmp_path: Path):
    """A log of versions 1.1 (full) .. 1.8, full again at 1.5, and the rows that each left."""
    log = VersionLog(LocalStore(tmp_path / "log", owner="shard-0"), keep_full=2)
    trainer = kit.trainer(LocalClient(log))
    trainer.open()
    keys = kit.all_keys()
    rows = {}
    for number in range(1, 9):
        trainer.train(keys[number::3] if number > 1 else keys)
        if number in (1, 5):
            trainer.full()
        else:
            trainer.delta(keys[number::3], keys[number - 1 : number])
        rows[Version(1, number)] = {one: row.copy() for one, row in trainer.rows.items()}
    yield log, rows, trainer
    log.close()


def rows_of(replica: Replica, keys: list[int]) -> dict[int, np.ndarray]:
    gathered = replica.store.gather({"t": np.array(keys, np.int64)})
    return {
        one: row
        for one, row, there in zip(keys, gathered.rows_ND["t"], gathered.present_N["t"], strict=True)
        if there
    }


def assert_holds(replica: Replica, rows: dict[int, np.ndarray], keys: list[int]) -> None:
    found = rows_of(replica, keys)
    assert set(found) == set(rows)
    for one, row in rows.items():
        np.testing.assert_array_equal(found[one], row)


def go(replica: Replica, source: StoreSource) -> list[Version | None]:
    """What the loop does, once, without a thread; the versions that were live meanwhile."""
    plan = replica.plan()
    seen = [replica.store.version]
    if plan.kind == "hold":
        return seen
    shared = replica.begin(plan)
    versions = source.replay(plan.until) if plan.kind == "replay" else source.follow(plan.held, shared=shared)
    for received in versions:
        more = replica.apply(received, plan)
        seen.append(replica.store.version)
        if not more:
            break
    return seen


def test_a_replica_starts_straight_from_a_log_and_follows_it(kit, history):
    log, rows, trainer = history
    replica, source = Replica(clock_ms=lambda: 0), StoreSource(log)
    go(replica, source)
    assert replica.store.version == Version(1, 8)
    assert_holds(replica, rows[Version(1, 8)], kit.all_keys())
    assert [version.sequence for version, _ in replica.applied] == [5, 6, 7, 8]
    trainer.train(kit.all_keys()[:3])
    trainer.delta(kit.all_keys()[:3])
    go(replica, source)
    assert [version.sequence for version, _ in replica.applied] == [5, 6, 7, 8, 9]
    assert_holds(replica, trainer.rows, kit.all_keys())


@pytest.mark.parametrize("sequence", [1, 3, 4, 5, 7])
def test_a_pin_goes_to_an_older_version_at_once_and_holds_it(kit, history, sequence):
    log, rows, _ = history
    replica, source = Replica(clock_ms=lambda: 0), StoreSource(log)
    go(replica, source)
    wanted = Version(1, sequence)
    replica.pin(wanted)
    seen = go(replica, source)
    assert set(seen) == {Version(1, 8), wanted}, "no version between was ever live"
    assert_holds(replica, rows[wanted], kit.all_keys())
    assert replica.plan().kind == "hold"
    assert replica.held_by_operator
    assert replica.num_moves_back == 1
    replica.pin(None)
    go(replica, source)
    assert replica.store.version == Version(1, 8)
    assert_holds(replica, rows[Version(1, 8)], kit.all_keys())


def test_a_pinned_replica_starts_at_its_pin_and_takes_no_newer_one(kit, history):
    log, rows, _ = history
    replica, source = Replica(clock_ms=lambda: 0), StoreSource(log)
    replica.pin(Version(1, 3))
    assert set(go(replica, source)) == {None, Version(1, 3)}
    assert_holds(replica, rows[Version(1, 3)], kit.all_keys())
    assert replica.num_moves_back == 0


def test_a_version_that_was_on_its_way_when_the_pin_came_does_not_go_live(history):
    log, _, _ = history
    replica, source = Replica(clock_ms=lambda: 0), StoreSource(log)
    plan = replica.plan()
    replica.begin(plan)
    versions = iter(source.follow(None, shared={}))
    assert replica.apply(next(versions), plan)
    replica.pin(Version(1, 5))
    assert not replica.apply(next(versions), plan)
    assert replica.store.version == Version(1, 5)
    assert replica.plan().kind == "hold"


@pytest.mark.parametrize("wanted", [Version(1, 9), Version(2, 1), Version(0, 1)])
def test_a_pin_to_a_version_that_is_not_there_is_refused_and_the_live_one_stays(kit, history, wanted):
    log, rows, _ = history
    replica, source = Replica(clock_ms=lambda: 0), StoreSource(log)
    go(replica, source)
    replica.pin(wanted)
    with pytest.raises(
        MissingBlobError, match=rf"version {wanted} is not in the log, which has 1\.1 \.\. 1\.8"
    ):
        go(replica, source)
    assert_holds(replica, rows[Version(1, 8)], kit.all_keys())
    assert not replica.held_by_operator
    # A source that sends another chain than it was asked for.
    plan = replica.plan()
    replica.begin(plan)
    if wanted < Version(1, 5):
        with pytest.raises(GapError, match=f"should end at {wanted}"):
            replica.apply(next(source.replay(Version(1, 5))), plan)


def test_the_stable_channel_only_ever_shows_what_was_promoted(kit, history, tmp_path):
    log, rows, _ = history
    replica = Replica(clock_ms=lambda: 0, channel="stable")
    assert go(replica, StoreSource(log)) == [None], "nothing was promoted: it waits and is not ready"
    assert not replica.ready
    shown: set[Version | None] = set()
    for sequence in (3, 6, 8, 4):
        log.promote(Version(1, sequence))
        source = StoreSource(log)
        replica.promote(source.promoted())
        shown.update(go(replica, source))
        assert_holds(replica, rows[Version(1, sequence)], kit.all_keys())
        assert replica.held_by_operator
    assert shown == {None, *(Version(1, sequence) for sequence in (3, 6, 8, 4))}
    replica.pin(Version(1, 7))
    go(replica, source)
    assert replica.store.version == Version(1, 7), "a pin stands above the channel"
    replica.pin(None)
    go(replica, source)
    assert replica.store.version == Version(1, 4)


def test_a_version_that_an_operator_holds_stays_ready_however_old(kit, history):
    log, _, _ = history
    clock = {"now_ms": 0}
    replica, source = Replica(clock_ms=lambda: clock["now_ms"]), StoreSource(log)
    service = ReplicaService(replica, stale_after_ms=1000, clock_ms=lambda: clock["now_ms"])
    replica.pin(Version(1, 3))
    go(replica, source)
    clock["now_ms"] = replica.store.model.manifest.produced_ms_newest + 50_000
    assert service.ServerReady(oip.ServerReadyRequest(), None).ready
    replica.pin(None)
    assert not service.ServerReady(oip.ServerReadyRequest(), None).ready


def test_a_version_that_was_rolled_back_to_is_ready_however_old(history):
    """An operator asked for it; without it the whole service would leave at once."""
    log, _, trainer = history
    clock = {"now_ms": 0}
    replica = Replica(clock_ms=lambda: clock["now_ms"])
    service = ReplicaService(replica, stale_after_ms=1000, clock_ms=lambda: clock["now_ms"])
    plan = plan_rollback(log, Version(1, 6), num_shards=1, now_ms=0)
    trainer.client.publish(plan.manifest.version, [(one.kind, one.name, data) for one, data in plan.blobs])
    trainer.client.commit(plan.manifest)
    go(replica, StoreSource(log))
    assert replica.store.version == plan.manifest.version
    clock["now_ms"] = replica.store.model.manifest.produced_ms_newest + 50_000
    assert service.ServerReady(oip.ServerReadyRequest(), None).ready


def test_what_is_promoted_survives_a_restart_and_must_be_in_the_log(history, tmp_path):
    log, _, _ = history
    assert log.promoted() is None
    log.promote(Version(1, 6))
    with pytest.raises(MissingBlobError, match=r"version 1\.99 is not in the log, which has 1\.1 \.\. 1\.8"):
        log.promote(Version(1, 99))
    log.close()
    again = VersionLog(LocalStore(tmp_path / "log", owner="shard-0"))
    assert again.promoted() == Version(1, 6)
    again.close()
    path = tmp_path / "log" / "promoted"
    rotten = path.read_bytes().replace(b"1.6", b"1.4")
    for found in (b"soon\n", rotten):
        path.write_bytes(found)
        with pytest.raises(
            LogDamageError, match=r"promoted: its checksum differs.*Remove it and promote anew"
        ):
            read_promoted(LocalStore(tmp_path / "log"))
    with pytest.raises(LogDamageError, match="promoted: its checksum differs"):
        VersionLog(LocalStore(tmp_path / "log", owner="shard-0"))


def test_chains_begin_at_a_full_version_and_end_where_they_must(history):
    log = history[0]
    for sequence, first in ((1, 1), (4, 1), (5, 5), (8, 5)):
        chain = log.chain_to(Version(1, sequence))
        assert [one.version.sequence for one in chain] == list(range(first, sequence + 1))
    assert [one.version.sequence for one in log.plan_after(None)] == [5, 6, 7, 8]
    assert [one.version.sequence for one in log.plan_after(Version(1, 6))] == [7, 8]
    assert [one.version.sequence for one in log.plan_after(Version(0, 9))] == [5, 6, 7, 8]
    assert log.plan_after(Version(1, 8)) == []


def test_the_loop_follows_a_log_moves_to_a_pin_and_catches_up(kit, history):
    log, _, trainer = history
    replica, source = Replica(clock_ms=lambda: 0), StoreSource(log)
    follower = Follower(replica, source, name="r")
    thread = threading.Thread(target=follower.follow)
    thread.start()
    kit.wait_until(lambda: replica.store.version == Version(1, 8))
    follower.pin(Version(1, 2))
    kit.wait_until(lambda: replica.store.version == Version(1, 2))
    trainer.train(kit.all_keys()[:3])
    trainer.delta(kit.all_keys()[:3])
    assert replica.store.version == Version(1, 2)
    follower.pin(Version(7, 7))
    kit.wait_until(lambda: "version 7.7 is not in the log" in replica.last_refusal)
    follower.pin(None)
    kit.wait_until(lambda: replica.store.version == Version(1, 9))
    follower.stop()
    thread.join()
    assert replica.num_reloads == 0


def run(children, *arguments: str) -> tuple[int, str, str]:
    process = children.popen(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output.decode(), errors.decode().strip().splitlines()[-1] if errors else ""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_operators_pin_and_promote_real_processes(kit, children):
    shard = children.shard(keep_full=3)
    canary = children.replica(shard.address, name="canary")
    stable = children.start("replica", "--shard", shard.address, "--channel", "stable")
    keys = kit.all_keys()
    inputs = kit.make_inputs(np.random.default_rng(3), 30)
    with (
        ParamServerClient(shard.address, timeout_s=60) as client,
        ReplicaClient(canary.address, timeout_s=60) as head,
        ReplicaClient(stable.address, timeout_s=60) as held,
        HistoryClient(shard.address) as history,
    ):
        trainer = kit.trainer(client)
        trainer.open()
        trainer.train(keys)
        trainer.full()
        expected = {}
        for _ in range(3):
            trainer.train(keys[::2])
            trainer.delta(keys[::2])
            expected[trainer.head] = trainer.expected(inputs)
        kit.wait_for_version(head, Version(1, 4))
        assert held.status().version is None
        assert held.status().channel == "stable"
        assert history.promoted() is None

        assert run(children, "promote", shard.address, "1.3")[:2] == (
            0,
            "promoted 1.3: replicas of the stable channel load it\n",
        )
        kit.wait_for_version(held, Version(1, 3))
        assert held.status().promoted == history.promoted() == Version(1, 3)
        code, _, error = run(children, "promote", shard.address, "1.9")
        assert code == 1
        assert "version 1.9 is not in the log" in error

        trainer.full()  # the older full version stays in the log
        kit.wait_for_version(head, Version(1, 5))
        assert run(children, "pin", canary.address, "1.2")[:2] == (0, "pinned at 1.2\n")
        trainer.train(keys[::3])
        trainer.delta(keys[::3])
        for one, version in ((head, Version(1, 2)), (held, Version(1, 3))):
            prediction = one.predict(inputs)
            assert prediction.version == version
            for task, values in expected[version].items():
                np.testing.assert_allclose(prediction.outputs[task], values, atol=1e-6, rtol=0)
        assert head.status().pinned == Version(1, 2)
        assert head.status().num_moves_back == 1
        code, _, error = run(children, "pin", canary.address, "1.77", "--timeout-s", "2")
        assert code == 1
        assert "answers from 1.2 still" in error
        assert "version 1.77 is not in the log" in error
        assert run(children, "pin", canary.address, "--off")[0] == 0
        kit.wait_for_version(head, trainer.head)
        assert run(children, "pin", canary.address)[2].endswith("expected a version or --off, one of them")
