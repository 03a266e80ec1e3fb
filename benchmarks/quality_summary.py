"""Means, paired intervals and the goals of benchmarks.eviction_quality, from the outcomes of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.eviction_policies import VARIANTS
from benchmarks.report import rounded
from trainer.compare.statistics import half_width

OURS = "kraken"
AUC_LOSS_MAX = 0.0005
"""At 60 % of the memory against all of it."""
RE_ENTRIES_SHARE_MAX = 0.5
"""Of LRU's."""

UNREACHABLE = ("foresight",)
"""Shown beside the policies and not counted as one: it knows the future."""

Outcomes = Mapping[tuple[float, str], Sequence[Mapping[str, float]]]
Place = tuple[str, float, str]
"""Stream, share, policy."""
Rows = Sequence[Mapping[str, Any]]


def summarised(stream: str, outcomes: Outcomes) -> list[dict[str, Any]]:
    """A row for each size and policy; gap = kraken's AUC less this policy's, paired by seed."""
    rows = []
    for (share, policy), of_seeds in outcomes.items():
        aucs = [one["auc"] for one in of_seeds]
        gaps = [ours["auc"] - theirs for ours, theirs in zip(outcomes[share, OURS], aucs, strict=True)]
        to_full = [full["auc"] - one for full, one in zip(outcomes[1.0, policy], aucs, strict=True)]
        means = {name: float(np.mean([one[name] for one in of_seeds])) for name in of_seeds[0]}
        rows.append(
            {
                "stream": stream,
                "share": share,
                "policy": policy,
                "auc": round(means["auc"], 5),
                "auc_95": _round(half_width(aucs)),
                "gap": round(float(np.mean(gaps)), 5),
                "gap_95": _round(half_width(gaps)),
                "below_full": round(float(np.mean(to_full)), 5),
                "below_full_95": _round(half_width(to_full)),
                "log_loss": round(means["log_loss"], 5),
                "hit_rate": None if np.isnan(means["hit_rate"]) else round(means["hit_rate"], 4),
                "re_entries": round(means["re_entries"]),
                "mib": rounded(means["num_bytes"] / 2**20),
                "seeds": len(of_seeds),
            }
        )
    return rows


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def goals(rows: Rows) -> dict[str, Any]:
    """The three goals, each with where it was missed; `lines` says the same in words."""
    by_place = {(row["stream"], row["share"], row["policy"]): row for row in rows}
    places = sorted({(row["stream"], row["share"]) for row in rows if row["share"] < 1.0})
    losses = [
        f"{row['stream']} at {row['share']:.0%} to {row['policy']} by {-row['gap']:.4f}"
        for row in rows
        if row["share"] < 1.0
        and row["policy"] not in (*VARIANTS, *UNREACHABLE)
        and row["gap"] + (row["gap_95"] or 0.0) < 0
    ]
    below = {
        row["stream"]: row["below_full"] for row in rows if row["share"] == 0.6 and row["policy"] == OURS
    }
    far = [f"{stream} by {gap:.4f}" for stream, gap in below.items() if gap > AUC_LOSS_MAX]
    re_entries = {
        policy: {
            f"{stream} at {share:.0%}": _ratio(by_place, (stream, share, policy)) for stream, share in places
        }
        for policy in (OURS, *VARIANTS, *UNREACHABLE)
    }
    many = [
        f"{place} {ratio:.2f}" for place, ratio in re_entries[OURS].items() if ratio > RE_ENTRIES_SHARE_MAX
    ]
    return {
        "auc_below_full_at_60": below,
        "re_entries_to_lru": re_entries,
        "lines": [
            _line("kraken best or tied everywhere", losses, len(places)),
            _line(f"60 % of the ids within {AUC_LOSS_MAX} AUC of all", far, len(below)),
            _line("re-entries at most half of LRU's", many, len(places)),
        ],
    }


def _ratio(by_place: Mapping[Place, Mapping[str, Any]], place: Place) -> float:
    """Re-entries of a policy to those of LRU."""
    stream, share, _ = place
    of_lru = by_place[stream, share, "lru"]["re_entries"]
    own: int = by_place[place]["re_entries"]
    return rounded(own / of_lru) if of_lru else float(own > 0)


def _line(goal: str, missed: Sequence[str], num: int) -> str:
    return f"GOAL {goal}: {'met' if not missed else f'missed {len(missed)} of {num}: ' + '; '.join(missed)}"
