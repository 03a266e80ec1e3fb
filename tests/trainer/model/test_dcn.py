"""DCN and DCNv2 against float64 transcriptions of arXiv 1708.05123 and arXiv 2008.13535."""

from __future__ import annotations

import numpy as np
import pytest

from tests.trainer.model.equations import NUM_TASKS, Built, head, tower, tower_logit


@pytest.mark.parametrize("cross_layers", [1, 3])
def test_dcn_equals_its_equations(cross_layers: int) -> None:
    built = Built("dcn", cross_layers=cross_layers)
    w, logits = built.weights, []
    for task in range(NUM_TASKS):
        x = built.e
        for layer in range(cross_layers):
            # (3), one impression at a time: x_0 x_l^T w_l is a matrix times a vector
            weight = w[f"cross.layers.{layer}.weight_TE1"][task, :, 0]
            bias = w[f"cross.layers.{layer}.bias_T1E"][task, 0]
            crossed = [np.outer(x0, xl) @ weight + bias + xl for x0, xl in zip(built.e, x, strict=True)]
            x = np.stack(crossed)
        # (4) and (5)
        ends = np.concatenate([x, tower(built.e, w, "deep", task)], axis=1)
        logits.append(head(ends, w, "head", task))
    built.assert_logits(np.stack(logits, axis=1))


@pytest.mark.parametrize("cross_layers", [1, 3])
@pytest.mark.parametrize("name", ["dcnv2", "dcnv2_mt"])
def test_dcnv2_equals_its_equations(name: str, cross_layers: int) -> None:
    """One cross network a task, or one for all of them."""
    built = Built(name, cross_layers=cross_layers)
    w, logits = built.weights, []
    for task in range(NUM_TASKS):
        network = task if name == "dcnv2" else 0
        x = built.e
        for layer in range(cross_layers):
            # (1)
            weight = w[f"cross.layers.{layer}.weight_TIO"][network]
            bias = w[f"cross.layers.{layer}.bias_T1O"][network, 0]
            x = built.e * (x @ weight + bias) + x
        # (2) and (3), stacked
        logits.append(tower_logit(x, w, "deep", task))
    built.assert_logits(np.stack(logits, axis=1))
    assert len(w["cross.layers.0.weight_TIO"]) == (NUM_TASKS if name == "dcnv2" else 1)
