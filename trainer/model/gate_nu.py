"""Gate NU: two dense layers whose output scales another network's values (PEPNet, equations 2-3).

Shapes: B batch, I gate input, H hidden, O gated values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GateNU(nn.Module):
    """delta = gamma * sigmoid(ReLU(x W + b) W' + b'), so delta is in (0, gamma).

    Source: arXiv 2302.01115, equations 2 and 3; gamma = 2 there.
    """

    def __init__(self, *, width_in: int, width_hidden: int, width_out: int, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma
        self.hidden = nn.Linear(width_in, width_hidden)
        self.output = nn.Linear(width_hidden, width_out)
        for layer in (self.hidden, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Returns: float [B, O] in (0, gamma)."""
        return self.gamma * torch.sigmoid(self.output(torch.relu(self.hidden(x_BI))))
