"""Cross layers, DCN's and DCNv2's, in T networks side by side.

Every layer multiplies the network's input x_0 with a linear map of the layer before and adds that layer:
DCN's map is one number an impression, DCNv2's a whole vector.

Shapes: B batch, E embedding, T networks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.gate_nu import xavier_uniform
from trainer.model.towers import TowerLinear


class VectorCrossLayer(nn.Module):
    """x_0 (x . w) + b + x of every network."""

    def __init__(self, *, num_networks: int, width: int) -> None:
        super().__init__()
        self.weight_TE1 = nn.Parameter(torch.empty(num_networks, width, 1))
        self.bias_T1E = nn.Parameter(torch.zeros(num_networks, 1, width))
        xavier_uniform(self.weight_TE1, fan_in=width, fan_out=1)

    def forward(self, x0_BE: Tensor, x_TBE: Tensor) -> Tensor:
        return x0_BE * torch.bmm(x_TBE, self.weight_TE1) + self.bias_T1E + x_TBE


class VectorCross(nn.Module):
    """x_(l+1) = x_0 (x_l . w_l) + b_l + x_l. Source: DCN, arXiv 1708.05123, equation 3."""

    def __init__(self, *, num_networks: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.num_networks = num_networks
        self.layers = nn.ModuleList(
            VectorCrossLayer(num_networks=num_networks, width=width) for _ in range(num_layers)
        )

    def forward(self, x0_BE: Tensor) -> Tensor:
        """Returns: float [T, B, E]."""
        x_TBE = x0_BE.expand(self.num_networks, -1, -1)
        for layer in self.layers:
            x_TBE = layer(x0_BE, x_TBE)
        return x_TBE


class MatrixCross(nn.Module):
    """x_(l+1) = x_0 * (W_l x_l + b_l) + x_l. Source: DCNv2, arXiv 2008.13535, equation 1."""

    def __init__(self, *, num_networks: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.num_networks = num_networks
        self.layers = nn.ModuleList(
            TowerLinear(num_towers=num_networks, width_in=width, width_out=width) for _ in range(num_layers)
        )

    def forward(self, x0_BE: Tensor) -> Tensor:
        """Returns: float [T, B, E]."""
        x_TBE = x0_BE.expand(self.num_networks, -1, -1)
        for layer in self.layers:
            x_TBE = x0_BE * layer(x_TBE) + x_TBE
        return x_TBE
