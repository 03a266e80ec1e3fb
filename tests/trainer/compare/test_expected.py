"""Expected GAUC is what GAUC is on average over labels, and agrees with counting every pair."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.compare.expected import expected_gauc
from trainer.metrics import gauc


def by_pairs(scores_N, truth_N, users_N):
    values, weights = [], []
    for user in np.unique(users_N):
        own = np.flatnonzero(users_N == user)
        if len(own) < 2:
            continue
        right = pairs = 0.0
        for i in own:
            for j in own[own != i]:
                weight = truth_N[i] * (1 - truth_N[j])
                pairs += weight
                right += weight * ((scores_N[i] > scores_N[j]) + 0.5 * (scores_N[i] == scores_N[j]))
        values.append(right / pairs)
        weights.append(len(own))
    return np.average(values, weights=weights)


def test_it_agrees_with_counting_every_pair_ties_included():
    generator = np.random.default_rng(3)
    scores_N = generator.integers(0, 12, 300) / 12
    truth_N, users_N = generator.random(300), generator.integers(0, 40, 300)
    assert expected_gauc(scores_N, truth_N, users_N) == pytest.approx(by_pairs(scores_N, truth_N, users_N))


def test_with_certain_labels_it_is_gauc():
    generator = np.random.default_rng(4)
    scores_N, users_N = generator.random(500), generator.integers(0, 30, 500)
    labels_N = (generator.random(500) < 0.4).astype(np.float64)
    assert expected_gauc(scores_N, labels_N, users_N) == pytest.approx(gauc(scores_N, labels_N, users_N))


def test_without_a_pair_it_is_not_defined():
    assert expected_gauc(np.zeros(0), np.zeros(0), np.zeros(0, np.int64)) is None
    assert expected_gauc(np.array([0.1, 0.2]), np.array([0.5, 0.5]), np.array([1, 2])) is None
