"""EPNet and PPNet alone and on MMoE against float64 transcriptions of the papers' equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from tests.trainer.model.equations import (
    NUM_TASKS,
    Built,
    domain_view,
    first_input,
    gate_nu,
    joint_gate,
    mixed,
    relu,
    task_gate_input,
    tower,
    tower_logit,
)
from trainer.config import preset
from trainer.errors import ConfigError
from trainer.model import build_model
from trainer.model.layout import FeatureLayout

OPTIONS: list[dict[str, Any]] = [
    {},
    {"first_layer": "hidden", "gate_gamma": 3.0},
    {"epnet_input": "domain", "ppnet_input": "prior", "epnet_gate": "field"},
]


def gated_layer(
    built: Built, prefix: str, h: np.ndarray, *, gate: int, gates_see: np.ndarray, tower: int, own_gate: int
) -> np.ndarray:
    """(delta * H) W + b of one tower: layer `prefix` of PPNetMMoE, whose Gate NU is number `gate` of all."""
    config, w = built.config, built.weights
    parts = joint_gate(
        w,
        gate_input="ppnet.gate_input",
        second=f"{prefix}.gate",
        index=gate,
        width_hidden=config.gate_hidden,
    )
    delta = gate_nu(gates_see, parts, config.gate_gamma)
    width = h.shape[1]
    delta = delta[:, own_gate * width : (own_gate + 1) * width]
    return (delta * h) @ w[f"{prefix}.layer.weight_TIO"][tower] + w[f"{prefix}.layer.bias_T1O"][tower, 0]


def ppnet_on_towers(built: Built, o_ep: np.ndarray) -> np.ndarray:
    """PEPNet's equations 7 to 9."""
    config, w = built.config, built.weights
    gates_see = task_gate_input(built.e, o_ep, config, built.layout)
    logits = []
    for task in range(NUM_TASKS):
        h = first_input(o_ep, w, config)
        for layer in range(3):
            parts = joint_gate(
                w,
                gate_input="ppnet.gate_input",
                second=f"ppnet.gates.{layer}",
                index=layer,
                width_hidden=config.gate_hidden,
            )
            delta = gate_nu(gates_see, parts, config.gate_gamma)
            mine = delta[:, task * h.shape[1] : (task + 1) * h.shape[1]]
            h = (mine * h) @ w[f"ppnet.layers.{layer}.weight_TIO"][task]
            h = h + w[f"ppnet.layers.{layer}.bias_T1O"][task, 0]
            h = relu(h) if layer < 2 else h
        logits.append(h[:, 0])
    return np.stack(logits, axis=1)


def ppnet_on_mmoe(built: Built, o_ep: np.ndarray) -> np.ndarray:
    """MMoE's equations 6 to 8, every layer's input times delta^(l) of PEPNet's equations 7 and 8."""
    config, w = built.config, built.weights
    gates_see = task_gate_input(built.e, o_ep, config, built.layout)
    h1 = first_input(o_ep, w, config)
    experts = []
    for expert in range(config.num_experts):
        h = h1
        for layer in range(2):
            prefix = f"ppnet.experts.{layer}"
            h = relu(gated_layer(built, prefix, h, gate=layer, gates_see=gates_see, tower=expert, own_gate=0))
        experts.append(h)
    logits = []
    for task in range(NUM_TASKS):
        mine = slice(task * config.num_experts, (task + 1) * config.num_experts)
        h = mixed(h1, experts, w["ppnet.mix.gate.weight"][mine].T)
        for layer in range(3):
            prefix = f"ppnet.towers.{layer}"
            h = gated_layer(built, prefix, h, gate=2 + layer, gates_see=gates_see, tower=task, own_gate=task)
            h = relu(h) if layer < 2 else h
        logits.append(h[:, 0])
    return np.stack(logits, axis=1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_epnet_alone_equals_its_equations(options: dict[str, Any]) -> None:
    built = Built("epnet", **options)
    w = built.weights
    h1 = first_input(domain_view(built.e, w, built.config, built.layout), w, built.config)
    built.assert_logits(np.stack([tower_logit(h1, w, "towers", task) for task in range(NUM_TASKS)], axis=1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ppnet_alone_equals_its_equations(options: dict[str, Any]) -> None:
    built = Built("ppnet", **options)
    built.assert_logits(ppnet_on_towers(built, built.e))


@pytest.mark.parametrize("num_experts", [4, 6, 8])
def test_epnet_on_mmoe_equals_its_equations(num_experts: int) -> None:
    built = Built("epnet_mmoe", num_experts=num_experts)
    w = built.weights
    o_ep = domain_view(built.e, w, built.config, built.layout)
    experts = [tower(o_ep, w, "towers.experts", expert) for expert in range(num_experts)]
    logits = []
    for task in range(NUM_TASKS):
        gate = w["towers.mix.gate.weight"][task * num_experts : (task + 1) * num_experts].T
        logits.append(tower_logit(mixed(o_ep, experts, gate), w, "towers.towers", task))
    built.assert_logits(np.stack(logits, axis=1))


@pytest.mark.parametrize("num_experts", [4, 6, 8])
def test_ppnet_on_mmoe_equals_its_equations(num_experts: int) -> None:
    built = Built("ppnet_mmoe", num_experts=num_experts)
    built.assert_logits(ppnet_on_mmoe(built, built.e))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pepnet_on_mmoe_equals_its_equations(options: dict[str, Any]) -> None:
    built = Built("pepnet_mmoe", **options)
    o_ep = domain_view(built.e, built.weights, built.config, built.layout)
    built.assert_logits(ppnet_on_mmoe(built, o_ep))


@pytest.mark.parametrize(
    ("name", "missing", "named"),
    [
        ("epnet", {"domain"}, "'domain'"),
        ("epnet_mmoe", {"domain"}, "'domain'"),
        ("ppnet", {"user", "item", "author"}, "'user', 'item' or 'author'"),
        ("ppnet_mmoe", {"user", "item", "author"}, "'user', 'item' or 'author'"),
        ("pepnet_mmoe", {"domain"}, "'domain'"),
    ],
)
def test_a_half_needs_its_own_prior_and_no_other(name: str, missing: set[str], named: str) -> None:
    config = preset("quickstart")
    schema = config.schema

    def layout_without(roles: set[str]) -> FeatureLayout:
        features = tuple(
            replace(feature, role="other") if feature.role in roles else feature
            for feature in schema.features
        )
        return FeatureLayout.of(replace(schema, features=features))

    model_config = replace(config.model, name=name)
    with pytest.raises(ConfigError, match=named):
        build_model(layout_without(missing), num_tasks=2, num_domains=3, config=model_config)
    if name != "pepnet_mmoe":
        others = {"domain", "user", "item", "author"} - missing
        build_model(layout_without(others), num_tasks=2, num_domains=3, config=model_config)
