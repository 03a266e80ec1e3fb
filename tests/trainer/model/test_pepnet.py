"""PEPNet against a plain float64 transcription of the paper's equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from tests.trainer.model.equations import (
    BATCH,
    NUM_TASKS,
    domain_view,
    first_input,
    gate_nu,
    joint_gate,
    relu,
    sigmoid,
    task_gate_input,
)
from trainer.config import preset
from trainer.config.config import ModelConfig
from trainer.errors import ConfigError
from trainer.model import PEPNet, multi_task_loss
from trainer.model.gate_nu import gated
from trainer.model.layout import FeatureLayout, columns_in


def transcription(e: np.ndarray, model: PEPNet, config: ModelConfig, layout: FeatureLayout) -> np.ndarray:
    """Equations 4 to 9, one task at a time."""
    w = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    # (5) and (6)
    o_ep = domain_view(e, w, config, layout)
    # (7): one Gate NU a layer, split into T gates
    gates_see = task_gate_input(e, o_ep, config, layout)
    num_layers = len(config.tower_widths) + 1
    logits = np.zeros((len(e), NUM_TASKS))
    for task in range(NUM_TASKS):
        h = first_input(o_ep, w, config)
        for layer in range(num_layers):
            width = h.shape[1]
            gate = joint_gate(
                w,
                gate_input="ppnet.gate_input",
                second=f"ppnet.gates.{layer}",
                index=layer,
                width_hidden=config.gate_hidden,
            )
            delta = gate_nu(gates_see, gate, config.gate_gamma)
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
@pytest.mark.parametrize("ppnet_input", ["prior_and_embedding", "prior"])
@pytest.mark.parametrize("gate_gamma", [2.0, 3.0])
def test_pepnet_equals_its_equations(
    first_layer: str, epnet_input: str, epnet_gate: str, ppnet_input: str, gate_gamma: float
) -> None:
    model, config, layout, embedding_BE = make(
        first_layer=first_layer,
        epnet_input=epnet_input,
        epnet_gate=epnet_gate,
        ppnet_input=ppnet_input,
        gate_gamma=gate_gamma,
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


def test_gate_input_gradient_trains_what_the_gates_see_and_leaves_the_logits() -> None:
    stopped, _, _, embedding_BE = make()
    open_, _, layout, _ = make(gate_input_gradient=True)
    assert torch.equal(stopped(embedding_BE), open_(embedding_BE))
    embedding_BE.requires_grad_(True)
    (x_BH,) = open_.epnet.gate_input(embedding_BE[:, layout.columns_of("domain")], embedding_BE)
    open_.epnet.gate(x_BH).sum().backward()
    assert embedding_BE.grad is not None
    assert (embedding_BE.grad.abs().sum(0) > 0).all()
    embedding_BE.grad = None
    prior_BP = embedding_BE[:, layout.columns_of("user", "item", "author")]
    open_.ppnet(prior_BP, embedding_BE, torch.ones_like(embedding_BE)).sum().backward()
    assert (embedding_BE.grad.abs().sum(0) > 0).all()


@pytest.mark.parametrize("option", ["first_layer", "epnet_input", "epnet_gate", "ppnet_input"])
def test_an_option_that_there_is_not_is_refused_with_those_that_there_are(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be one of \w+, \w+, found 'fild'"):
        replace(ModelConfig(), **{option: "fild"})


def test_gates_that_see_the_prior_alone_have_no_weights_for_more() -> None:
    model, config, layout, _ = make(epnet_input="domain", ppnet_input="prior")
    assert [name for name, _ in model.named_parameters() if "seen" in name] == []
    assert model.ppnet.gate_input.prior.weight.shape == (
        3 * config.gate_hidden,
        len(layout.columns_of("user", "item", "author")),
    )


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
