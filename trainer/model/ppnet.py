"""PPNet: task towers whose layers see their input through a person's gate (PEPNet, equations 7-9).

All tensors of the towers are [T, B, ...]: the gates' second layers write them so, and nothing is transposed.

Shapes: B batch, T tasks, P prior, E embedding, H hidden of a gate, I and O a layer's input and output width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.model.gate_nu import GateInput, gated
from trainer.model.towers import TowerLinear, logits_of


class PPNet(nn.Module):
    """Layer l of task t computes f((delta_l,t * H) W + b): the gate multiplies the layer's input.

    Every layer has its own Gate NU, of width I * T, split into one gate a task; its input is
    prior + stop_gradient(O_ep) (+ concatenates). The last layer gives logits and its output is not gated.
    Since delta = gamma * sigmoid(z), a layer is gamma * (sigmoid(z) * H) W + b.
    Source: arXiv 2302.01115, equations 7 to 9.
    """

    def __init__(
        self,
        *,
        prior_width: int,
        embedding_width: int,
        input_width: int,
        num_tasks: int,
        tower_widths: tuple[int, ...],
        gate_hidden: int,
        gamma: float = 2.0,
        seen_gradient: bool = False,
    ) -> None:
        """Args: embedding_width: 0 = the gates see the prior alone. seen_gradient: no stop_gradient."""
        super().__init__()
        self.num_tasks = num_tasks
        widths = (input_width, *tower_widths, 1)
        self.gate_input = GateInput(
            prior_width=prior_width,
            seen_width=embedding_width,
            width_hidden=gate_hidden,
            num_gates=len(widths) - 1,
            seen_gradient=seen_gradient,
        )
        self.gates = nn.ModuleList(
            TowerLinear(num_towers=num_tasks, width_in=gate_hidden, width_out=width_in, joint=True)
            for width_in in widths[:-1]
        )
        self.layers = nn.ModuleList(
            TowerLinear(num_towers=num_tasks, width_in=width_in, width_out=width_out, scale=gamma)
            for width_in, width_out in pairwise(widths)
        )

    @property
    def output_bias(self) -> nn.Parameter:
        """Added to the logits, [T, 1, 1]: no gate scales it."""
        last = self.layers[-1]
        assert isinstance(last, TowerLinear)
        return last.bias_T1O

    def forward(self, prior_BP: Tensor, embedding_BE: Tensor, h_BI: Tensor) -> Tensor:
        """Logits of every task.

        Args:
            prior_BP: user, item and author embeddings; the gates train them.
            embedding_BE: O_ep, seen by the gates; it gets a gradient from them only with seen_gradient.
            h_BI: H^(1), the input of the first layer.
        Returns: float [B, T].
        """
        x_LBH = self.gate_input(prior_BP, embedding_BE)
        h_TBI = h_BI.unsqueeze(0)
        for index, (x_BH, gate, layer) in enumerate(zip(x_LBH, self.gates, self.layers, strict=True)):
            z_TBI = gate(x_BH.expand(self.num_tasks, -1, -1))
            h_TBI = layer(gated(z_TBI, h_TBI.to(z_TBI.dtype)))
            if index < len(self.layers) - 1:
                h_TBI = torch.relu(h_TBI)
        return logits_of(h_TBI)
