"""A small factorisation model, trained event by event: logit = b + w_u + w_i + <v_u, v_i>.

Its rows lie in one table by slot. Row-wise AdaGrad with one accumulator for the bias and one for the
factors. Slot -1 is the default row: zeros, never trained. Legend: N events, S slots, D factors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.jit import kernel

DIM = 16
ROW_BYTES = (1 + DIM + 2) * 4
"""Bias, factors, two accumulators, all float32."""
LEARNING_RATE = 0.1
INITIAL_SCALE = 0.05

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


@kernel
def _logit(rows_SD: Any, bias_2: Any, user: Any, item: Any) -> Any:
    logit = np.float64(bias_2[0])
    if user >= 0:
        logit += rows_SD[user, 0]
    if item >= 0:
        logit += rows_SD[item, 0]
    if user >= 0 and item >= 0:
        for d in range(1, rows_SD.shape[1]):
            logit += rows_SD[user, d] * rows_SD[item, d]
    return logit


@kernel
def _predict(rows_SD: Any, bias_2: Any, users_N: Any, items_N: Any, logits_N: Any) -> None:
    for i in range(len(users_N)):
        logits_N[i] = _logit(rows_SD, bias_2, users_N[i], items_N[i])


@kernel
def _train(rows_SD: Any, sums_S2: Any, bias_2: Any, events: Any, rate: Any) -> None:
    users_N, items_N, labels_N = events
    for i in range(len(users_N)):
        user, item = users_N[i], items_N[i]
        logit = _logit(rows_SD, bias_2, user, item)
        slope = 1.0 / (1.0 + np.exp(-logit)) - labels_N[i]
        bias_2[1] += slope * slope
        bias_2[0] -= rate * slope / np.sqrt(bias_2[1])
        for slot in (user, item):
            if slot >= 0:
                sums_S2[slot, 0] += slope * slope
                rows_SD[slot, 0] -= rate * slope / np.sqrt(sums_S2[slot, 0])
        if user < 0 or item < 0:
            continue
        square_user, square_item = 0.0, 0.0
        num_factors = rows_SD.shape[1] - 1
        for d in range(1, num_factors + 1):
            square_user += (slope * rows_SD[item, d]) ** 2
            square_item += (slope * rows_SD[user, d]) ** 2
        sums_S2[user, 1] += square_user / num_factors
        sums_S2[item, 1] += square_item / num_factors
        user_rate = rate * slope / np.sqrt(sums_S2[user, 1] + 1e-12)
        item_rate = rate * slope / np.sqrt(sums_S2[item, 1] + 1e-12)
        for d in range(1, num_factors + 1):
            of_user, of_item = rows_SD[user, d], rows_SD[item, d]
            rows_SD[user, d] = of_user - user_rate * of_item
            rows_SD[item, d] = of_item - item_rate * of_user


class Factorisation:
    """The model over a table of some slots."""

    def __init__(self, num_slots: int, generator: np.random.Generator) -> None:
        self._rows_SD: Float32Array = np.zeros((num_slots, 1 + DIM), np.float32)
        self._sums_S2: Float32Array = np.zeros((num_slots, 2), np.float32)
        self._bias_2 = np.array([0.0, 1.0])
        self._rows_SD[:, 1:] = initial_factors(num_slots, generator)

    def reset(self, slots_M: Int64Array, factors_MD: Float32Array) -> None:
        """What an evicted row had learned must not serve its slot's next owner."""
        self._rows_SD[slots_M, 0] = 0.0
        self._rows_SD[slots_M, 1:] = factors_MD
        self._sums_S2[slots_M] = 0.0

    def predict(self, users_N: Int64Array, items_N: Int64Array) -> npt.NDArray[np.float64]:
        """Logits [N] for the slots of users and items."""
        logits_N = np.empty(len(users_N))
        _predict(self._rows_SD, self._bias_2, users_N, items_N, logits_N)
        return logits_N

    def train(self, users_N: Int64Array, items_N: Int64Array, labels_N: npt.NDArray[np.int32]) -> None:
        events = (users_N, items_N, labels_N)
        _train(self._rows_SD, self._sums_S2, self._bias_2, events, LEARNING_RATE)


def initial_factors(num: int, generator: np.random.Generator) -> Float32Array:
    """float32 [num, D]."""
    return INITIAL_SCALE * generator.standard_normal((num, DIM), np.float32)


def auc(logits_N: npt.NDArray[np.float64], labels_N: npt.NDArray[np.int32]) -> float:
    """The share of (positive, negative) pairs in the right order, ties half; NaN without both."""
    num_positive = int(labels_N.sum())
    num_negative = len(labels_N) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    _, inverse_N, counts = np.unique(logits_N, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(counts) - (counts - 1) / 2.0
    rank_sum = float(middle_rank[inverse_N][labels_N > 0].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2.0) / (num_positive * num_negative)


def log_loss(logits_N: npt.NDArray[np.float64], labels_N: npt.NDArray[np.int32]) -> float:
    """Mean over events, in nats."""
    return float(np.mean(np.logaddexp(0.0, logits_N) - labels_N * logits_N))
