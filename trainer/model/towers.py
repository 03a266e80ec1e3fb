"""Towers: the same layers side by side with weights of their own, one tower a task, an expert or a domain.

All tensors of towers are [T, B, ...], so that a layer of all towers is one batched product.

Shapes: B batch, T towers, I and O a layer's input and output width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.model.gate_nu import xavier_uniform


class TowerLinear(nn.Module):
    """scale * x W + b of all towers at once: a batched product instead of T small ones."""

    def __init__(
        self, *, num_towers: int, width_in: int, width_out: int, scale: float = 1.0, joint: bool = False
    ) -> None:
        """Args: joint: the towers' matrices are parts of one [I, T * O], which Xavier's bound is for."""
        super().__init__()
        self.scale = scale
        self.weight_TIO = nn.Parameter(torch.empty(num_towers, width_in, width_out))
        self.bias_T1O = nn.Parameter(torch.zeros(num_towers, 1, width_out))
        fan_out = width_out * num_towers if joint else width_out
        xavier_uniform(self.weight_TIO, fan_in=width_in, fan_out=fan_out)

    def forward(self, x_TBI: Tensor) -> Tensor:
        return torch.baddbmm(self.bias_T1O, x_TBI, self.weight_TIO, alpha=self.scale)


class Towers(nn.Module):
    """h^(l+1) = ReLU(h^(l) W^(l) + b^(l)) in each of T towers."""

    def __init__(self, *, num_towers: int, widths: tuple[int, ...]) -> None:
        """Args: widths: of the input and of each layer's output."""
        super().__init__()
        self.num_towers = num_towers
        self.layers = nn.ModuleList(
            TowerLinear(num_towers=num_towers, width_in=width_in, width_out=width_out)
            for width_in, width_out in pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: float [T, B, I], or [B, I] that all towers see. Returns: float [T, B, O]."""
        h_TBI = x.expand(self.num_towers, -1, -1) if x.ndim == 2 else x
        for layer in self.layers:
            h_TBI = torch.relu(layer(h_TBI))
        return h_TBI


class LogitTowers(nn.Module):
    """Towers that end in one linear unit each: T logits of an impression."""

    def __init__(self, *, num_towers: int, widths: tuple[int, ...]) -> None:
        """Args: widths: of the input and of each hidden layer."""
        super().__init__()
        self.hidden = Towers(num_towers=num_towers, widths=widths)
        self.head = TowerLinear(num_towers=num_towers, width_in=widths[-1], width_out=1)

    @property
    def output_bias(self) -> nn.Parameter:
        """Added to the logits, [T, 1, 1]."""
        return self.head.bias_T1O

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: float [T, B, I], or [B, I] that all towers see. Returns: logits, float [B, T]."""
        return logits_of(self.head(self.hidden(x)))


def logits_of(h_TB1: Tensor) -> Tensor:
    """The towers' single outputs as a model's answer, [B, T]."""
    return h_TB1.squeeze(2).transpose(0, 1)


def hidden_layers(widths: tuple[int, ...]) -> nn.Sequential:
    """ReLU layers of a network that stands alone. Args: widths: of the input and of each layer's output."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        linear = nn.Linear(width_in, width_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)
