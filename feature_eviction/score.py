"""What a row is worth, as small pure functions; the lowest leaves first.

Kraken (SC 2020) keeps S <- (1 - b) S + b (r c+ + c-) for each row and period, with c+ positives and c-
other shows. Unrolled, b and the factor (1 - b)^T at the time T of a comparison are common to all rows, so
that their order is the order of

    sum over sightings i of (r c+_i + c-_i) (1 - b)^-(t_i - t0)

whose terms are never touched again ("forward decay", Cormode et al., ICDE 2009). Its logarithm

    L <- logaddexp(L, log(r c+ + c-) + decay (t - t0)),   decay = -log(1 - b) a second

does not overflow after years of event time, and rows touched at different times compare as they lie. As
float32, an L of some hundreds keeps its value to 3e-5: a row that has gathered more than about 30,000 times
what one sighting brings stops growing until it has decayed. Such rows are never among the lowest.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from feature_eviction.jit import kernel
from feature_eviction.policy import ScoreConfig

SCORE_EPOCH_S = 1_704_067_200
"""t0, 2024-01-01 UTC. A constant, so that scores move between ranks, shards and runs unchanged."""

KRAKEN = 0
LRU = 1
LFU = 2
SCORE_KINDS = {"kraken": KRAKEN, "lru": LRU, "lfu": LFU}

_NO_GAIN_BELOW = -20.0
"""exp(-20) is far below what float32 can add to a logarithm."""


def decay_per_s(score: ScoreConfig) -> float:
    """The exponent of the decay: (1 - decay_per_day) = exp(-86400 * decay_per_s)."""
    return -math.log1p(-score.decay_per_day) / 86_400.0


@kernel
def gain(shows: Any, positives: Any, positive_weight: Any) -> Any:
    """log(r c+ + c-) of one sighting."""
    if positives == 0 and shows == 1:
        return 0.0
    return math.log(positive_weight * positives + (shows - positives))


@kernel
def log_add(first: Any, second: Any) -> Any:
    """log(exp(first) + exp(second)); first may be -inf, a score that has gathered nothing."""
    high, low = max(first, second), min(first, second)
    if low - high < _NO_GAIN_BELOW:
        return high
    return high + math.log1p(math.exp(low - high))


@kernel
def kraken_score(old: Any, log_gain: Any, aging: Any) -> Any:
    """The score after a sighting; aging = decay_per_s * (event time - SCORE_EPOCH_S)."""
    return np.float32(log_add(np.float64(old), log_gain + aging))


@kernel
def worth(kind: Any, score: Any, last_seen_s: Any, updates: Any) -> Any:
    """What rows are compared by; last use and number of uses are exact where a float32 is not."""
    if kind == LRU:
        return np.float64(last_seen_s)
    if kind == LFU:
        return np.float64(updates)
    return np.float64(score)
