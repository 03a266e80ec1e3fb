"""ChangedRows against a plain model: what serving holds plus what is pending is what the trainer has."""

from __future__ import annotations

import numpy as np
import pytest

from param_server.client import RulesConfig
from trainer.changed_rows import ChangedRows

NUM_SLOTS = 12
EVERYTHING = RulesConfig()


class World:
    """A trainer's table, what it published, and a copy that serving would have; values are counters."""

    def __init__(self, rules: RulesConfig = EVERYTHING) -> None:
        self.rules = rules
        self.changed = ChangedRows(NUM_SLOTS)
        self.owner: dict[int, int] = {}
        self.value: dict[int, int] = {}
        self.serving: dict[int, int] = {}
        self.way: tuple[bool, dict[int, int], list[int]] | None = None
        self.now_s = 1000

    def keys_of(self, slots_N: np.ndarray) -> np.ndarray:
        return np.array([self.owner[int(slot)] for slot in slots_N], np.int64)

    def evict(self, slot: int) -> None:
        key = self.owner.pop(slot)
        del self.value[key]
        self.changed.evict(np.array([key]), np.array([slot]))

    def touch(self, slot: int, key: int) -> None:
        if self.owner.get(slot, key) != key:
            self.evict(slot)
        for other, owner in list(self.owner.items()):
            if owner == key and other != slot:
                self.evict(other)
        self.owner[slot] = key
        self.value[key] = self.value.get(key, 0) + 1
        self.changed.touch(np.array([slot]))

    def take(self, *, full: bool) -> None:
        if full:
            slots_N = np.array(sorted(self.owner), np.int64)
            taken = self.changed.take_full(self.keys_of(slots_N), slots_N)
        else:
            taken = self.changed.take(self.keys_of, rules=self.rules, now_s=self.now_s)
        rows = {int(key): self.value[int(key)] for key in taken.keys_N}
        assert not set(rows) & set(taken.deleted_keys_M.tolist())
        self.way = (full, rows, taken.deleted_keys_M.tolist())

    def ack(self) -> None:
        assert self.way is not None
        full, rows, deleted = self.way
        self.serving = rows if full else {k: v for k, v in self.serving.items() if k not in deleted} | rows
        self.changed.ack(rules=self.rules, now_s=self.now_s)
        self.way = None

    def abandon(self) -> None:
        """The reply was lost: the server may or may not have taken the version in."""
        self.changed.abandon()
        self.way = None


def test_a_row_that_several_ranks_bring_to_one_step_is_updated_once() -> None:
    changed = ChangedRows(NUM_SLOTS)
    changed.touch(np.array([5, 3, 5, 5]))
    changed.touch(np.array([3]))
    taken = changed.take(lambda slots_N: slots_N, rules=EVERYTHING, now_s=1000)
    assert dict(zip(taken.slots_N.tolist(), taken.updates_N.tolist(), strict=True)) == {3: 2, 5: 1}


@pytest.mark.parametrize("seed", range(30))
def test_serving_equals_the_trainer_after_quiescence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    world = World()
    for _ in range(400):
        world.now_s += int(rng.integers(0, 3))
        action = rng.random()
        if action < 0.6:
            world.touch(int(rng.integers(NUM_SLOTS)), int(rng.integers(30)))
        elif action < 0.7 and world.owner:
            world.evict(int(rng.choice(sorted(world.owner))))
        elif world.way is None:
            world.take(full=bool(rng.random() < 0.1))
        elif rng.random() < 0.8:
            world.ack()
        else:
            world.abandon()
    if world.way is not None:
        world.ack()
    world.take(full=False)
    world.ack()
    assert world.serving == world.value
    assert world.changed.num_pending == 0


def test_taking_clears_nothing() -> None:
    world = World()
    world.touch(3, 7)
    world.take(full=False)
    world.abandon()
    world.take(full=False)
    assert world.way == (False, {7: 1}, [])


def test_updates_between_take_and_ack_stay_pending() -> None:
    world = World()
    world.touch(3, 7)
    world.take(full=False)
    world.touch(3, 7)
    world.ack()
    world.take(full=False)
    assert world.way == (False, {7: 2}, [])


def test_key_evicted_while_its_first_version_is_on_its_way_is_deleted_next() -> None:
    world = World()
    world.touch(3, 7)
    world.take(full=False)
    world.touch(3, 8)
    world.ack()
    world.take(full=False)
    assert world.way == (False, {8: 1}, [7])


def test_key_that_serving_never_had_needs_no_delete() -> None:
    world = World()
    world.touch(3, 7)
    world.evict(3)
    world.take(full=False)
    assert world.way == (False, {}, [])


def test_rows_that_rules_hold_back_stay_pending_and_are_counted() -> None:
    world = World(RulesConfig(update_limit=1, update_limit_window_s=60))
    world.touch(3, 7)
    world.take(full=False)
    world.ack()
    world.touch(3, 7)
    world.now_s += 59
    taken = world.changed.take(world.keys_of, rules=world.rules, now_s=world.now_s)
    assert (len(taken.keys_N), taken.held_back, taken.num_changed) == (0, {"update_limit": 1}, 1)
    world.changed.ack(rules=world.rules, now_s=world.now_s)
    assert world.changed.num_pending == 1
    world.now_s += 1
    world.take(full=False)
    assert world.way == (False, {7: 2}, [])


def test_gathering_anew_keeps_the_change_pending_for_a_full_version() -> None:
    world = World(RulesConfig(min_updates=3, min_updates_window_s=10))
    world.touch(3, 7)
    world.touch(3, 7)
    for _ in range(2):  # the first take sees the row and its time begins; at the second it is over
        world.take(full=False)
        assert world.way == (False, {}, [])
        world.ack()
        world.now_s += 11
    world.touch(3, 7)
    world.take(full=False)
    assert world.way == (False, {}, []), "gathering began anew: one update is not three"
    world.ack()
    world.take(full=True)
    assert world.way == (True, {7: 3}, [])
    world.ack()
    assert world.changed.num_pending == 0


def test_pending_state_is_bounded_without_any_ack() -> None:
    """A dead server: keys come and go, and what is remembered stays below the table's size."""
    world = World()
    for slot in range(NUM_SLOTS):
        world.touch(slot, slot)
    world.take(full=False)
    world.ack()
    for key in range(NUM_SLOTS, 5000):
        world.touch(key % NUM_SLOTS, key)
    assert world.changed.num_pending <= 2 * NUM_SLOTS


def test_rules_run_on_the_publishing_clock_whatever_the_event_time() -> None:
    """Events of years ago: three updates within the window pass, however long ago they happened."""
    world = World(RulesConfig(min_updates=3, min_updates_window_s=600))
    sent = 0
    for second in range(30):
        world.now_s = 2_000_000_000 + second
        world.touch(3, 7)
        world.take(full=False)
        assert world.way is not None
        sent += len(world.way[1])
        world.ack()
    assert sent == 10
