"""What a set of rules would have sent: a replay of row updates, pass by pass, on the stream's own clock.

Each pass publishes what the rules let through. Counted are the bytes, the rows held back by reason, and
the staleness of what serving holds: after a pass, for each id that was updated in it, weighted by its
updates, the time since the oldest update that serving lacks. Shapes: E updates, U distinct keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from param_server.errors import RulesError
from param_server.rules import NEVER_PUSHED_S, ChangedColumns, decide, record_push
from param_server.rules_config import RulesConfig
from proto.row_formats import RowFormat, packed_row_bytes

ID_BYTES = 8
PASSES_MAX = 10_000_000
PUBLISH_EVERY_S_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class Updates:
    """E updates of rows, in the order of time."""

    times_s_E: npt.NDArray[np.float64]
    keys_E: npt.NDArray[np.int64]
    gains_E: npt.NDArray[np.float32]
    """How much each update adds to its row's score."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all sets of rules share."""

    dim: int
    row_format: RowFormat
    publish_every_s: int
    score_decay_per_day: float

    def __post_init__(self) -> None:
        if self.dim < 1 or self.publish_every_s < 1 or not 0 <= self.score_decay_per_day < 1:
            raise ValueError(
                "dim and publish_every_s must be at least 1 and score_decay_per_day in [0, 1), found "
                f"{self.dim}, {self.publish_every_s} and {self.score_decay_per_day}"
            )
        if self.publish_every_s > PUBLISH_EVERY_S_MAX:
            raise ValueError(
                f"publish_every_s must be at most {PUBLISH_EVERY_S_MAX}, found {self.publish_every_s}"
            )

    @property
    def table(self) -> str:
        """The name that a trainer gives to a table of this dim: `by_table` is for it or for none."""
        return f"dim{self.dim}"


@dataclass(slots=True)
class Outcome:
    """Totals over a replay; what is still pending at its end has not been sent."""

    num_passes: int = 0
    num_updates: int = 0
    num_pushed: int = 0
    num_pending: int = 0
    bytes_sent: int = 0
    bytes_everything: int = 0
    """Every touched row, float32, every pass: what the rules are to be measured against."""
    held_back: dict[str, int] = field(default_factory=dict)
    staleness_S: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    """How many updates met a row that was as many whole seconds stale as the index says."""

    def staleness_s(self, quantile: float) -> int:
        """The staleness that this share of updates did not exceed."""
        total = int(self.staleness_S.sum())
        if not total:
            return 0
        return int(np.searchsorted(np.cumsum(self.staleness_S), quantile * total, side="left"))

    @property
    def times_fewer_bytes(self) -> float:
        return self.bytes_everything / max(1, self.bytes_sent)


def simulate(updates: Updates, *, rules: RulesConfig, setting: Setting) -> Outcome:
    """Replay all updates under one set of rules.

    Raises: RulesError if they lie so far apart that one pass after the other would take for ever.
    """
    keys_U, rows_E = np.unique(updates.keys_E, return_inverse=True)
    rows = _Rows(keys_U)
    outcome = Outcome()
    for now_s, start, end in _passes(updates.times_s_E, every_s=setting.publish_every_s):
        touched_T, counts_T = np.unique(rows_E[start:end], return_counts=True)
        rows.touch(rows_E[start:end], updates.times_s_E[start:end], updates.gains_E[start:end])
        rows.decay_scores(updates.times_s_E[start:end], per_day=setting.score_decay_per_day)
        outcome.num_passes += 1
        outcome.num_updates += end - start
        _publish(rows, outcome, rules=rules, setting=setting, now_s=now_s)
        outcome.bytes_everything += len(touched_T) * (ID_BYTES + packed_row_bytes(setting.dim, "float32"))
        _count_staleness(outcome, now_s - rows.oldest_s_U[touched_T], counts_T)
    outcome.num_pending = int(np.count_nonzero(rows.pending_U))
    return outcome


class _Rows:
    """The columns that a trainer keeps of its rows."""

    def __init__(self, keys_U: npt.NDArray[np.int64]) -> None:
        num = len(keys_U)
        self.keys_U = keys_U
        self.pending_U = np.zeros(num, np.bool_)
        self.gathered_U = np.zeros(num, np.uint32)
        self.gather_start_s_U = np.zeros(num, np.int64)
        self.pushes_U = np.zeros(num, np.uint32)
        self.window_start_s_U = np.zeros(num, np.int64)
        self.last_pushed_s_U = np.full(num, NEVER_PUSHED_S, np.int64)
        self.last_seen_s_U = np.zeros(num, np.int64)
        self.score_U = np.zeros(num, np.float64)
        self.gained_U = np.zeros(num, np.float64)
        self.oldest_s_U = np.full(num, np.inf)
        """When the oldest update happened that serving lacks; infinite: it lacks none."""
        self._last_time_s = 0.0

    def touch(
        self,
        rows_E: npt.NDArray[np.intp],
        times_s_E: npt.NDArray[np.float64],
        gains_E: npt.NDArray[np.float32],
    ) -> None:
        begun_U = self.gathered_U == 0
        np.add.at(self.gathered_U, rows_E, np.uint32(1))
        np.add.at(self.score_U, rows_E, gains_E)
        np.add.at(self.gained_U, rows_E, gains_E)
        np.minimum.at(self.oldest_s_U, rows_E, times_s_E)
        np.maximum.at(self.last_seen_s_U, rows_E, times_s_E.astype(np.int64))
        self.pending_U[rows_E] = True
        first_E = begun_U[rows_E]
        # Written backwards, so that the earliest of a row's times stays.
        self.gather_start_s_U[rows_E[first_E][::-1]] = times_s_E[first_E][::-1].astype(np.int64)

    def decay_scores(self, times_s_E: npt.NDArray[np.float64], *, per_day: float) -> None:
        if not per_day or not len(times_s_E):
            return
        now_s = float(times_s_E[-1])
        elapsed_s = now_s - self._last_time_s if self._last_time_s else 0.0
        self.score_U *= (1 - per_day) ** (elapsed_s / 86_400)
        self._last_time_s = now_s

    def columns(self, rows_N: npt.NDArray[np.intp]) -> ChangedColumns:
        return ChangedColumns(
            updates_N=self.gathered_U[rows_N],
            gather_start_s_N=self.gather_start_s_U[rows_N],
            pushes_N=self.pushes_U[rows_N],
            window_start_s_N=self.window_start_s_U[rows_N],
            last_pushed_s_N=self.last_pushed_s_U[rows_N],
            score_N=self.score_U[rows_N].astype(np.float32),
            gathered_score_N=self.gained_U[rows_N].astype(np.float32),
            last_seen_s_N=self.last_seen_s_U[rows_N],
        )


def _passes(times_s_E: npt.NDArray[np.float64], *, every_s: int) -> Iterator[tuple[int, int, int]]:
    """(when, first update, end) of each pass, up to the one that follows the last update."""
    if not len(times_s_E):
        return
    begin_s = int(times_s_E[0])
    num_passes = (int(times_s_E[-1]) - begin_s) // every_s + 1
    if num_passes > PASSES_MAX:
        raise RulesError(
            f"the updates lie between {begin_s} and {int(times_s_E[-1])} s, which is {num_passes} passes of "
            f"{every_s} s, at most {PASSES_MAX} are replayed: is a time wrong? Else raise --publish-every-s"
        )
    ends_s = np.arange(begin_s + every_s, int(times_s_E[-1]) + every_s + 1, every_s)
    positions = np.searchsorted(times_s_E, ends_s, side="left")
    start = 0
    for now_s, end in zip(ends_s.tolist(), positions.tolist(), strict=True):
        yield now_s, start, end
        start = end


def _publish(rows: _Rows, outcome: Outcome, *, rules: RulesConfig, setting: Setting, now_s: int) -> None:
    rows_N = np.flatnonzero(rows.pending_U)
    columns, keys_N = rows.columns(rows_N), rows.keys_U[rows_N]
    decision = decide(columns, rules=rules, now_s=now_s, table=setting.table, keys_N=keys_N)
    rows.gathered_U[rows_N[decision.restart_N]] = 0
    for reason, num in decision.num_held_back().items():
        outcome.held_back[reason] = outcome.held_back.get(reason, 0) + num
    sent_N = rows_N[decision.send_N]
    rows.pushes_U[sent_N], rows.window_start_s_U[sent_N] = record_push(
        columns.rows(decision.send_N),
        rules=rules,
        now_s=now_s,
        table=setting.table,
        keys_N=keys_N[decision.send_N],
    )
    rows.pending_U[sent_N] = False
    rows.gathered_U[sent_N] = 0
    rows.gained_U[sent_N] = 0.0
    rows.oldest_s_U[sent_N] = np.inf
    rows.last_pushed_s_U[sent_N] = now_s
    outcome.num_pushed += len(sent_N)
    outcome.bytes_sent += len(sent_N) * (ID_BYTES + packed_row_bytes(setting.dim, setting.row_format))


def _count_staleness(
    outcome: Outcome, age_s_T: npt.NDArray[np.float64], counts_T: npt.NDArray[np.intp]
) -> None:
    # Serving lacks nothing: minus infinity became zero.
    stale_s_T = np.maximum(age_s_T, 0.0).astype(np.int64)
    counts_S = np.bincount(stale_s_T, weights=counts_T).astype(np.int64)
    if len(counts_S) > len(outcome.staleness_S):
        outcome.staleness_S = np.pad(outcome.staleness_S, (0, len(counts_S) - len(outcome.staleness_S)))
    outcome.staleness_S[: len(counts_S)] += counts_S
