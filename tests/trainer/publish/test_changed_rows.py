"""ChangedRows against a plain model: what serving holds plus what is pending is what the trainer has."""

from __future__ import annotations

import numpy as np
import pytest

from feature_eviction import TableRows
from param_server.client import RulesConfig
from trainer.publish.changed_rows import ChangedRows, Clocks, Taken

NUM_SLOTS = 12
EVERYTHING = RulesConfig()


class World:
    """A trainer's table, what it published, and a copy that serving would have; values are counters."""

    def __init__(self, rules: RulesConfig = EVERYTHING) -> None:
        self.rules = rules
        self.changed = ChangedRows(NUM_SLOTS, table="t")
        self.score: dict[int, float] = {}
        self.last_seen_s: dict[int, int] = {}
        self.event_time_s = 500
        self.owner: dict[int, int] = {}
        self.value: dict[int, int] = {}
        self.serving: dict[int, int] = {}
        self.way: tuple[bool, dict[int, int], list[int]] | None = None
        self.now_s = 1000

    def rows_of(self, slots_N: np.ndarray) -> TableRows:
        keys = [self.owner[int(slot)] for slot in slots_N]
        return TableRows(
            keys_N=np.array(keys, np.int64),
            slots_N=slots_N,
            scores_N=np.array([self.score.get(key, 0.0) for key in keys], np.float32),
            last_seen_s_N=np.array([self.last_seen_s.get(key, self.event_time_s) for key in keys], np.int64),
            updates_N=np.zeros(len(keys), np.uint32),
        )

    def take_delta(self) -> Taken:
        clocks = Clocks(now_s=self.now_s, event_time_s=self.event_time_s)
        return self.changed.take(self.rows_of, rules=self.rules, clocks=clocks)

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
            taken = self.changed.take_full(self.rows_of(np.array(sorted(self.owner), np.int64)))
        else:
            taken = self.take_delta()
        self.note(taken)

    def withhold(self, *keys: int, reason: str) -> Taken:
        """Of the version just taken."""
        assert self.way is not None
        taken = self.changed.withhold(
            np.isin(np.array(list(self.way[1]), np.int64), np.array(keys, np.int64)), reason=reason
        )
        self.note(taken)
        return taken

    def note(self, taken: Taken) -> None:
        full = taken.full
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
    world = World()
    world.owner = {3: 30, 5: 50}
    world.changed.touch(np.array([5, 3, 5, 5]))
    world.changed.touch(np.array([3]))
    taken = world.take_delta()
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
            assert world.way is not None
            if world.way[1] and rng.random() < 0.3:
                world.withhold(int(rng.choice(list(world.way[1]))), reason="not_finite")
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
    taken = world.take_delta()
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


@pytest.mark.parametrize("full", [False, True])
def test_pending_state_is_bounded_while_every_version_fails(full: bool) -> None:
    """Rows leave while a version carries them that never arrives: serving has none of them to delete."""
    world = World()
    for slot in range(NUM_SLOTS):
        world.touch(slot, slot)
    world.take(full=False)
    world.ack()
    for attempt in range(1, 100):
        world.take(full=full)
        for slot in range(NUM_SLOTS):
            world.touch(slot, attempt * NUM_SLOTS + slot)
        world.abandon()
        assert world.changed.num_pending <= 2 * NUM_SLOTS
    world.take(full=True)
    world.ack()
    assert world.serving == world.value
    assert world.changed.num_pending == 0


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


def test_a_withheld_row_stays_pending_with_its_reason_and_its_old_delete_goes() -> None:
    """Serving holds key 7; it leaves, comes back as a row that cannot be sent, and is then mended."""
    world = World()
    world.touch(3, 7)
    world.take(full=False)
    world.ack()
    world.evict(3)
    world.touch(4, 7)
    world.touch(5, 8)
    world.take(full=False)
    assert world.withhold(7, reason="not_finite").held_back == {"not_finite": 1}
    assert world.way == (False, {8: 1}, [7])
    world.ack()
    assert world.changed.num_pending == 1
    world.take(full=False)
    assert world.way == (False, {7: 1}, [])
    world.ack()
    assert world.serving == world.value


def test_a_row_goes_once_it_gathered_enough_score_since_its_last_acknowledged_push() -> None:
    world = World(RulesConfig(min_gathered_score=1.0))
    sent = []
    for score in (0.5, 1.0, 1.9, 2.0, 2.5):
        world.touch(3, 7)
        world.score[7] = score
        world.take(full=False)
        assert world.way is not None
        sent.append(len(world.way[1]))
        if score == 2.0:
            world.abandon()  # the push was lost: what it was worth is gathered still
        else:
            world.ack()
    assert sent == [0, 1, 0, 1, 1]


def test_the_next_owner_of_a_slot_gathers_its_own_score() -> None:
    world = World(RulesConfig(min_gathered_score=1.0))
    world.score = {7: 5.0, 8: 1.5}
    world.touch(3, 7)
    world.take(full=False)
    world.ack()
    world.touch(3, 8)
    world.take(full=False)
    assert world.way == (False, {8: 1}, [7])


def test_worth_and_unseen_are_judged_by_score_and_by_event_time() -> None:
    """Events of years ago: a row seen ten seconds before the newest event is ten seconds unseen."""
    world = World(RulesConfig(min_score=1.0, unseen_max_s=20))
    world.now_s = 2_000_000_000
    world.score = {7: 0.9, 8: 1.0, 9: 1.0}
    world.last_seen_s = {7: 490, 8: 490, 9: 479}
    for slot, key in ((1, 7), (2, 8), (3, 9)):
        world.touch(slot, key)
    taken = world.take_delta()
    assert taken.keys_N.tolist() == [8]
    assert taken.held_back == {"low_score": 1, "unseen": 1}
    assert (taken.scores_N.tolist(), taken.last_seen_s_N.tolist()) == ([1.0], [490])


def test_rules_differ_by_table_and_by_feature_class() -> None:
    one, three = RulesConfig(update_limit=1), RulesConfig(update_limit=3)
    rules = RulesConfig(update_limit=9, by_table={"t": one}, by_class={"4": three})
    of_class_4 = (4 << 52) | 7
    world = World(rules)
    sent: dict[int, int] = {7: 0, of_class_4: 0}
    for _ in range(5):
        world.touch(3, 7)
        world.touch(4, of_class_4)
        world.take(full=False)
        assert world.way is not None
        for key in world.way[1]:
            sent[key] += 1
        world.ack()
    assert sent == {7: 1, of_class_4: 3}
