"""Means over seeds, their intervals, and the paired test.

Everything of one seed (stream, first rows, order of batches) is the same for all models, so models are
compared by their differences within a seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from scipy import stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95
SIGNIFICANT_P = 0.05


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean over seeds."""

    mean: float
    half_width: float | None
    """Half of the 95 % interval by Student's t; None for a single seed."""
    seeds: int


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The mean of paired differences, ours less theirs."""

    mean: float
    half_width: float | None
    p: float | None
    """Two-sided paired t-test; None for a single pair."""
    pairs: int

    @property
    def is_significant(self) -> bool:
        return self.p is not None and self.p < SIGNIFICANT_P


def estimate(values: Sequence[float]) -> Estimate:
    """Raises: ValueError without values."""
    if not values:
        raise ValueError("a mean needs at least one value")
    return Estimate(mean=float(np.mean(values)), half_width=half_width(values), seeds=len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Compare by the seeds that both have; None if there is none.

    Args: a value by seed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    return Difference(
        mean=float(np.mean(differences)),
        half_width=half_width(differences),
        p=_p(differences),
        pairs=len(seeds),
    )


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean, by Student's t; None for a single value."""
    num = len(values)
    if num < 2:
        return None
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, num - 1))
    return t * float(np.std(values, ddof=1)) / float(np.sqrt(num))


def _p(differences: Sequence[float]) -> float | None:
    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0:
        # The test divides by their spread. Equal differences are no chance, unless all are zero.
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)
