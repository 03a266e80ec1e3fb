"""The synchronisation rules: which changed rows of a delta go out now, and why the others wait.

Pure functions over columns of N changed rows; docs/rules.md is their truth table. A delete always
passes, and a full version takes every row without asking: both are the caller's to do.
Source of the readings: PEPNet (arXiv 2302.01115) and retellings of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from param_server.rules_config import RulesConfig

NEVER_PUSHED_S = -1


class Reason(IntEnum):
    """Why a row is held back; the lower-case name is what counters show."""

    SENT = 0
    UPDATE_LIMIT = 1
    FEW_UPDATES = 2


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


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What happens to each of N rows."""

    send_N: npt.NDArray[np.bool_]
    """Goes out now."""
    reason_N: npt.NDArray[np.uint8]
    """A Reason."""
    restart_N: npt.NDArray[np.bool_]
    """The gathered updates are void: the caller sets the row's updates_N to 0. The row stays changed."""

    def num_held_back(self) -> dict[str, int]:
        """Rows held back, by the reason's lower-case name; only the reasons that occurred."""
        counts = np.bincount(self.reason_N, minlength=len(Reason))
        return {
            reason.name.lower(): int(counts[reason])
            for reason in Reason
            if reason is not Reason.SENT and counts[reason]
        }


def decide(columns: ChangedColumns, *, rules: RulesConfig, now_s: int) -> Decision:
    """Apply the rules to N changed rows.

    1. Few updates, reading (a): a row with fewer than `min_updates` waits; once older than
       `min_updates_window_s` its updates are void and it gathers anew. The window is judged here, at
       each publish, so a row that reaches the number stays good however long the limit holds it back.
    2. Refresh, reading (b): a row whose serving value is older than `refresh_after_s` goes in spite
       of 1. A row that serving never had is not refreshed: it has no value that could be old.
    3. Update limit: a row that would go waits if it went `update_limit` times in its current window.

    Args: columns: N changed rows; now_s: unix seconds.
    Returns: a Decision of [N].
    """
    enough_N = columns.updates_N >= rules.min_updates
    pushed_before_N = columns.last_pushed_s_N != NEVER_PUSHED_S
    if rules.refresh_after_s:
        old_N = now_s - columns.last_pushed_s_N > rules.refresh_after_s
        refresh_N = pushed_before_N & old_N
    else:
        refresh_N = np.zeros_like(enough_N)
    wanted_N = enough_N | refresh_N
    send_N = wanted_N & _under_limit(columns, rules=rules, now_s=now_s)
    restart_N = np.zeros_like(enough_N)
    if rules.min_updates_window_s:
        restart_N = ~wanted_N & (now_s - columns.gather_start_s_N > rules.min_updates_window_s)
    reason_N = np.where(send_N, Reason.SENT, np.where(wanted_N, Reason.UPDATE_LIMIT, Reason.FEW_UPDATES))
    return Decision(
        send_N=send_N,
        reason_N=reason_N.astype(np.uint8),
        restart_N=restart_N,
    )


def record_push(
    columns: ChangedColumns, *, rules: RulesConfig, now_s: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """pushes_N and window_start_s_N after these rows were pushed and acknowledged at now_s.

    A push after the window's end opens the next window with itself as its first.
    """
    ended_N = _window_ended(columns, rules=rules, now_s=now_s)
    pushes_N = np.where(ended_N, 0, columns.pushes_N).astype(np.uint32) + np.uint32(1)
    return pushes_N, np.where(ended_N, np.int64(now_s), columns.window_start_s_N)


def _under_limit(columns: ChangedColumns, *, rules: RulesConfig, now_s: int) -> npt.NDArray[np.bool_]:
    if not rules.update_limit:
        return np.ones(len(columns.pushes_N), np.bool_)
    under_N: npt.NDArray[np.bool_] = columns.pushes_N < rules.update_limit
    return under_N | _window_ended(columns, rules=rules, now_s=now_s)


def _window_ended(columns: ChangedColumns, *, rules: RulesConfig, now_s: int) -> npt.NDArray[np.bool_]:
    ended_N: npt.NDArray[np.bool_] = now_s - columns.window_start_s_N >= rules.update_limit_window_s
    return ended_N
