"""The scores that come with the table: Kraken, show/click, LRU, LFU, DistanceLFU and none (TTL only).

A score is asked twice: at a sighting, for the value to keep (`old` is what was kept before), and when rows
are compared, with shows = positives = 0, for what the row is worth now. Both times it is told the seconds
since the row was last seen. A decaying score therefore keeps its value as of the last sighting and decays it
by the age; nothing that is kept grows with event time, so that years of it need no renormalisation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from feature_eviction.jit import inlined
from feature_eviction.policy import SHIPPED_SCORES, ScoreConfig

KRAKEN, SHOW_CLICK, LRU, LFU, DISTANCE_LFU, TTL_ONLY = range(len(SHIPPED_SCORES))

DAY_S = 86_400
PADDLE_CLICK_WORTH = 1.0
PADDLE_SHOW_WORTH = 0.1
PADDLE_DECAY_PER_DAY = 0.02


class ShippedScore(NamedTuple):
    """Which of them, with its numbers: one compiled form serves all."""

    kind: int
    positive_worth: float
    other_worth: float
    """Of a show that was not positive."""
    decay_per_s: float
    distance_power: float


@inlined
def decayed_sum(score: Any, old: Any, shows: Any, positives: Any, age_s: Any) -> Any:
    """S <- S * exp(-decay * age) + positive_worth * positives + other_worth * (shows - positives).

    Kraken's own form, S <- (1-b) S + b (r c+ + c-), has one factor b more, which is common to all rows and
    moves none before another. Source: Kraken (SC 2020); Paddle's CtrCommonAccessor for show_click.
    """
    if age_s > 0 and old != 0.0:
        old = old * math.exp(-score.decay_per_s * age_s)
    return old + score.positive_worth * positives + score.other_worth * (shows - positives)


@inlined
def decayed_floor(score: Any, old: Any, age_s: Any) -> Any:
    """At most what decayed_sum makes of a score without sightings, for the price of three products.

    exp(-x) >= (1 - x/4)^4 for x in [0, 4]; the last factor is more than all that rounding may add.
    """
    left = max(0.0, 1.0 - 0.25 * score.decay_per_s * age_s)
    left *= left
    # A score below zero, which only restored rows can have, decays upwards.
    return old * (left * left * (1.0 - 1e-9)) if old >= 0.0 else old


@inlined
def shipped_score(score: Any, old: Any, shows: Any, positives: Any, age_s: Any, updates: Any) -> Any:
    """The branch is the same for all rows of a table: the processor learns it at once."""
    if score.kind <= SHOW_CLICK:
        return decayed_sum(score, old, shows, positives, age_s)
    if score.kind == LRU:
        return -float(age_s)
    if score.kind == LFU:
        return float(updates)
    if score.kind == DISTANCE_LFU:
        # TorchRec's DistanceLFU: uses over the distance to the last one, in seconds instead of batches.
        return updates / (1.0 + age_s) ** score.distance_power
    return 0.0


def shipped(config: ScoreConfig) -> ShippedScore:
    """Raises: ValueError for a name that is not shipped."""
    kind = SHIPPED_SCORES.index(config.kind)
    if kind == SHOW_CLICK:
        positive, other, decay_per_day = PADDLE_CLICK_WORTH, PADDLE_SHOW_WORTH, PADDLE_DECAY_PER_DAY
    else:
        positive, other, decay_per_day = config.positive_weight, 1.0, config.decay_per_day
    return ShippedScore(
        kind=kind,
        positive_worth=float(positive),
        other_worth=other,
        decay_per_s=decay_per_s(decay_per_day),
        distance_power=float(config.distance_power),
    )


def decay_per_s(decay_per_day: float) -> float:
    """The exponent: (1 - decay_per_day) = exp(-86400 * decay_per_s)."""
    return -math.log1p(-decay_per_day) / DAY_S
