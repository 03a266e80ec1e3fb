"""xDeepFM against a float64 transcription of arXiv 1803.05170, equations 6 to 9."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from tests.trainer.model.equations import NUM_TASKS, Built, head, tower
from trainer.config import preset
from trainer.errors import ConfigError
from trainer.model import build_model
from trainer.model.layout import FeatureLayout


def pooled_rows(built: Built, task: int) -> list[np.ndarray]:
    """p+ of one network: equation 6 pair by pair, and 7."""
    x0 = built.fields
    x, pooled = x0, []
    for layer in range(len(built.config.cin_rows)):
        weight = built.weights[f"cin.weights.{layer}"][task]
        rows = []
        for h in range(weight.shape[1]):
            row = np.zeros_like(x0[:, 0])
            for i in range(x.shape[1]):
                for j in range(x0.shape[1]):
                    row += weight[i * x0.shape[1] + j, h] * (x[:, i] * x0[:, j])
            rows.append(row)
        x = np.stack(rows, axis=1)
        pooled.append(x.sum(axis=2))
    return pooled


@pytest.mark.parametrize("cin_rows", [(5, 4), (3,), (4, 3, 2)])
def test_xdeepfm_equals_its_equations(cin_rows: tuple[int, ...]) -> None:
    built = Built("xdeepfm", cin_rows=cin_rows)
    w = built.weights
    logits = []
    for task in range(NUM_TASKS):
        # (9), whose w_dnn, w_cin and b lie in one head
        x_dnn = tower(built.e, w, "deep", task)
        ends = np.concatenate([x_dnn, *pooled_rows(built, task)], axis=1)
        logits.append(built.e @ w["linear.weight"][task] + head(ends, w, "head", task))
    built.assert_logits(np.stack(logits, axis=1))


@pytest.mark.parametrize("name", ["deepfm", "xdeepfm"])
def test_features_of_several_dims_are_refused(name: str) -> None:
    config = preset("quickstart")
    wide = replace(config.schema.features[0], dim=32)
    layout = FeatureLayout.of(replace(config.schema, features=(wide, *config.schema.features[1:])))
    with pytest.raises(ConfigError, match=rf"model {name}: .* they need one dim, found 16, 32"):
        build_model(layout, num_tasks=2, num_domains=3, config=replace(config.model, name=name))
