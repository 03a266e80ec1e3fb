"""Means, intervals and tests are scipy's; without seeds enough they are missing, not zero."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trainer.compare.statistics import estimate, paired


def test_interval_is_students():
    values = [0.61, 0.64, 0.60, 0.66, 0.62]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert found.mean - (found.half_width or 0) == pytest.approx(low)
    assert found.mean + (found.half_width or 0) == pytest.approx(high)
    assert found.seeds == 5


def test_one_seed_has_no_interval_and_no_test():
    assert estimate([0.6]).half_width is None
    found = paired({1: 0.6}, {1: 0.5})
    assert found is not None
    assert (found.half_width, found.p, found.is_significant) == (None, None, False)


def test_no_value_has_no_mean():
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_models_are_compared_within_seeds():
    """Seeds differ much, models little: the paired test sees it, one that forgets the pairs does not."""
    ours = {1: 0.50, 2: 0.60, 3: 0.70, 4: 0.81}
    theirs = {4: 0.80, 3: 0.69, 2: 0.588, 1: 0.492}
    found = paired(ours, theirs)
    assert found is not None
    a, b = [ours[s] for s in range(1, 5)], [theirs[s] for s in range(1, 5)]
    assert found.p == pytest.approx(float(stats.ttest_rel(a, b).pvalue))
    assert found.is_significant
    assert float(stats.ttest_ind(a, b).pvalue) > 0.5


def test_only_seeds_that_both_have_are_paired():
    found = paired({1: 0.5, 2: 0.7, 3: 0.9}, {2: 0.6, 3: 0.7, 9: 0.1})
    assert found is not None
    assert found.pairs == 2
    assert found.mean == pytest.approx(0.15)
    assert paired({1: 0.5}, {2: 0.5}) is None


def test_equal_differences_are_no_chance_and_no_difference_is_no_evidence():
    same = paired({1: 0.5, 2: 0.25}, {1: 0.5, 2: 0.25})
    always = paired({1: 0.75, 2: 0.5}, {1: 0.5, 2: 0.25})
    assert same is not None
    assert always is not None
    assert same.p == 1.0
    assert always.p == 0.0
