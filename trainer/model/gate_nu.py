"""Gate NU: two dense layers whose output scales another network's values (PEPNet, equations 2-3).

    delta = gamma * sigmoid(ReLU(x W + b) W' + b'),    x = prior + stop_gradient(seen)    (+ concatenates)

The gradient stops as the paper's ablation favours; `seen_gradient` lets it through.

The parts are apart, since on a CPU the passes over memory between the products cost about as much as they do:
nothing is concatenated (x W is prior W_p + seen W_s, and W_s needs no gradient of its input); gates that see
the same x have their first layers in one product; sigmoid and the value that is gated are one function with a
backward of its own; and gamma is left to the product that follows, which scales for nothing.

Shapes: B batch, P prior, S seen, G gates, H hidden of all of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class GateInput(nn.Module):
    """ReLU(x W + b) of one or more gates that see the same x = prior + stop_gradient(seen)."""

    def __init__(
        self,
        *,
        prior_width: int,
        seen_width: int,
        width_hidden: int,
        num_gates: int = 1,
        seen_gradient: bool = False,
    ) -> None:
        """Args: seen_width: 0 = the gates see the prior alone. seen_gradient: train what is seen as well."""
        super().__init__()
        self.seen_gradient = seen_gradient
        self.num_gates = num_gates
        self.prior = nn.Linear(prior_width, num_gates * width_hidden)
        nn.init.zeros_(self.prior.bias)
        # The two parts are one matrix of the equations, and each gate has its own: Xavier's bound is theirs.
        xavier_uniform(self.prior.weight, fan_in=prior_width + seen_width, fan_out=width_hidden)
        self.seen_weight_SH: nn.Parameter | None = None
        if seen_width:
            self.seen_weight_SH = nn.Parameter(torch.empty(seen_width, num_gates * width_hidden))
            xavier_uniform(self.seen_weight_SH, fan_in=prior_width + seen_width, fan_out=width_hidden)

    def forward(self, prior_BP: Tensor, seen_BS: Tensor) -> tuple[Tensor, ...]:
        """Returns: G times float [B, H / G]."""
        x_BH: Tensor = self.prior(prior_BP)
        if self.seen_weight_SH is not None:
            seen_BS = seen_BS if self.seen_gradient else seen_BS.detach()
            x_BH = torch.addmm(x_BH, seen_BS, self.seen_weight_SH)
        return torch.relu(x_BH).chunk(self.num_gates, dim=1)


class _Gated(torch.autograd.Function):
    """y = sigmoid(z) * h; dh = dy * sigmoid(z); dz = dh * (h - y), since h * (1 - sigmoid(z)) = h - y."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, h: Tensor) -> Tensor:
        opening = torch.sigmoid(z)
        y = opening * h
        ctx.save_for_backward(opening, h, y)
        return y

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, Tensor]:
        opening, h, y = ctx.saved_tensors
        dh = dy[0] * opening
        dz = (h - y).mul_(dh)
        return dz, dh.sum_to_size(h.shape)


def gated(z: Tensor, h: Tensor) -> Tensor:
    """sigmoid(z) * h: a value behind its gate, still to be multiplied by gamma.

    Args: z: float [..., N], the gate's second layer before the sigmoid. h: broadcasts to z.
    """
    if torch.is_grad_enabled() and (z.requires_grad or h.requires_grad):
        y: Tensor = _Gated.apply(z, h)  # type: ignore[no-untyped-call]
        return y
    return torch.sigmoid(z) * h


def xavier_uniform(weight: Tensor, *, fan_in: int, fan_out: int) -> None:
    """Xavier's uniform distribution for a matrix that is part of a larger one of fan_in and fan_out."""
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound)
