from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_eviction import (
    AdmissionConfig,
    ClassPolicy,
    IdTable,
    MapResult,
    ScoreConfig,
    State,
    StateError,
    TablePolicy,
)
from feature_eviction.eviction import SHRINK_PASSES

CLASSES = (
    ClassPolicy(class_id=1, ttl_s=20),
    ClassPolicy(class_id=2, protected=True),
    ClassPolicy(class_id=3, admission=AdmissionConfig(kind="count", min_count=2)),
    ClassPolicy(class_id=4, admission=AdmissionConfig(kind="probability", probability=0.5)),
)


def stream(seed: int, num_calls: int) -> list[tuple[list[int], int, int]]:
    """Calls of (keys, now_s, batches left in flight)."""
    generator = np.random.default_rng(seed)
    calls, now_s = [], 1_000_000
    for _ in range(num_calls):
        now_s += int(generator.integers(-2, 12))
        classes_N = generator.integers(0, 5, 12).astype(np.uint64)
        ids_N = generator.integers(0, 30, 12).astype(np.uint64)
        keys = (classes_N << np.uint64(52) | ids_N).astype(np.int64).tolist()
        calls.append((keys, now_s, int(generator.integers(0, 3))))
    return calls


def fed(table: IdTable, calls: list[tuple[list[int], int, int]]) -> list[list[list[int]]]:
    answers = []
    for keys, now_s, num_in_flight in calls:
        shows_N = np.full(len(keys), 2)
        result = table.map(keys, shows_N=shows_N, positives_N=np.arange(len(keys)) % 3, now_s=now_s)
        table.release(result.batch - num_in_flight)
        answers.append([np.asarray(part).tolist() for part in result])
    return answers


def same(left: State, right: State) -> bool:
    """Bit for bit, the NaN of free slots included."""
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def full_table(num_slots: int = 8) -> IdTable:
    table = IdTable(TablePolicy(num_slots=num_slots, classes=CLASSES, count_sketch_width=16))
    fed(table, [*stream(3, 10), ([1 << 52, 1 << 52 | 1], 1_000_200, 0)])
    return table


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    saved_after=st.integers(0, 25),
    num_slots=st.integers(1, 40),
    victim_window=st.integers(1, 50),
    expiry_scan=st.integers(0, 9),
    kind=st.sampled_from(["kraken", "lru", "lfu"]),
)
def test_loaded_table_goes_on_as_if_it_had_never_been_saved(
    seed: int, saved_after: int, num_slots: int, victim_window: int, expiry_scan: int, kind: str
) -> None:
    policy = TablePolicy(
        num_slots=num_slots,
        score=ScoreConfig(kind=kind),
        classes=CLASSES,
        victim_window=victim_window,
        expiry_scan=expiry_scan,
        count_sketch_width=16,
        seed=seed,
    )
    calls = stream(seed, 25)
    whole, parted = IdTable(policy), IdTable(policy)
    expected = fed(whole, calls)
    before = fed(parted, calls[:saved_after])
    loaded = IdTable.load(policy, parted.state())
    assert before + fed(loaded, calls[saved_after:]) == expected
    assert same(loaded.state(), whole.state())
    assert loaded.counters() == whole.counters()


def test_state_is_a_copy() -> None:
    table = full_table()
    state = table.state()
    kept = {name: array.copy() for name, array in state.items()}
    fed(table, stream(4, 5))
    assert same(state, kept)
    loaded = IdTable.load(table.policy, state)
    fed(loaded, stream(4, 5))
    assert same(state, kept)


def swap_first_two(array: np.ndarray) -> None:
    array[0] = array[1]


DAMAGE: dict[str, Callable[[State], None]] = {
    "key": lambda state: swap_first_two(state["key"]),
    "slot": lambda state: swap_first_two(state["slot"]),
    "cell": lambda state: swap_first_two(state["cell"]),
    "score": lambda state: state["score"].__setitem__(0, np.inf),
    "cursors": lambda state: state["cursors"].__setitem__(2, 11),
    "free_slots": lambda state: state.update(free_slots=np.zeros((0, 2), np.int64)),
    "in_flight": lambda state: state.update(in_flight=np.array([[11, 8]])),
    "batches": lambda state: state["batches"].__setitem__(1, 99),
    "counters": lambda state: state["counters"].__setitem__((0, 0), -1),
    "recent": lambda state: state.update(recent=np.zeros(7, np.uint8)),
    "sketch_clock": lambda state: state["sketch_clock"].__setitem__(0, 16),
    "sketch_halved": lambda state: state["sketch_halved"].__setitem__((0, 0), 99),
    "classes": lambda state: state["classes"].__setitem__(0, 7),
    "lifetimes": lambda state: state["lifetimes"].__setitem__(1, 0),
    "score_kind": lambda state: state.update(score_kind=np.frombuffer(b"lru", np.uint8)),
    "random": lambda state: state.update(random=np.zeros(2, np.uint64)),
    "sketch": lambda state: state.update(sketch=np.zeros((4, 8), np.uint8)),
    "last_seen_s": lambda state: state.update(last_seen_s=np.zeros(8, np.int64)),
    "updates": lambda state: state.pop("updates"),
    "wheel_links": lambda state: state["wheel_links"].__setitem__((slice(None), 1), 3),
    "wheel_buckets": lambda state: state["wheel_buckets"].__setitem__(slice(None), 8),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damaged_state_is_refused_by_the_name_of_its_array(name: str) -> None:
    table = full_table()
    assert table.num_rows == 8
    state = table.state()
    DAMAGE[name](state)
    with pytest.raises(StateError, match=rf"'{name}'"):
        IdTable.load(table.policy, state)


def test_every_array_of_the_state_can_be_found_damaged() -> None:
    assert DAMAGE.keys() == full_table().state().keys()


def test_state_of_another_size_is_refused() -> None:
    state = full_table(8).state()
    with pytest.raises(StateError, match=r"'wheel_links': int32 \[9, 2\] expected, found int32 \[8, 2\]"):
        IdTable.load(TablePolicy(num_slots=9, classes=CLASSES, count_sketch_width=16), state)


@pytest.mark.parametrize("slots", [[4, 5], [3, 3, 5], [0, 4, 5], [3, 4, 6]])
def test_free_slots_that_are_not_the_rest_are_refused(
    slots: list[int], sight: Callable[..., MapResult]
) -> None:
    table = IdTable(TablePolicy(num_slots=6))
    sight(table, [1, 2, 3], now_s=5)
    state = table.state()
    assert state["free_slots"].tolist() == [3, 4, 5]
    state["free_slots"] = np.array(slots, np.int64)
    with pytest.raises(StateError, match="held and free slots"):
        IdTable.load(table.policy, state)


def test_wheel_that_runs_in_a_circle_is_refused() -> None:
    table = full_table()
    state = table.state()
    links = state["wheel_links"]
    slot = int(np.flatnonzero(links[:, 0] < -1)[0])
    links[slot, 1] = slot
    with pytest.raises(StateError, match="'wheel_links'"):
        IdTable.load(table.policy, state)


def test_rows_in_flight_are_still_in_flight_after_a_load(sight: Callable[..., MapResult]) -> None:
    policy = TablePolicy(num_slots=1)
    table = IdTable(policy)
    flying = sight(table, [1], now_s=5, release=False)
    loaded = IdTable.load(policy, table.state())
    assert sight(loaded, [2], now_s=6, release=False).slots_N.tolist() == [-1]
    loaded.release(flying.batch)
    assert sight(loaded, [2], now_s=7).slots_N.tolist() == [0]


DAY_S = 86_400
START_S = 1_700_000_000


def living(shortest_s: int, longest_s: int, third: ClassPolicy) -> TablePolicy:
    classes = (ClassPolicy(class_id=1, ttl_s=shortest_s), ClassPolicy(class_id=2, ttl_s=longest_s), third)
    return TablePolicy(num_slots=100, classes=classes)


@pytest.mark.parametrize(
    ("scale_before", "scale_after", "ttl_s_before", "ttl_s_after"),
    [
        (1, 1, 20 * DAY_S, 2 * DAY_S),
        (1, 1, 2 * DAY_S, 20 * DAY_S),
        (1, 1, None, 2 * DAY_S),
        (2, 1, 20 * DAY_S, 2 * DAY_S),
        (1, 2, 2 * DAY_S, 20 * DAY_S),
    ],
)
def test_rows_loaded_leave_when_their_present_lifetime_ends(
    scale_before: int,
    scale_after: int,
    ttl_s_before: int | None,
    ttl_s_after: int,
    sight: Callable[..., MapResult],
) -> None:
    """Needed updates too are gathered in the present lifetime. scale: other ticks, as many buckets."""

    def policy(scale: int, ttl_s: int | None) -> TablePolicy:
        third = ClassPolicy(class_id=3, ttl_s=ttl_s, min_updates=0 if ttl_s is None else 2)
        return living(scale * 256 * 300, scale * 256 * 9000, third)

    before = IdTable(policy(scale_before, ttl_s_before))
    sight(before, [1, 2, 3], now_s=START_S, class_id=3)
    table = IdTable.load(policy(scale_after, ttl_s_after), before.state())
    end_s = START_S + ttl_s_after
    assert len(sight(table, [9], now_s=end_s).evicted_keys_K) == 0
    result = sight(table, [9], now_s=end_s + 1 + table.expiry_resolution_s)
    assert (result.evicted_keys_K >> 52).tolist() == [3, 3, 3]
    assert table.counters().classes[3].rows == 0


def test_rows_of_a_class_that_lost_its_lifetime_stay(sight: Callable[..., MapResult]) -> None:
    before = IdTable(living(DAY_S, 30 * DAY_S, ClassPolicy(class_id=3, ttl_s=2 * DAY_S)))
    sight(before, [1], now_s=START_S, class_id=3)
    sight(before, [1], now_s=START_S, class_id=1)
    table = IdTable.load(living(DAY_S, 30 * DAY_S, ClassPolicy(class_id=3)), before.state())
    assert (sight(table, [], now_s=START_S + 99 * DAY_S).evicted_keys_K >> 52).tolist() == [1]


def test_class_loaded_above_its_quota_shrinks_to_it_in_bounded_steps_that_are_reported(
    sight: Callable[..., MapResult],
) -> None:
    def policy(max_rows: int | None) -> TablePolicy:
        classes = (
            ClassPolicy(class_id=1, max_rows=max_rows),
            ClassPolicy(class_id=2, max_rows=max_rows, protected=True),
        )
        lru = ScoreConfig(kind="lru")
        return TablePolicy(num_slots=2000, victim_window=2000, score=lru, classes=classes)

    before = IdTable(policy(None))
    for now_s in range(10):
        sight(before, range(100 * now_s, 100 * now_s + 100), now_s=now_s, class_id=1)
    sight(before, range(500), now_s=0, class_id=2)
    sight(before, range(400), now_s=0)
    table = IdTable.load(policy(30), before.state())
    bound = SHRINK_PASSES * table.policy.victims_at_once
    left: list[int] = []
    for now_s in range(10, 20):
        result = sight(table, [5000 + now_s], now_s=now_s, class_id=1)
        assert len(result.evicted_keys_K) <= bound + 1
        left += (result.evicted_keys_K - (1 << 52)).tolist()
    # Each id admitted above the quota takes the place of one row; the oldest leave first.
    assert sorted(left) == list(range(980))
    counters = table.counters()
    assert (counters.classes[1].rows, counters.classes[2].rows, counters.rows) == (30, 500, 930)
    assert counters.classes[1].evicted["quota"] == counters.evicted["quota"] == 980


def moved(table: IdTable, num_slots: int) -> tuple[IdTable, np.ndarray]:
    rows = table.rows()
    target = IdTable(TablePolicy(num_slots=num_slots, classes=CLASSES, score=table.policy.score))
    slots_N = target.insert_rows(
        rows.keys_N, scores_N=rows.scores_N, last_seen_s_N=rows.last_seen_s_N, updates_N=rows.updates_N
    )
    return target, slots_N


@pytest.mark.parametrize("kind", ["kraken", "lru", "lfu"])
def test_rows_moved_into_a_larger_table_are_the_same_rows(kind: str) -> None:
    policy = TablePolicy(num_slots=30, classes=CLASSES, score=ScoreConfig(kind=kind))  # type: ignore[arg-type]
    table = IdTable(policy)
    fed(table, stream(6, 20))
    target, slots_N = moved(table, 45)
    before, after = table.rows(), target.rows(slots_N)
    for name in ("keys_N", "scores_N", "last_seen_s_N", "updates_N"):
        assert getattr(after, name).tobytes() == getattr(before, name).tobytes(), name
    assert target.num_rows == table.num_rows
    # They are in no batch: they can leave at once.
    fed(target, stream(7, 40))
    assert target.counters().evicted["score"] > 0


def test_rows_that_do_not_fit_are_the_lowest_unprotected_and_are_counted(
    sight: Callable[..., MapResult],
) -> None:
    table = IdTable(TablePolicy(num_slots=6, score=ScoreConfig(kind="lru"), classes=CLASSES))
    sight(table, [1], now_s=1, class_id=2)
    for now_s in (2, 3, 4, 5):
        sight(table, [now_s], now_s=now_s)
    target, slots_N = moved(table, 3)
    # The protected row is the oldest and stays; of the others the two last seen do.
    assert slots_N.tolist() == [0, -1, -1, 1, 2]
    assert target.counters().evicted["score"] == 2


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("keys_N", [1, 1], "found a key twice"),
        ("keys_N", [7, 1], "key 7 is held already"),
        ("scores_N", [0.0, np.nan], "must be finite"),
        ("scores_N", [0.0], r"scores_N must be \[2\]"),
        ("last_seen_s_N", [0, -1], "last_seen_s_N must be in"),
        ("updates_N", [0, 2**32], "updates_N must be in"),
    ],
)
def test_rows_that_cannot_be_inserted_change_nothing(
    column: str, values: list[float], message: str, sight: Callable[..., MapResult]
) -> None:
    table = IdTable(TablePolicy(num_slots=4))
    sight(table, [7], now_s=1)
    columns = {"keys_N": [1, 2], "scores_N": [0.0, 0.0], "last_seen_s_N": [1, 1], "updates_N": [1, 1]}
    with pytest.raises(ValueError, match=message):
        table.insert_rows(**(columns | {column: values}))  # type: ignore[arg-type]
    assert table.num_rows == 1
