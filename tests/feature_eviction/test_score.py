from __future__ import annotations

import math

import numpy as np
import pytest

from feature_eviction.policy import ScoreConfig
from feature_eviction.score import (
    KRAKEN,
    LFU,
    LRU,
    SCORE_EPOCH_S,
    decay_per_s,
    gain,
    kraken_score,
    worth,
)

DAY_S = 86_400


def scored(sightings: list[tuple[int, int, int]], score: ScoreConfig) -> float:
    """The forward-decay score of (event time, shows, positives) sightings."""
    value = -math.inf
    for seen_s, shows, positives in sightings:
        aging = decay_per_s(score) * (seen_s - SCORE_EPOCH_S)
        value = kraken_score(value, gain(shows, positives, score.positive_weight), aging)
    return float(value)


def explicitly_decayed(sightings: list[tuple[int, int, int]], score: ScoreConfig, *, now_s: int) -> float:
    """Kraken's own form in float64: everything gathered is decayed day by day, then the new is added."""
    value, last_s = 0.0, sightings[0][0]
    for seen_s, shows, positives in sightings:
        value *= (1.0 - score.decay_per_day) ** ((seen_s - last_s) / DAY_S)
        value += score.positive_weight * positives + (shows - positives)
        last_s = seen_s
    return value * (1.0 - score.decay_per_day) ** ((now_s - last_s) / DAY_S)


@pytest.mark.parametrize("positive_weight", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("start_s", [0, SCORE_EPOCH_S, SCORE_EPOCH_S + 10 * 365 * DAY_S])
def test_forward_decay_orders_rows_as_the_decayed_score_does(positive_weight: float, start_s: int) -> None:
    score = ScoreConfig(positive_weight=positive_weight, decay_per_day=0.1)
    generator = np.random.default_rng(17)
    now_s = start_s + 30 * DAY_S
    histories = []
    for _ in range(200):
        seen_s_C = np.sort(generator.integers(start_s, now_s, generator.integers(1, 20))).tolist()
        shows_C = generator.integers(1, 9, len(seen_s_C)).tolist()
        positives_C = [int(generator.integers(0, shows + 1)) for shows in shows_C]
        histories.append(list(zip(seen_s_C, shows_C, positives_C, strict=True)))
    forward = np.array([scored(history, score) for history in histories])
    decayed = np.array([explicitly_decayed(history, score, now_s=now_s) for history in histories])
    order = np.argsort(decayed)
    # Neighbours may only swap where float32 cannot tell them apart (20 sightings, each rounded once).
    rounding = 20 * np.spacing(np.float32(np.abs(forward).max()))
    assert (np.diff(forward[order]) > -rounding).all()
    apart = np.log(decayed)[:, None] - np.log(decayed)[None, :] > 2 * rounding
    assert apart.sum() > 10_000
    assert (forward[:, None] > forward[None, :])[apart].all()


def test_difference_of_scores_is_the_logarithm_of_the_decayed_ratio() -> None:
    score = ScoreConfig(positive_weight=3.0, decay_per_day=0.1)
    old = [(SCORE_EPOCH_S, 4, 1)]
    new = [(SCORE_EPOCH_S + 10 * DAY_S, 1, 0)]
    # 3 * 1 + 3 shows ten days ago are worth 6 * 0.9^10 today, against one show.
    expected = math.log(6 * 0.9**10)
    assert scored(old, score) - scored(new, score) == pytest.approx(expected, abs=1e-5)


def test_score_stays_finite_over_all_event_times_and_grows_no_further_than_it_must() -> None:
    score = ScoreConfig(decay_per_day=0.999)
    for seen_s in (0, SCORE_EPOCH_S, 2**32 - 1):
        value = scored([(seen_s, 2**31, 2**31)] * 3, score)
        assert math.isfinite(value)


def test_sighting_never_lowers_a_score() -> None:
    generator = np.random.default_rng(3)
    score = ScoreConfig(positive_weight=0.25)
    value = np.float32(-math.inf)
    for _ in range(2000):
        aging = decay_per_s(score) * int(generator.integers(-DAY_S, DAY_S))
        raised = kraken_score(value, gain(int(generator.integers(1, 5)), 1, 0.25), aging)
        assert raised >= value
        value = raised


def test_without_decay_the_score_is_a_weighted_count() -> None:
    score = ScoreConfig(positive_weight=5.0, decay_per_day=0.0)
    value = scored([(10, 2, 1), (10**9, 1, 0)], score)
    assert math.exp(value) == pytest.approx(7.0, rel=1e-6)


def test_lru_and_lfu_compare_exactly_where_float32_cannot() -> None:
    assert worth(LRU, np.float32(0), 2_000_000_001, 0) > worth(LRU, np.float32(0), 2_000_000_000, 0)
    assert worth(LFU, np.float32(0), 0, 2**24 + 1) > worth(LFU, np.float32(0), 0, 2**24)
    assert worth(KRAKEN, np.float32(-1.5), 9, 9) == -1.5
