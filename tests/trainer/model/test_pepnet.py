"""PEPNet against a plain float64 transcription of the paper's equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from trainer.config import preset
from trainer.config.config import ModelConfig
from trainer.errors import ConfigError
from trainer.model import PEPNet, multi_task_loss
from trainer.model.gate_nu import gated
from trainer.model.layout import FeatureLayout, columns_in

NUM_TASKS = 3
BATCH = 7

Gate = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""W, b, W', b' of equations 2 and 3."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def gate_nu(x: np.ndarray, gate: Gate, gamma: float) -> np.ndarray:
    """Equations 2 and 3."""
    w, b, w2, b2 = gate
    return gamma * sigmoid(relu(x @ w + b) @ w2 + b2)


def domain_gate(w: dict[str, np.ndarray]) -> Gate:
    """The model keeps the first matrix in two parts: for the prior, transposed, and for what is only seen."""
    first = [w["epnet.gate_input.prior.weight"].T]
    if "epnet.gate_input.seen_weight_SH" in w:
        first.append(w["epnet.gate_input.seen_weight_SH"])
    bias = w["epnet.gate_input.prior.bias"]
    return np.concatenate(first), bias, w["epnet.gate.weight"].T, w["epnet.gate.bias"]


def layer_gate(w: dict[str, np.ndarray], layer: int, width_hidden: int) -> Gate:
    """One layer's Gate NU, I * T wide; the model keeps the first matrices of all layers side by side."""
    mine = slice(layer * width_hidden, (layer + 1) * width_hidden)
    first = np.concatenate(
        [w["ppnet.gate_input.prior.weight"].T[:, mine], w["ppnet.gate_input.seen_weight_SH"][:, mine]]
    )
    second = np.concatenate(list(w[f"ppnet.gates.{layer}.weight_TIO"]), axis=1)
    return first, w["ppnet.gate_input.prior.bias"][mine], second, w[f"ppnet.gates.{layer}.bias_T1O"].flatten()


def transcription(e: np.ndarray, model: PEPNet, config: ModelConfig, layout: FeatureLayout) -> np.ndarray:
    """Equations 4 to 9, one impression and one task at a time."""
    w = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    domain = e[:, layout.columns_of("domain")]
    prior = e[:, layout.columns_of("user", "item", "author")]
    # (5) and (6)
    gate_input = np.concatenate([domain, e], 1) if config.epnet_input == "domain_and_embedding" else domain
    delta_domain = gate_nu(gate_input, domain_gate(w), config.gate_gamma)
    if config.epnet_gate == "field":
        delta_domain = np.repeat(delta_domain, layout.dims, axis=1)
    o_ep = delta_domain * e
    # (7): one Gate NU a layer, split into T gates
    o_prior = np.concatenate([prior, o_ep], 1)
    h1 = o_ep
    if config.first_layer == "hidden":
        h1 = relu(o_ep @ w["first_hidden.weight"].T + w["first_hidden.bias"])
    num_layers = len(config.tower_widths) + 1
    logits = np.zeros((len(e), NUM_TASKS))
    for task in range(NUM_TASKS):
        h = h1
        for layer in range(num_layers):
            width = h.shape[1]
            delta = gate_nu(o_prior, layer_gate(w, layer, config.gate_hidden), config.gate_gamma)
            delta_task = delta[:, task * width : (task + 1) * width]
            # (8) and (9): the gate multiplies the layer's input
            weight = w[f"ppnet.layers.{layer}.weight_TIO"][task]
            bias = w[f"ppnet.layers.{layer}.bias_T1O"][task, 0]
            h = (delta_task * h) @ weight + bias
            if layer < num_layers - 1:
                h = relu(h)
        logits[:, task] = h[:, 0]
    return logits


def make(**changes: Any) -> tuple[PEPNet, ModelConfig, FeatureLayout, torch.Tensor]:
    torch.manual_seed(0)
    layout = FeatureLayout.of(preset("quickstart").schema)
    config = replace(ModelConfig(tower_widths=(12, 8), gate_hidden=10), **changes)
    model = PEPNet(layout, num_tasks=NUM_TASKS, config=config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    embedding_BE = torch.randn(BATCH, layout.width)
    return model, config, layout, embedding_BE


@pytest.mark.parametrize("first_layer", ["epnet_output", "hidden"])
@pytest.mark.parametrize("epnet_input", ["domain_and_embedding", "domain"])
@pytest.mark.parametrize("epnet_gate", ["element", "field"])
@pytest.mark.parametrize("gate_gamma", [2.0, 3.0])
def test_pepnet_equals_its_equations(
    first_layer: str, epnet_input: str, epnet_gate: str, gate_gamma: float
) -> None:
    model, config, layout, embedding_BE = make(
        first_layer=first_layer, epnet_input=epnet_input, epnet_gate=epnet_gate, gate_gamma=gate_gamma
    )
    expected = transcription(embedding_BE.numpy().astype(np.float64), model, config, layout)
    found = model.double()(embedding_BE.double()).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_every_weight_is_a_parameter_and_gets_a_gradient() -> None:
    model, _, _, embedding_BE = make(first_layer="hidden")
    model(embedding_BE).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert set(dict(model.named_parameters())) == set(model.state_dict())


def test_gate_inputs_get_no_gradient_through_stop_gradient_but_priors_do() -> None:
    """With all values but the gates cut off, only domain and prior columns feel the loss."""
    model, _, layout, embedding_BE = make()
    embedding_BE.requires_grad_(True)
    domain_BD = embedding_BE[:, layout.columns_of("domain")]
    (x_BH,) = model.epnet.gate_input(domain_BD, embedding_BE)
    model.epnet.gate(x_BH).sum().backward()
    assert embedding_BE.grad is not None
    touched = set(torch.nonzero(embedding_BE.grad.abs().sum(0)).flatten().tolist())
    assert touched == set(layout.columns_of("domain"))

    embedding_BE.grad = None
    prior_BP = embedding_BE[:, layout.columns_of("user", "item", "author")]
    # h is constant: what is left of the gradient comes through the gates' inputs.
    model.ppnet(prior_BP, embedding_BE, torch.ones_like(embedding_BE)).sum().backward()
    touched = set(torch.nonzero(embedding_BE.grad.abs().sum(0)).flatten().tolist())
    assert touched == set(layout.columns_of("user", "item", "author"))


def test_gates_differ_between_tasks() -> None:
    model, _, layout, embedding_BE = make()
    prior_BP = embedding_BE[:, layout.columns_of("user", "item", "author")]
    x_BH = model.ppnet.gate_input(prior_BP, embedding_BE)[0]
    z_TBI = model.ppnet.gates[0](x_BH.expand(NUM_TASKS, -1, -1))
    assert not torch.allclose(z_TBI[0], z_TBI[1])
    opening_TBI = gated(z_TBI, torch.ones_like(z_TBI))
    assert opening_TBI.min() > 0
    assert opening_TBI.max() < 1


def test_loss_sums_known_labels_and_ignores_the_others() -> None:
    logits = torch.tensor([[0.3, -1.2], [2.0, 0.5]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    known = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, 0.5], dtype=torch.float64)
    p = sigmoid(logits.numpy())
    expected = -np.log(p[0, 0]) - 0.5 * np.log(1 - p[0, 1]) - 0.5 * np.log(p[1, 1])
    loss = multi_task_loss(logits, labels_BT=labels, known_BT=known, weight_T=weight)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("missing", "named"), [("domain", "'domain'"), ("prior", "'user', 'item' or 'author'")]
)
def test_schema_without_the_needed_roles_is_refused(missing: str, named: str) -> None:
    schema = preset("quickstart").schema
    roles = {"domain"} if missing == "domain" else {"user", "item", "author"}
    features = tuple(
        replace(feature, role="other") if feature.role in roles else feature for feature in schema.features
    )
    with pytest.raises(ConfigError, match=named):
        PEPNet(FeatureLayout.of(replace(schema, features=features)), num_tasks=2, config=ModelConfig())


def test_layout_follows_the_tables_and_finds_columns_by_role() -> None:
    schema = preset("quickstart").schema
    wide = replace(schema.features[0], dim=32)
    layout = FeatureLayout.of(replace(schema, features=(wide, *schema.features[1:])))
    assert layout.features[-1].name == wide.name
    assert layout.width == sum(layout.dims)
    assert layout.columns_of("domain")[-32:] == list(range(layout.width - 32, layout.width))


def test_runs_of_columns_are_the_columns() -> None:
    layout = FeatureLayout.of(preset("quickstart").schema)
    embedding_BE = torch.randn(3, layout.width)
    for roles in (("domain",), ("user", "item", "author"), ("user",)):
        expected = embedding_BE[:, layout.columns_of(*roles)]
        assert torch.equal(columns_in(embedding_BE, layout.runs_of(*roles)), expected)
