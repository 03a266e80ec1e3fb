"""The synchronisation rules: which changed rows of a delta go out now, and why the others wait.

Pure functions over columns of N changed rows; docs/rules.md is their truth table. A delete always
passes, and a full version takes every row without asking: both are the caller's to do.
Source of the readings: PEPNet (arXiv 2302.01115) and retellings of it; of the scores: Paddle's CTR
accessor (paddle/fluid/distributed/ps/table/ctr_accessor.cc).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.keys import class_of
from param_server.rules_config import RowRules, RulesConfig

NEVER_PUSHED_S = -1

Bools = npt.NDArray[np.bool_]


class Reason(IntEnum):
    """Why a row is held back; the lower-case name is what counters show."""

    SENT = 0
    UPDATE_LIMIT = 1
    FEW_UPDATES = 2
    LOW_SCORE = 3
    LITTLE_SCORE = 4
    UNSEEN = 5


@dataclass(frozen=True, slots=True, eq=False)
class ChangedColumns:
    """What the rules know of N rows that changed since their last acknowledged push; unix seconds."""

    updates_N: npt.NDArray[np.uint32]
    """Updates gathered since the last acknowledged push, or since gathering began anew."""
    gather_start_s_N: npt.NDArray[np.int64]
    """When the first of these updates happened."""
    pushes_N: npt.NDArray[np.uint32]
    """Acknowledged pushes in the current window of the update limit."""
    window_start_s_N: npt.NDArray[np.int64]
    """When that window began."""
    last_pushed_s_N: npt.NDArray[np.int64]
    """When the row's serving value was pushed; NEVER_PUSHED_S: serving has none."""
    score_N: npt.NDArray[np.float32] | None = None
    """What the row is worth now; None: not known, and no rule may ask for it."""
    gathered_score_N: npt.NDArray[np.float32] | None = None
    """What it was worth now minus what it was worth at its last acknowledged push."""
    last_seen_s_N: npt.NDArray[np.int64] | None = None
    """When the id was last seen."""

    def rows(self, chosen_N: Bools) -> ChangedColumns:
        """The columns of some rows."""
        columns: dict[str, Any] = {
            field.name: None if column is None else column[chosen_N]
            for field in fields(self)
            for column in (getattr(self, field.name),)
        }
        return ChangedColumns(**columns)


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What happens to each of N rows."""

    send_N: Bools
    """Goes out now."""
    reason_N: npt.NDArray[np.uint8]
    """A Reason."""
    restart_N: Bools
    """The gathered updates are void: the caller sets the row's updates_N to 0. The row stays changed."""

    def num_held_back(self) -> dict[str, int]:
        """Rows held back, by the reason's lower-case name; only the reasons that occurred."""
        counts = np.bincount(self.reason_N, minlength=len(Reason))
        return {
            reason.name.lower(): int(counts[reason])
            for reason in Reason
            if reason is not Reason.SENT and counts[reason]
        }


def decide(
    columns: ChangedColumns,
    *,
    rules: RulesConfig,
    now_s: int,
    table: str = "",
    keys_N: npt.NDArray[np.int64] | None = None,
) -> Decision:
    """Apply the rules to N changed rows of one table.

    1. Worth: a row whose score is below `min_score`, or unseen for longer than `unseen_max_s`, waits.
    2. Few updates, reading (a): a row with fewer than `min_updates` waits; once older than
       `min_updates_window_s` its updates are void and it gathers anew. The window is judged here, at
       each publish, so a row that reaches the number stays good however long the limit holds it back.
    3. Little score: a row that gathered less than `min_gathered_score` since its last push waits.
    4. Refresh, reading (b): a row whose serving value is older than `refresh_after_s` goes in spite
       of 2 and 3. A row that serving never had is not refreshed: it has no value that could be old.
    5. Update limit: a row that would go waits if it went `update_limit` times in its current window.

    Args: columns: N changed rows; now_s: unix seconds; table: for `by_table`; keys_N: for `by_class`.
    Returns: a Decision of [N].
    Raises: ValueError if a rule asks for a column, or for keys, that was not passed.
    """
    num_rows = len(columns.updates_N)
    decision = Decision(
        send_N=np.zeros(num_rows, np.bool_),
        reason_N=np.zeros(num_rows, np.uint8),
        restart_N=np.zeros(num_rows, np.bool_),
    )
    for chosen_N, chosen_rules in _groups(rules, num_rows=num_rows, table=table, keys_N=keys_N):
        if chosen_N is None:
            return _decide(columns, rules=chosen_rules, now_s=now_s)
        part = _decide(columns.rows(chosen_N), rules=chosen_rules, now_s=now_s)
        decision.send_N[chosen_N] = part.send_N
        decision.reason_N[chosen_N] = part.reason_N
        decision.restart_N[chosen_N] = part.restart_N
    return decision


def _decide(columns: ChangedColumns, *, rules: RowRules, now_s: int) -> Decision:
    enough_N = columns.updates_N >= rules.min_updates
    nothing_N = np.zeros_like(enough_N)
    refresh_N = little_N = low_N = unseen_N = nothing_N
    if rules.refresh_after_s:
        pushed_before_N = columns.last_pushed_s_N != NEVER_PUSHED_S
        refresh_N = pushed_before_N & (now_s - columns.last_pushed_s_N > rules.refresh_after_s)
    if rules.min_gathered_score:
        gathered_N = _needed(columns.gathered_score_N, "min_gathered_score", "gathered_score_N")
        little_N = gathered_N < np.float32(rules.min_gathered_score)
    if rules.min_score:
        low_N = _needed(columns.score_N, "min_score", "score_N") < np.float32(rules.min_score)
    if rules.unseen_max_s:
        last_seen_s_N = _needed(columns.last_seen_s_N, "unseen_max_s", "last_seen_s_N")
        unseen_N = now_s - last_seen_s_N > rules.unseen_max_s
    restart_N = nothing_N
    if rules.min_updates_window_s:
        late_N = now_s - columns.gather_start_s_N > rules.min_updates_window_s
        restart_N = ~enough_N & ~refresh_N & late_N
    at_limit_N = ~_under_limit(columns, rules=rules, now_s=now_s)
    # The first that applies is the reason counted.
    reason_N = np.select(
        [low_N, unseen_N, ~enough_N & ~refresh_N, little_N & ~refresh_N, at_limit_N],
        [Reason.LOW_SCORE, Reason.UNSEEN, Reason.FEW_UPDATES, Reason.LITTLE_SCORE, Reason.UPDATE_LIMIT],
        default=Reason.SENT,
    ).astype(np.uint8)
    return Decision(send_N=reason_N == Reason.SENT, reason_N=reason_N, restart_N=restart_N)


def record_push(
    columns: ChangedColumns,
    *,
    rules: RulesConfig,
    now_s: int,
    table: str = "",
    keys_N: npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """pushes_N and window_start_s_N after these rows were pushed and acknowledged at now_s.

    A push after the window's end opens the next window with itself as its first.
    """
    ended_N = np.zeros(len(columns.pushes_N), np.bool_)
    for chosen_N, chosen_rules in _groups(rules, num_rows=len(ended_N), table=table, keys_N=keys_N):
        if chosen_N is None:
            ended_N = _window_ended(columns.window_start_s_N, rules=chosen_rules, now_s=now_s)
        else:
            starts_s_N = columns.window_start_s_N[chosen_N]
            ended_N[chosen_N] = _window_ended(starts_s_N, rules=chosen_rules, now_s=now_s)
    pushes_N = np.where(ended_N, 0, columns.pushes_N).astype(np.uint32) + np.uint32(1)
    return pushes_N, np.where(ended_N, np.int64(now_s), columns.window_start_s_N)


def _groups(
    rules: RulesConfig, *, num_rows: int, table: str, keys_N: npt.NDArray[np.int64] | None
) -> Iterator[tuple[Bools | None, RowRules]]:
    """Which rows follow which rules; None = all of them follow the same."""
    of_table = rules.by_table.get(table, rules)
    if not rules.needs_keys:
        yield None, of_table
        return
    if keys_N is None or len(keys_N) != num_rows:
        raise ValueError(f"rules: by_class needs the keys of the {num_rows} rows of table '{table}'")
    classes_N = class_of(keys_N)
    others_N = np.ones(num_rows, np.bool_)
    for name, of_class in rules.by_class.items():
        chosen_N = classes_N == int(name)
        others_N &= ~chosen_N
        if chosen_N.any():
            yield chosen_N, of_class
    yield others_N, of_table


def _needed(column_N: npt.NDArray[Any] | None, rule: str, name: str) -> npt.NDArray[Any]:
    if column_N is None:
        raise ValueError(f"rules: {rule} needs the column {name}, which was not passed")
    return column_N


def _under_limit(columns: ChangedColumns, *, rules: RowRules, now_s: int) -> Bools:
    if not rules.update_limit:
        return np.ones(len(columns.pushes_N), np.bool_)
    under_N: Bools = columns.pushes_N < rules.update_limit
    return under_N | _window_ended(columns.window_start_s_N, rules=rules, now_s=now_s)


def _window_ended(window_start_s_N: npt.NDArray[np.int64], *, rules: RowRules, now_s: int) -> Bools:
    ended_N: Bools = now_s - window_start_s_N >= rules.update_limit_window_s
    return ended_N
