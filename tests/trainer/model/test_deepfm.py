"""DeepFM against a float64 transcription of arXiv 1703.04247, equations 1 to 4."""

from __future__ import annotations

import numpy as np

from tests.trainer.model.equations import NUM_TASKS, Built, tower_logit


def test_deepfm_equals_its_equations() -> None:
    built = Built("deepfm")
    w, fields = built.weights, built.fields
    # (2), second part: every pair once
    pairs = np.zeros(len(built.e))
    for i in range(fields.shape[1]):
        for j in range(i + 1, fields.shape[1]):
            pairs += (fields[:, i] * fields[:, j]).sum(axis=1)
    logits = []
    for task in range(NUM_TASKS):
        y_fm = built.e @ w["first_order.weight"][task] + pairs
        # (3) and (4)
        y_dnn = tower_logit(built.e, w, "deep", task)
        logits.append(y_fm + y_dnn)
    built.assert_logits(np.stack(logits, axis=1))
