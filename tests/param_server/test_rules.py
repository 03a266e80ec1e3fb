"""The rules, line by line of the table in docs/rules.md, and against a slow transcription."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from param_server.rules import NEVER_PUSHED_S, ChangedColumns, Reason, decide, record_push
from param_server.rules_config import RulesConfig

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "rules.md"
NOW_S = 1_000_000
TABLE_RULES = RulesConfig(
    min_updates=3, min_updates_window_s=10, refresh_after_s=100, update_limit=2, update_limit_window_s=20
)


def make_columns(updates, gather_start_s, pushes, window_start_s, last_pushed_s) -> ChangedColumns:
    return ChangedColumns(
        updates_N=np.array(updates, np.uint32),
        gather_start_s_N=np.array(gather_start_s, np.int64),
        pushes_N=np.array(pushes, np.uint32),
        window_start_s_N=np.array(window_start_s, np.int64),
        last_pushed_s_N=np.array(last_pushed_s, np.int64),
    )


def table_lines() -> list[list[str]]:
    lines = DOCUMENT.read_text(encoding="utf-8").split("## Truth table")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return cells[2:]


def test_the_table_in_the_document_is_the_whole_table():
    lines = table_lines()
    assert len(lines) == 30
    assert {line[6] for line in lines} == {"sent", "few_updates", "update_limit"}
    assert "`min_updates = 3`, `min_updates_window_s = 10`, `refresh_after_s = 100`, `update_limit = 2`" in (
        DOCUMENT.read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("line", table_lines(), ids=lambda line: "/".join(line))
def test_each_line_of_the_document_holds(line):
    settings_cell, updates, first, pushes, window, pushed, outcome, anew = line
    name, _, value = settings_cell.partition("=")
    rules = msgspec.structs.replace(TABLE_RULES, **({name: int(value)} if name else {}))
    columns = make_columns(
        [int(updates)],
        [NOW_S - int(first)],
        [int(pushes)],
        [NOW_S - int(window)],
        [NEVER_PUSHED_S if pushed == "never" else NOW_S - int(pushed)],
    )
    decision = decide(columns, rules=rules, now_s=NOW_S)
    assert Reason(int(decision.reason_N[0])).name.lower() == outcome
    assert bool(decision.send_N[0]) == (outcome == "sent")
    assert bool(decision.restart_N[0]) == (anew == "yes")


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
