"""AUC, GAUC and true GAUC of what was answered, as means over the tasks, and differences paired by seed.

True GAUC is judged by the stream's true probabilities and is free of the labels' noise
(trainer/compare/expected.py). Shapes: N impressions, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from trainer.compare.expected import expected_gauc
from trainer.compare.statistics import half_width
from trainer.metrics import auc, gauc

Floats = npt.NDArray[np.float32]
MEASURES = {"gauc": "gauc", "true_gauc": "true", "auc": "auc", "true_auc": "true_auc"}
"""Each measure, and how the columns of its differences begin. Not every benchmark has all of them."""


def quality(
    scores_NT: Floats, *, labels_NT: Floats, truth_NT: Floats, users_N: npt.NDArray[np.integer]
) -> dict[str, float]:
    """Means over the tasks; a task without both classes has no AUC and no GAUC, and is left out of them."""
    tasks = range(scores_NT.shape[1])
    gaucs = [gauc(scores_NT[:, task], labels_NT[:, task], users_N) for task in tasks]
    aucs = [auc(scores_NT[:, task], labels_NT[:, task]) for task in tasks]
    true_gaucs = [expected_gauc(scores_NT[:, task], truth_NT[:, task], users_N) for task in tasks]
    return {
        "gauc": float(np.mean([value for value in gaucs if value is not None])),
        "true_gauc": float(np.mean([value for value in true_gaucs if value is not None])),
        "auc": float(np.mean([value for value in aucs if value is not None])),
    }


def means(outcomes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over the seeds."""
    measures = [measure for measure in MEASURES if measure in outcomes[0]]
    return {measure: round(float(np.mean([one[measure] for one in outcomes])), 5) for measure in measures}


def lost(best: Sequence[Mapping[str, float]], own: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """What `own` loses to `best`, seed by seed: mean (`_lost`) and half of its 95 % interval (`_95`)."""
    columns: dict[str, float | None] = {}
    for measure, short in MEASURES.items():
        if measure not in own[0]:
            continue
        differences = [one[measure] - other[measure] for one, other in zip(best, own, strict=True)]
        width = half_width(differences)
        # A zero has no sign.
        columns[f"{short}_lost"] = round(float(np.mean(differences)), 5) + 0.0
        columns[f"{short}_95"] = None if width is None else round(width, 5)
    return columns
