"""PEPNet as one writes it down from the paper: one Gate NU a layer, concatenated inputs, autograd throughout.

The dense network that the training step is measured against, and a second reference for its tests. It is to
stay as it is: what trainer.model gains is measured against this.

Shapes: B batch, E embedding, D domain prior, P prior, T tasks, I and O a layer's input and output width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model import GateInput, PEPNet
from trainer.model.layout import FeatureLayout


class PlainGateNU(nn.Module):
    """delta = gamma * sigmoid(ReLU(x W + b) W' + b')."""

    def __init__(self, *, width_in: int, width_hidden: int, width_out: int, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.hidden = nn.Linear(width_in, width_hidden)
        self.output = nn.Linear(width_hidden, width_out)
        for layer in (self.hidden, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.gamma * torch.sigmoid(self.output(torch.relu(self.hidden(x_BI))))


class PlainTowerLayer(nn.Module):
    """One layer of all task towers."""

    def __init__(self, *, num_tasks: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight_TIO = nn.Parameter(torch.empty(num_tasks, width_in, width_out))
        self.bias_T1O = nn.Parameter(torch.zeros(num_tasks, 1, width_out))
        for weight_IO in self.weight_TIO.data:
            nn.init.xavier_uniform_(weight_IO)

    def forward(self, x_TBI: Tensor) -> Tensor:
        return torch.baddbmm(self.bias_T1O, x_TBI, self.weight_TIO)


class PlainPEPNet(nn.Module):
    """Equations 4 to 9, with H^(1) = O_ep and a gate value an element."""

    def __init__(self, layout: FeatureLayout, *, num_tasks: int, config: ModelConfig) -> None:
        super().__init__()
        if config.first_layer != "epnet_output" or config.epnet_gate != "element":
            raise ValueError("PlainPEPNet has first_layer 'epnet_output' and epnet_gate 'element' alone")
        self.num_tasks = num_tasks
        self.sees_embedding = config.epnet_input == "domain_and_embedding"
        domain_columns = layout.columns_of("domain")
        prior_columns = layout.columns_of("user", "item", "author")
        width = layout.width
        widths = (width, *config.tower_widths, 1)

        def gate(width_in: int, width_out: int) -> PlainGateNU:
            return PlainGateNU(
                width_in=width_in,
                width_hidden=config.gate_hidden,
                width_out=width_out,
                gamma=config.gate_gamma,
            )

        self.domain_gate = gate(len(domain_columns) + (width if self.sees_embedding else 0), width)
        self.gates = nn.ModuleList(
            gate(len(prior_columns) + width, width_in * num_tasks) for width_in in widths[:-1]
        )
        self.layers = nn.ModuleList(
            PlainTowerLayer(num_tasks=num_tasks, width_in=width_in, width_out=width_out)
            for width_in, width_out in pairwise(widths)
        )
        self.domain_columns: Tensor
        self.prior_columns: Tensor
        self.register_buffer("domain_columns", torch.tensor(domain_columns), persistent=False)
        self.register_buffer("prior_columns", torch.tensor(prior_columns), persistent=False)

    def forward(self, embedding_BE: Tensor) -> Tensor:
        """Returns: logits, float [B, T]."""
        domain_BD = embedding_BE.index_select(1, self.domain_columns)
        prior_BP = embedding_BE.index_select(1, self.prior_columns)
        sees = [domain_BD, embedding_BE.detach()] if self.sees_embedding else [domain_BD]
        domain_view_BE = self.domain_gate(torch.cat(sees, dim=1)) * embedding_BE
        gate_input = torch.cat([prior_BP, domain_view_BE.detach()], dim=1)
        h_TBI = domain_view_BE.unsqueeze(0)
        for index, (gate, layer) in enumerate(zip(self.gates, self.layers, strict=True)):
            delta_TBI = gate(gate_input).unflatten(1, (self.num_tasks, -1)).transpose(0, 1)
            h_TBI = layer(delta_TBI * h_TBI)
            if index < len(self.layers) - 1:
                h_TBI = torch.relu(h_TBI)
        logits_BT: Tensor = h_TBI.squeeze(2).transpose(0, 1)
        return logits_BT


@torch.no_grad()
def copy_weights(model: PEPNet, plain: PlainPEPNet) -> None:
    """Give the plain network the other's weights."""
    domain_gate = model.epnet.gate
    _copy_gate(plain.domain_gate, model.epnet.gate_input, 0, domain_gate.weight, domain_gate.bias)
    pairs: list[tuple[Any, Any]] = list(zip(plain.gates, model.ppnet.gates, strict=True))
    for index, (plain_gate, gate) in enumerate(pairs):
        weight_OH = gate.weight_TIO.transpose(1, 2).flatten(0, 1)
        _copy_gate(plain_gate, model.ppnet.gate_input, index, weight_OH, gate.bias_T1O.flatten())
    layers: list[tuple[Any, Any]] = list(zip(plain.layers, model.ppnet.layers, strict=True))
    for plain_layer, layer in layers:
        plain_layer.weight_TIO.copy_(layer.weight_TIO)
        plain_layer.bias_T1O.copy_(layer.bias_T1O)


def _copy_gate(
    plain: PlainGateNU, gate_input: GateInput, index: int, weight_OH: Tensor, bias_O: Tensor
) -> None:
    """Put gate `index` of a GateInput and its second layer together."""
    width = len(plain.hidden.bias)
    mine = slice(index * width, (index + 1) * width)
    parts = [gate_input.prior.weight[mine]]
    if gate_input.seen_weight_SH is not None:
        parts.append(gate_input.seen_weight_SH[:, mine].t())
    plain.hidden.weight.copy_(torch.cat(parts, dim=1))
    plain.hidden.bias.copy_(gate_input.prior.bias[mine])
    plain.output.weight.copy_(weight_OH)
    plain.output.bias.copy_(bias_O)
