"""What the transcriptions of the papers share: float64 numpy, one tower and one layer at a time.

Shapes in plain words here: `weights[t]` is tower t's matrix, rows of x are impressions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import nn

from trainer.config import preset
from trainer.config.config import ModelConfig
from trainer.model import build_model
from trainer.model.layout import FeatureLayout

NUM_TASKS = 3
NUM_DOMAINS = 3
BATCH = 7

Weights = dict[str, np.ndarray]
Gate = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""W, b, W', b' of PEPNet's equations 2 and 3."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x)
    return e / e.sum(axis=-1, keepdims=True)


def gate_nu(x: np.ndarray, gate: Gate, gamma: float) -> np.ndarray:
    """PEPNet's equations 2 and 3."""
    w, b, w2, b2 = gate
    return gamma * sigmoid(relu(x @ w + b) @ w2 + b2)


def first_matrix(w: Weights, prefix: str, gate: int, width_hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """W and b of one gate of a GateInput.

    It keeps all gates side by side, and W in two parts: for the prior, transposed, and for what is only seen.
    """
    mine = slice(gate * width_hidden, (gate + 1) * width_hidden)
    parts = [w[f"{prefix}.prior.weight"].T[:, mine]]
    if f"{prefix}.seen_weight_SH" in w:
        parts.append(w[f"{prefix}.seen_weight_SH"][:, mine])
    return np.concatenate(parts), w[f"{prefix}.prior.bias"][mine]


def domain_gate(w: Weights, width_hidden: int) -> Gate:
    first, bias = first_matrix(w, "epnet.gate_input", 0, width_hidden)
    return first, bias, w["epnet.gate.weight"].T, w["epnet.gate.bias"]


def joint_gate(w: Weights, *, gate_input: str, second: str, index: int, width_hidden: int) -> Gate:
    """One layer's Gate NU, its second matrix I * T wide as in equation 7."""
    first, bias = first_matrix(w, gate_input, index, width_hidden)
    wide = np.concatenate(list(w[f"{second}.weight_TIO"]), axis=1)
    return first, bias, wide, w[f"{second}.bias_T1O"].flatten()


def domain_view(e: np.ndarray, w: Weights, config: ModelConfig, layout: FeatureLayout) -> np.ndarray:
    """O_ep of PEPNet's equations 5 and 6."""
    domain = e[:, layout.columns_of("domain")]
    seen = np.concatenate([domain, e], 1) if config.epnet_input == "domain_and_embedding" else domain
    delta = gate_nu(seen, domain_gate(w, config.gate_hidden), config.gate_gamma)
    if config.epnet_gate == "field":
        delta = np.repeat(delta, layout.dims, axis=1)
    return delta * e


def task_gate_input(
    e: np.ndarray, o_ep: np.ndarray, config: ModelConfig, layout: FeatureLayout
) -> np.ndarray:
    """The gates' input of equation 7."""
    prior = e[:, layout.columns_of("user", "item", "author")]
    return np.concatenate([prior, o_ep], 1) if config.ppnet_input == "prior_and_embedding" else prior


def first_input(o_ep: np.ndarray, w: Weights, config: ModelConfig) -> np.ndarray:
    """H^(1) of equation 8."""
    if config.first_layer == "epnet_output":
        return o_ep
    return relu(o_ep @ w["first_hidden.weight"].T + w["first_hidden.bias"])


def tower(x: np.ndarray, w: Weights, prefix: str, index: int) -> np.ndarray:
    """ReLU layers of one of the towers that stand side by side under `prefix`."""
    layer = 0
    while f"{prefix}.layers.{layer}.weight_TIO" in w:
        weight = w[f"{prefix}.layers.{layer}.weight_TIO"][index]
        x = relu(x @ weight + w[f"{prefix}.layers.{layer}.bias_T1O"][index, 0])
        layer += 1
    assert layer > 0, prefix
    return x


def head(x: np.ndarray, w: Weights, prefix: str, index: int) -> np.ndarray:
    """The one linear unit of a tower."""
    return x @ w[f"{prefix}.weight_TIO"][index, :, 0] + w[f"{prefix}.bias_T1O"][index, 0, 0]


def tower_logit(x: np.ndarray, w: Weights, prefix: str, index: int) -> np.ndarray:
    """A LogitTowers' answer for one task."""
    return head(tower(x, w, f"{prefix}.hidden", index), w, f"{prefix}.head", index)


def bottom(x: np.ndarray, w: Weights, prefix: str) -> np.ndarray:
    """ReLU layers of a network that stands alone; its odd entries are the ReLUs."""
    layer = 0
    while f"{prefix}.{layer}.weight" in w:
        x = relu(x @ w[f"{prefix}.{layer}.weight"].T + w[f"{prefix}.{layer}.bias"])
        layer += 2
    assert layer > 0, prefix
    return x


def mixed(x: np.ndarray, experts: list[np.ndarray], gate: np.ndarray) -> np.ndarray:
    """sum_k softmax(x W)_k f_k(x)."""
    share = softmax(x @ gate)
    return sum(share[:, [k]] * expert for k, expert in enumerate(experts))


class Built:
    """A registered model with weights away from where they begin, and impressions for it."""

    def __init__(self, name: str, **changes: Any) -> None:
        torch.manual_seed(0)
        self.layout = FeatureLayout.of(preset("quickstart").schema)
        small = ModelConfig(tower_widths=(12, 8), bottom_widths=(9, 6), gate_hidden=10, cin_rows=(5, 4))
        self.config = replace(small, name=name, **changes)
        self.model: nn.Module = build_model(
            self.layout, num_tasks=NUM_TASKS, num_domains=NUM_DOMAINS, config=self.config
        )
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        self.embedding_BE = torch.randn(BATCH, self.layout.width)
        self.domain_B = torch.tensor([1, 0, 2, 2, 1, 0, 2])

    @property
    def e(self) -> np.ndarray:
        return self.embedding_BE.numpy().astype(np.float64)

    @property
    def fields(self) -> np.ndarray:
        """The features' embeddings, [impression, feature, dim]."""
        return self.e.reshape(BATCH, -1, self.layout.dims[0])

    @property
    def weights(self) -> Weights:
        return {name: p.detach().numpy().astype(np.float64) for name, p in self.model.named_parameters()}

    def assert_logits(self, expected: np.ndarray) -> None:
        """The model in float64 gives these logits."""
        assert expected.shape == (BATCH, NUM_TASKS)
        found = self.model.double()(self.embedding_BE.double(), self.domain_B).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
        assert expected.std(axis=0).min() > 1e-3, "impressions that all score alike would prove nothing"
