"""PLE, with tasks and with domains as its groups, against a float64 transcription of its equations."""

from __future__ import annotations

import numpy as np
import pytest

from tests.trainer.model.equations import NUM_DOMAINS, NUM_TASKS, Built, mixed, tower, tower_logit


def extracted(built: Built, num_groups: int) -> list[np.ndarray]:
    """g^(k,N) of every group."""
    config, w = built.config, built.weights
    own = [built.e] * num_groups
    shared = built.e
    for level in range(config.ple_levels):
        prefix = f"extraction.levels.{level}"
        own_experts = [
            [
                tower(own[group], w, f"{prefix}.own", group * config.num_own_experts + number)
                for number in range(config.num_own_experts)
            ]
            for group in range(num_groups)
        ]
        shared_experts = [
            tower(shared, w, f"{prefix}.shared", number) for number in range(config.num_experts)
        ]
        gates = w[f"{prefix}.gates.weight_GIK"]
        next_own = [
            mixed(own[group], own_experts[group] + shared_experts, gates[group])
            for group in range(num_groups)
        ]
        if level < config.ple_levels - 1:
            all_experts = [expert for experts in own_experts for expert in experts] + shared_experts
            shared = mixed(shared, all_experts, w[f"{prefix}.shared_gate.weight_GIK"][0])
        own = next_own
    return own


@pytest.mark.parametrize("ple_levels", [1, 2, 3])
@pytest.mark.parametrize("num_own_experts", [1, 2])
def test_ple_equals_its_equations(ple_levels: int, num_own_experts: int) -> None:
    built = Built("ple", ple_levels=ple_levels, num_own_experts=num_own_experts)
    groups = extracted(built, NUM_TASKS)
    logits = [tower_logit(groups[task], built.weights, "towers", task) for task in range(NUM_TASKS)]
    built.assert_logits(np.stack(logits, axis=1))


@pytest.mark.parametrize("ple_levels", [1, 2])
@pytest.mark.parametrize("num_own_experts", [1, 2])
def test_ple_by_domain_equals_its_equations(ple_levels: int, num_own_experts: int) -> None:
    built = Built("ple_md", ple_levels=ple_levels, num_own_experts=num_own_experts)
    groups = extracted(built, NUM_DOMAINS)
    expected = np.zeros((len(built.e), NUM_TASKS))
    for row, domain in enumerate(built.domain_B.tolist()):
        for task in range(NUM_TASKS):
            g = groups[domain][[row]]
            expected[row, task] = tower_logit(g, built.weights, f"tops.{domain}", task)[0]
    built.assert_logits(expected)


def test_the_last_level_has_no_gate_that_nobody_reads() -> None:
    names = [name for name in Built("ple", ple_levels=2).weights if "shared_gate" in name]
    assert names == ["extraction.levels.0.shared_gate.weight_GIK"]
