"""AUC and GAUC against true probabilities in the place of the labels drawn from them.

Where the stream is made up, the probability of each label is known. Expected AUC is the share of all pairs
(i positive, j negative), each weighted by p_i (1 - p_j), that the scores put in the right order: the same
question without the noise of rare labels, of which a test day may hold a handful.

Shapes: N impressions, U users.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def expected_gauc(
    scores_N: npt.NDArray[np.floating[Any]],
    truth_N: npt.NDArray[np.floating[Any]],
    users_N: npt.NDArray[np.integer[Any]],
) -> float | None:
    """Each user's expected AUC, averaged with the users' impressions as weights; tied scores count half.

    Args: scores_N: compared as float32. truth_N: the probability that each label is 1.
    Returns: None where no user has two impressions.
    """
    if len(scores_N) == 0:
        return None
    scores_N = scores_N.astype(np.float32)
    order_N = np.lexsort((scores_N, users_N))
    scores_N, users_N = scores_N[order_N], users_N[order_N]
    positive_N = truth_N[order_N].astype(np.float64)
    negative_N = 1.0 - positive_N
    new_user_N = np.r_[True, users_N[1:] != users_N[:-1]]
    new_tie_N = new_user_N | np.r_[True, scores_N[1:] != scores_N[:-1]]
    user_N, tie_N = np.cumsum(new_user_N) - 1, np.cumsum(new_tie_N) - 1
    negative_before_N = np.cumsum(negative_N) - negative_N
    below_N = negative_before_N[new_tie_N][tie_N] - negative_before_N[new_user_N][user_N]
    # Itself is no pair.
    tied_N = np.bincount(tie_N, weights=negative_N)[tie_N] - negative_N
    shown_U = np.bincount(user_N)
    right_U = np.bincount(user_N, weights=positive_N * (below_N + tied_N / 2))
    all_N = np.bincount(user_N, weights=negative_N)[user_N] - negative_N
    pairs_U = np.bincount(user_N, weights=positive_N * all_N)
    several_U = (shown_U > 1) & (pairs_U > 0)
    if not several_U.any():
        return None
    return float(np.average(right_U[several_U] / pairs_U[several_U], weights=shown_U[several_U]))
