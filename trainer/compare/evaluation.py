"""AUC and GAUC by domain and task over one slice, with what they were counted on.

Shapes: N impressions, T tasks, U users of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from trainer.compare.expected import expected_gauc
from trainer.compare.protocol import Bools, check_labels
from trainer.metrics import auc, gauc


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One domain and task."""

    domain: str
    task: str
    impressions: int
    """Those whose label is known."""
    positives: int
    users: int
    users_one_class: int
    """Users with positives alone or negatives alone: GAUC skips them."""
    auc: float | None
    """None = not defined: the cell has no positives or no negatives."""
    gauc: float | None
    """None = not defined: no user has both."""
    expected_gauc: float | None = None
    """Against the true probabilities; None = they are not known."""

    def undefined(self) -> str | None:
        """Why a metric is missing, in words; None if both are there."""
        if self.auc is None:
            lacks = (
                "impressions" if not self.impressions else "positives" if not self.positives else "negatives"
            )
            return f"{self.domain}/{self.task}: no {lacks} in the slice, AUC and GAUC are not defined"
        if self.gauc is None:
            return f"{self.domain}/{self.task}: no user has both classes, GAUC is not defined"
        return None


def evaluate(
    scores_NT: npt.NDArray[np.floating[Any]],
    *,
    labels_NT: npt.NDArray[np.floating[Any]],
    known_NT: Bools,
    domain_N: npt.NDArray[np.integer[Any]],
    users_N: npt.NDArray[np.int64],
    domains: Sequence[str],
    tasks: Sequence[str],
    truth_NT: npt.NDArray[np.floating[Any]] | None = None,
) -> list[Cell]:
    """Every domain with every task, domains first.

    Args: truth_NT: the probabilities that the labels were drawn with, where they are known.
    Raises: DataError if a known label is neither 0 nor 1; ValueError if a score is not finite or shapes
        differ.
    """
    if not scores_NT.shape == labels_NT.shape == known_NT.shape == (len(users_N), len(tasks)):
        raise ValueError(
            f"scores {scores_NT.shape}, labels {labels_NT.shape} and known {known_NT.shape} must be "
            f"[{len(users_N)}, {len(tasks)}]"
        )
    check_labels(labels_NT, known_NT, tasks=tasks, where="evaluation")
    if not np.isfinite(scores_NT).all():
        raise ValueError(f"{int((~np.isfinite(scores_NT)).sum())} scores are not finite: the model diverged")
    cells = []
    for domain_index, domain in enumerate(domains):
        row_M = np.flatnonzero(domain_N == domain_index)
        for task_index, task in enumerate(tasks):
            row_K = row_M[known_NT[row_M, task_index]]
            scores_K, labels_K = scores_NT[row_K, task_index], labels_NT[row_K, task_index]
            users, one_class = _users(users_N[row_K], labels_K)
            cells.append(
                Cell(
                    domain=domain,
                    task=task,
                    impressions=len(row_K),
                    positives=int(labels_K.sum()),
                    users=users,
                    users_one_class=one_class,
                    auc=auc(scores_K, labels_K),
                    gauc=gauc(scores_K, labels_K, users_N[row_K]),
                    expected_gauc=None
                    if truth_NT is None
                    else expected_gauc(scores_K, truth_NT[row_K, task_index], users_N[row_K]),
                )
            )
    return cells


def _users(users_K: npt.NDArray[np.int64], labels_K: npt.NDArray[np.floating[Any]]) -> tuple[int, int]:
    """How many users there are, and how many of them have one class only."""
    _, user_K = np.unique(users_K, return_inverse=True)
    shown_U = np.bincount(user_K)
    positive_U = np.bincount(user_K, weights=labels_K, minlength=len(shown_U))
    return len(shown_U), int(((positive_U == 0) | (positive_U == shown_U)).sum())


def choosing_auc(cells: Sequence[Cell]) -> float | None:
    """What an epoch is chosen by: the mean AUC, each cell weighted by the root of its rarer class's size.

    That is how sure its AUC is. Counted equally, a cell with ten positives would choose the epoch by luck.
    Returns: None if no cell has an AUC.
    """
    defined = [(cell.auc, min(cell.positives, cell.impressions - cell.positives)) for cell in cells]
    known = [(value, rarer**0.5) for value, rarer in defined if value is not None]
    if not known:
        return None
    return float(np.average([value for value, _ in known], weights=[weight for _, weight in known]))


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that are defined; None if none is."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
