"""The rules, line by line of the tables in docs/rules.md, and against a slow transcription."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_eviction import ClassPolicy, IdTable, TablePolicy
from feature_eviction.keys import make_keys
from param_server.rules import NEVER_PUSHED_S, ChangedColumns, Reason, decide, record_push
from param_server.rules_config import RULES_PRESETS, RowRules, RulesConfig

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "rules.md"
NOW_S = 1_000_000
TABLE_RULES = RulesConfig(
    min_updates=3, min_updates_window_s=10, refresh_after_s=100, update_limit=2, update_limit_window_s=20
)


def make_columns(
    updates, gather_start_s, pushes, window_start_s, last_pushed_s, *, score=None, gathered=None, seen_s=None
) -> ChangedColumns:
    return ChangedColumns(
        updates_N=np.array(updates, np.uint32),
        gather_start_s_N=np.array(gather_start_s, np.int64),
        pushes_N=np.array(pushes, np.uint32),
        window_start_s_N=np.array(window_start_s, np.int64),
        last_pushed_s_N=np.array(last_pushed_s, np.int64),
        score_N=None if score is None else np.array(score, np.float32),
        gathered_score_N=None if gathered is None else np.array(gathered, np.float32),
        last_seen_s_N=None if seen_s is None else np.array(seen_s, np.int64),
    )


def table_lines(heading: str = "Truth table") -> list[list[str]]:
    section = DOCUMENT.read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


def test_the_tables_in_the_document_are_whole():
    lines = table_lines()
    assert len(lines) == 49
    assert {line[9] for line in lines} == {reason.name.lower() for reason in Reason}
    assert "`min_updates = 3`, `min_updates_window_s = 10`, `refresh_after_s = 100`, `update_limit = 2`" in (
        DOCUMENT.read_text(encoding="utf-8")
    )
    assert len(table_lines("Whose rules")) == 7
    assert len(table_lines("Reading c of expiration")) == 5
    assert [line[0].strip("`") for line in table_lines("Presets")] == list(RULES_PRESETS)


@pytest.mark.parametrize("line", table_lines(), ids=lambda line: "/".join(line))
def test_each_line_of_the_document_holds(line):
    settings_cell, updates, first, pushes, window, pushed, score, gathered, seen, outcome, anew = line
    pairs = [setting.split("=") for setting in settings_cell.split(", ") if setting]
    changes = {name: float(value) if "score" in name else int(value) for name, value in pairs}
    rules = msgspec.structs.replace(TABLE_RULES, **changes)
    columns = make_columns(
        [int(updates)],
        [NOW_S - int(first)],
        [int(pushes)],
        [NOW_S - int(window)],
        [NEVER_PUSHED_S if pushed == "never" else NOW_S - int(pushed)],
        score=[float(score)] if score else None,
        gathered=[float(gathered)] if gathered else None,
        seen_s=[NOW_S - int(seen)] if seen else None,
    )
    decision = decide(columns, rules=rules, now_s=NOW_S)
    assert Reason(int(decision.reason_N[0])).name.lower() == outcome
    assert bool(decision.send_N[0]) == (outcome == "sent")
    assert bool(decision.restart_N[0]) == (anew == "yes")


CLASS_RULES = RulesConfig(
    update_limit=1,
    by_table={"item": RowRules(min_updates=2)},
    by_class={"4": RowRules(min_updates=3), "5": RowRules(min_updates=9)},
)


@pytest.mark.parametrize("line", table_lines("Whose rules"), ids=lambda line: "/".join(line))
def test_a_row_follows_its_class_else_its_table_else_the_general_rules(line):
    table, class_id, updates, outcome = line
    columns = make_columns([int(updates)], [NOW_S], [1], [NOW_S], [NOW_S])
    keys_N, _ = make_keys(np.array([77]), class_id=int(class_id))
    decision = decide(columns, rules=CLASS_RULES, now_s=NOW_S, table=table, keys_N=keys_N)
    assert Reason(int(decision.reason_N[0])).name.lower() == outcome


def test_rows_of_many_classes_are_decided_as_if_each_came_alone():
    rng = np.random.default_rng(3)
    class_ids = rng.integers(2, 7, 200)
    keys_N = np.array([make_keys(np.array([i]), class_id=int(c))[0][0] for i, c in enumerate(class_ids)])
    columns = make_columns(
        rng.integers(0, 10, 200), [NOW_S] * 200, rng.integers(0, 2, 200), [NOW_S] * 200, [NOW_S] * 200
    )
    together = decide(columns, rules=CLASS_RULES, now_s=NOW_S, table="item", keys_N=keys_N)
    assert 0 < together.send_N.sum() < 200
    for row in range(200):
        chosen_N = np.arange(200) == row
        one = decide(
            columns.rows(chosen_N), rules=CLASS_RULES, now_s=NOW_S, table="item", keys_N=keys_N[chosen_N]
        )
        assert one.reason_N[0] == together.reason_N[row]
    pushes_N, _ = record_push(columns, rules=CLASS_RULES, now_s=NOW_S + 60, table="item", keys_N=keys_N)
    assert (pushes_N == 1).all(), "every window ended"


@pytest.mark.parametrize("line", table_lines("Reading c of expiration"), ids=lambda line: "/".join(line))
def test_a_row_not_updated_the_needed_times_within_its_lifetime_is_deleted(line):
    updates, last_seen, now, outcome = line
    keys_N, _ = make_keys(np.array([1]), class_id=4)
    others_N, _ = make_keys(np.array([2]), class_id=5)
    table = IdTable(TablePolicy(num_slots=100, classes=(ClassPolicy(class_id=4, ttl_s=100, min_updates=3),)))
    times_s = [0] * (int(updates) - 1) + [int(last_seen)]
    for seen_s in [*times_s, int(now)]:
        asked_N = others_N if seen_s == int(now) else keys_N
        table.release(table.map(asked_N, shows_N=[1], positives_N=[0], now_s=1000 + seen_s).batch)
    assert (table.lookup(keys_N)[0] >= 0) == (outcome == "stays")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RulesConfig(min_score=1.0), "min_score needs the column score_N"),
        (RulesConfig(min_gathered_score=1.0), "min_gathered_score needs the column gathered_score_N"),
        (RulesConfig(unseen_max_s=1), "unseen_max_s needs the column last_seen_s_N"),
        (CLASS_RULES, "by_class needs the keys of the 1 rows of table 'item'"),
    ],
)
def test_a_rule_without_what_it_needs_is_an_error_and_not_ignored(rules, message):
    assert rules.needs_keys or rules.needs_scores or rules.needs_last_seen
    with pytest.raises(ValueError, match=message):
        decide(make_columns([1], [0], [0], [0], [0]), rules=rules, now_s=NOW_S, table="item")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_score = -1.0", "min_score must not be negative"),
        ("unseen_max_s = -1", "unseen_max_s must not be negative"),
        ("min_score = nan", "min_score must not be negative"),
        ("[by_class.4]\nmin_updates = 0", "min_updates must be at least 1"),
        ("[by_class.item]\nmin_updates = 2", "a feature class is 0..4095, found 'item'"),
        ("[by_class.4096]\nmin_updates = 2", "a feature class is 0..4095, found '4096'"),
        ("[by_class.4]\nby_table = 2", "unknown field `by_table`"),
    ],
)
def test_wrong_rules_are_refused_by_name(text, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.toml.decode(text, type=RulesConfig)


def test_the_paddle_preset_holds_its_published_thresholds():
    day = 86_400
    columns = make_columns(
        [1] * 5,
        [NOW_S] * 5,
        [0] * 5,
        [0] * 5,
        [NEVER_PUSHED_S] * 5,
        score=[1.5, 1.49, 1.5, 1.5, 20],
        gathered=[0.25, 1, 0.24, 1, 20],
        seen_s=[NOW_S - 16 * day, NOW_S, NOW_S, NOW_S - 16 * day - 1, NOW_S],
    )
    decision = decide(columns, rules=RULES_PRESETS["paddle_ctr"], now_s=NOW_S)
    found = [Reason(int(reason)).name.lower() for reason in decision.reason_N]
    assert found == ["sent", "low_score", "little_score", "unseen", "sent"]


def test_the_defaults_send_every_changed_row():
    columns = make_columns([1, 9], [0, NOW_S], [0, 99], [NOW_S, 0], [NOW_S, NEVER_PUSHED_S])
    decision = decide(columns, rules=RulesConfig(), now_s=NOW_S)
    assert decision.send_N.all()
    assert decision.num_held_back() == {}


def test_no_rows_give_an_empty_decision():
    decision = decide(make_columns([], [], [], [], []), rules=TABLE_RULES, now_s=NOW_S)
    assert decision.send_N.shape == decision.reason_N.shape == decision.restart_N.shape == (0,)
    assert decision.num_held_back() == {}


def test_held_back_rows_are_counted_by_reason():
    columns = make_columns([3, 3, 1, 1, 1], [NOW_S] * 5, [2, 0, 0, 0, 2], [NOW_S] * 5, [NOW_S] * 5)
    decision = decide(columns, rules=TABLE_RULES, now_s=NOW_S)
    assert decision.num_held_back() == {"update_limit": 1, "few_updates": 3}
    assert decision.send_N.dtype == np.bool_
    assert decision.reason_N.dtype == np.uint8


def slow_decision(row: tuple[int, ...], rules: RulesConfig, now_s: int) -> tuple[str, bool]:
    updates, gather_start_s, pushes, window_start_s, last_pushed_s = row
    wanted = updates >= rules.min_updates
    if rules.refresh_after_s and last_pushed_s != NEVER_PUSHED_S:
        wanted = wanted or now_s - last_pushed_s > rules.refresh_after_s
    if not wanted:
        late = rules.min_updates_window_s > 0 and now_s - gather_start_s > rules.min_updates_window_s
        return "few_updates", late
    in_window = now_s - window_start_s < rules.update_limit_window_s
    if rules.update_limit and in_window and pushes >= rules.update_limit:
        return "update_limit", False
    return "sent", False


SMALL = st.integers(0, 12)


@settings(max_examples=300, deadline=None)
@given(
    st.builds(
        RulesConfig,
        update_limit=st.integers(0, 3),
        update_limit_window_s=st.integers(1, 12),
        min_updates=st.integers(1, 4),
        min_updates_window_s=SMALL,
        refresh_after_s=SMALL,
    ),
    st.lists(st.tuples(st.integers(0, 5), SMALL, st.integers(0, 4), SMALL, st.integers(-1, 12)), max_size=8),
)
def test_decide_equals_the_slow_transcription(rules, rows):
    columns = make_columns(*(zip(*rows, strict=True) if rows else ([], [], [], [], [])))
    decision = decide(columns, rules=rules, now_s=12)
    found = [
        (Reason(int(reason)).name.lower(), bool(restart))
        for reason, restart in zip(decision.reason_N, decision.restart_N, strict=True)
    ]
    assert found == [slow_decision(row, rules, 12) for row in rows]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_row_goes_more_often_than_the_limit_in_any_window(limit):
    """A row that always wants to go, published each second, over many windows."""
    rules = RulesConfig(update_limit=limit, update_limit_window_s=7)
    columns = make_columns([1], [0], [0], [0], [NEVER_PUSHED_S])
    pushed_at = []
    for now_s in range(1000, 1100):
        if not decide(columns, rules=rules, now_s=now_s).send_N[0]:
            continue
        pushed_at.append(now_s)
        pushes_N, window_start_s_N = record_push(columns, rules=rules, now_s=now_s)
        columns = make_columns([1], [now_s], pushes_N, window_start_s_N, [now_s])
    starts = pushed_at[::limit]
    assert len(starts) >= 13
    for start in starts:
        assert sum(start <= at < start + 7 for at in pushed_at) <= limit


def test_a_push_after_the_window_opens_the_next_one():
    rules = RulesConfig(update_limit=2, update_limit_window_s=10)
    columns = make_columns([1, 1], [0, 0], [2, 1], [100, 105], [100, 105])
    pushes_N, window_start_s_N = record_push(columns, rules=rules, now_s=110)
    assert pushes_N.tolist() == [1, 2]
    assert window_start_s_N.tolist() == [110, 105]
