"""The simulated disk passes the contract of every store, and loses exactly what a store may lose."""

from __future__ import annotations

import pytest

from param_server.errors import LogError, StoreMissingError
from tests.param_server.store_contract import StoreContract
from tests.simulation.disk import SimulatedDisk, SimulatedStore
from tests.simulation.kernel import SimulatedCrashError


class TestSimulatedStore(StoreContract):
    @pytest.fixture
    def reopen(self):
        disk = SimulatedDisk(1)
        return lambda: SimulatedStore(disk, owner="shard-0")


def test_a_power_loss_cuts_what_was_not_synced_and_nothing_else():
    lengths, zeroed = set(), 0
    for seed in range(200):
        disk = SimulatedDisk(seed)
        segment = SimulatedStore(disk, owner="shard-0").open_segment("segments/a")
        segment.append(b"durable")
        segment.sync()
        segment.append(b"lost")
        disk.lose_power("shard-0")
        found = SimulatedStore(disk, owner="shard-0").read("segments/a")
        assert found[:7] == b"durable"
        assert len(found) <= 11
        lengths.add(len(found))
        zeroed += b"\0" in found
    assert lengths == {7, 8, 9, 10, 11}
    assert zeroed > 0


def test_a_power_loss_of_one_owner_takes_nothing_from_another():
    disk = SimulatedDisk(1)
    segment = SimulatedStore(disk, owner="shard-1").open_segment("segments/a")
    segment.append(b"x" * 100)
    disk.lose_power("shard-0")
    assert SimulatedStore(disk, owner="shard-0").size("segments/a") == 100


def test_deletes_come_back_newest_first_and_only_those_after_the_last_durable_change():
    outcomes = set()
    for seed in range(60):
        disk = SimulatedDisk(seed)
        store = SimulatedStore(disk, owner="shard-0")
        for name in ("a", "b", "c"):
            store.create(name, b"x")
        store.delete("a")
        store.create("d", b"x")
        store.delete("b")
        store.delete("c")
        disk.lose_power("shard-0")
        outcomes.add("".join(store.list("")))
    assert outcomes == {"d", "cd", "bcd"}


def test_a_failed_create_may_be_there_and_may_be_gone_after_a_power_loss():
    outcomes = set()
    for seed in range(80):
        disk = SimulatedDisk(seed)
        store = SimulatedStore(disk, owner="shard-0")
        disk.faults.error_rate = 1.0
        with pytest.raises(LogError, match="manifests/1"):
            store.create("manifests/1", b"x")
        before = bool(store.list(""))
        disk.lose_power("shard-0")
        outcomes.add((before, bool(store.list(""))))
    assert outcomes == {(False, False), (True, True), (True, False)}


def test_a_replaced_object_is_the_old_or_the_new_one_after_a_crash_inside():
    outcomes = set()
    for seed in range(60):
        disk = SimulatedDisk(seed)
        store = SimulatedStore(disk, owner="shard-0")
        store.replace("generation", b"old")
        disk.faults.crash_after["shard-0"] = 0
        with pytest.raises(SimulatedCrashError):
            store.replace("generation", b"new")
        disk.lose_power("shard-0")
        outcomes.add(store.read("generation"))
    assert outcomes == {b"old", b"new"}


def test_a_full_disk_changes_nothing_and_takes_up_again_where_it_stopped():
    disk = SimulatedDisk(1)
    store = SimulatedStore(disk, owner="shard-0")
    segment = store.open_segment("segments/a")
    segment.append(b"one")
    disk.faults.full = True
    for call in (
        lambda: segment.append(b"two"),
        lambda: store.create("b", b"x"),
        lambda: store.replace("c", b"x"),
        lambda: store.open_segment("segments/b"),
    ):
        with pytest.raises(LogError, match="No space left"):
            call()
    disk.faults.full = False
    assert segment.append(b"two") == 3
    segment.sync()
    assert store.list("") == ["segments/a"]
    assert store.read("segments/a") == b"onetwo"


def test_a_segment_whose_sync_failed_takes_nothing_more():
    disk = SimulatedDisk(1)
    segment = SimulatedStore(disk, owner="shard-0").open_segment("segments/a")
    segment.append(b"x")
    disk.faults.error_rate = 1.0
    with pytest.raises(LogError):
        segment.sync()
    disk.faults.error_rate = 0.0
    for call in (segment.sync, lambda: segment.append(b"y")):
        with pytest.raises(LogError, match="takes nothing more"):
            call()


def test_rot_changes_one_bit_of_what_is_at_rest():
    disk = SimulatedDisk(3)
    store = SimulatedStore(disk, owner="shard-0")
    assert disk.flip_bit("manifests/") == ""
    store.create("manifests/1", b"\0" * 20)
    assert disk.flip_bit("manifests/") == "manifests/1"
    assert sum(byte.bit_count() for byte in store.read("manifests/1")) == 1
    with pytest.raises(StoreMissingError):
        store.read("manifests/2")
