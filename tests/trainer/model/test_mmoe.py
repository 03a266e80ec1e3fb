"""SharedBottom and MMoE against float64 transcriptions of their equations."""

from __future__ import annotations

import numpy as np
import pytest

from tests.trainer.model.equations import NUM_TASKS, Built, bottom, mixed, tower, tower_logit


def test_shared_bottom_equals_its_equations() -> None:
    built = Built("shared_bottom")
    w = built.weights
    f = bottom(built.e, w, "bottom")
    built.assert_logits(np.stack([tower_logit(f, w, "towers", task) for task in range(NUM_TASKS)], axis=1))


@pytest.mark.parametrize("num_experts", [1, 4, 6, 8])
def test_mmoe_equals_its_equations(num_experts: int) -> None:
    built = Built("mmoe", num_experts=num_experts)
    w, logits = built.weights, []
    experts = [tower(built.e, w, "mixture.experts", expert) for expert in range(num_experts)]
    for task in range(NUM_TASKS):
        # (7) and (8), then (6)
        gate = w["mixture.mix.gate.weight"][task * num_experts : (task + 1) * num_experts].T
        logits.append(tower_logit(mixed(built.e, experts, gate), w, "mixture.towers", task))
    built.assert_logits(np.stack(logits, axis=1))
