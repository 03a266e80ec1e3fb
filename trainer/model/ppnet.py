"""PPNet: task towers whose layers see their input through a person's gate (PEPNet, equations 7-9).

Shapes: B batch, T tasks, P prior, E input, I and O a layer's input and output width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.model.gate_nu import GateNU


class TowerLayer(nn.Module):
    """One layer of all task towers at once: a batched product instead of T small ones."""

    def __init__(self, *, num_tasks: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight_TIO = nn.Parameter(torch.empty(num_tasks, width_in, width_out))
        self.bias_T1O = nn.Parameter(torch.zeros(num_tasks, 1, width_out))
        for weight_IO in self.weight_TIO.data:
            nn.init.xavier_uniform_(weight_IO)

    def forward(self, x_TBI: Tensor) -> Tensor:
        return torch.baddbmm(self.bias_T1O, x_TBI, self.weight_TIO)


class PPNet(nn.Module):
    """Layer l of task t computes f((delta_l,t * H) W + b): the gate multiplies the layer's input.

    Every layer has its own Gate NU, of width I * T, split into one gate a task; its input is
    prior + stop_gradient(O_ep) (+ concatenates). The last layer gives logits and its output is not gated.
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
    ) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        widths = (input_width, *tower_widths, 1)
        self.gates = nn.ModuleList(
            GateNU(
                width_in=prior_width + embedding_width,
                width_hidden=gate_hidden,
                width_out=width_in * num_tasks,
                gamma=gamma,
            )
            for width_in in widths[:-1]
        )
        self.layers = nn.ModuleList(
            TowerLayer(num_tasks=num_tasks, width_in=width_in, width_out=width_out)
            for width_in, width_out in pairwise(widths)
        )

    def forward(self, prior_BP: Tensor, embedding_BE: Tensor, h_BI: Tensor) -> Tensor:
        """Logits of every task.

        Args:
            prior_BP: user, item and author embeddings; the gates train them.
            embedding_BE: O_ep, seen by the gates without a gradient.
            h_BI: H^(1), the input of the first layer.
        Returns: float [B, T].
        """
        gate_input = torch.cat([prior_BP, embedding_BE.detach()], dim=1)
        h_TBI = h_BI.unsqueeze(0)
        for index, (gate, layer) in enumerate(zip(self.gates, self.layers, strict=True)):
            delta_TBI = gate(gate_input).unflatten(1, (self.num_tasks, -1)).transpose(0, 1)
            h_TBI = layer(delta_TBI * h_TBI)
            if index < len(self.layers) - 1:
                h_TBI = torch.relu(h_TBI)
        return h_TBI.squeeze(2).transpose(0, 1)
