"""PPNet on MMoE: a person's gates on the layers of the experts and of the task towers.

The gate of layer l multiplies the input of that layer in every expert, or in every tower: O^(l) = delta^(l) *
H^(l), H^(l+1) = ReLU(O^(l) W^(l) + b^(l)), the last layer linear. A tower's layers have a gate a task
(equation 7). An expert serves all tasks at once, so its layers have one gate, the same in all experts. The
softmax gates that mix the experts see H^(1) as it is: they are MMoE's own.
Source: PEPNet, arXiv 2302.01115, equations 7 to 9, which names MMoE as one network that PPNet plugs onto;
MMoE, doi 10.1145/3219819.3220007, equations 6 to 8.

Shapes: B batch, T tasks, K experts, P prior, E embedding, H hidden of a gate, I and O a layer's input and
output.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.gate_nu import GateInput, gated
from trainer.model.layout import FeatureLayout
from trainer.model.mmoe import ExpertMix
from trainer.model.pepnet import first_width
from trainer.model.towers import TowerLinear, logits_of


class GatedLayer(nn.Module):
    """gamma * (sigmoid(z) * H) W + b of every tower, z = x W' + b' the gates' second layers."""

    def __init__(
        self,
        *,
        num_towers: int,
        num_gates: int,
        width_in: int,
        width_out: int,
        gate_hidden: int,
        gamma: float,
    ) -> None:
        """Args: num_gates: one a tower, or 1 for all of them."""
        super().__init__()
        self.num_towers = num_towers
        self.num_gates = num_gates
        self.gate = TowerLinear(num_towers=num_gates, width_in=gate_hidden, width_out=width_in, joint=True)
        self.layer = TowerLinear(num_towers=num_towers, width_in=width_in, width_out=width_out, scale=gamma)

    def forward(self, x_BH: Tensor, h_TBI: Tensor) -> Tensor:
        """Args: h_TBI: of every tower, or [1, B, I] that all see. Returns: float [T, B, O], no ReLU yet."""
        z_TBI = self.gate(x_BH.expand(self.num_gates, -1, -1))
        if self.num_gates < len(h_TBI):
            z_TBI = z_TBI.expand(len(h_TBI), -1, -1)
        o_TBI = gated(z_TBI, h_TBI.to(z_TBI.dtype))
        answer_TBO: Tensor = self.layer(o_TBI.expand(self.num_towers, -1, -1))
        return answer_TBO


class PPNetMMoE(nn.Module):
    """Takes what PPNet takes; config.num_experts experts with the layers config.bottom_widths."""

    def __init__(
        self,
        *,
        prior_width: int,
        embedding_width: int,
        input_width: int,
        num_tasks: int,
        config: ModelConfig,
    ) -> None:
        """Args: embedding_width: 0 = the gates see the prior alone."""
        super().__init__()
        expert_widths = (input_width, *config.bottom_widths)
        tower_widths = (config.bottom_widths[-1], *config.tower_widths, 1)
        self.gate_input = GateInput(
            prior_width=prior_width,
            seen_width=embedding_width,
            width_hidden=config.gate_hidden,
            num_gates=len(expert_widths) + len(tower_widths) - 2,
            seen_gradient=config.gate_input_gradient,
        )

        def layers(widths: tuple[int, ...], *, num_towers: int, num_gates: int) -> nn.ModuleList:
            return nn.ModuleList(
                GatedLayer(
                    num_towers=num_towers,
                    num_gates=num_gates,
                    width_in=width_in,
                    width_out=width_out,
                    gate_hidden=config.gate_hidden,
                    gamma=config.gate_gamma,
                )
                for width_in, width_out in pairwise(widths)
            )

        self.experts = layers(expert_widths, num_towers=config.num_experts, num_gates=1)
        self.mix = ExpertMix(width_in=input_width, num_experts=config.num_experts, num_tasks=num_tasks)
        self.towers = layers(tower_widths, num_towers=num_tasks, num_gates=num_tasks)

    @property
    def output_bias(self) -> nn.Parameter:
        """Added to the logits, [T, 1, 1]: no gate scales it."""
        last = self.towers[-1]
        assert isinstance(last, GatedLayer)
        return last.layer.bias_T1O

    def forward(self, prior_BP: Tensor, embedding_BE: Tensor, h_BI: Tensor) -> Tensor:
        """Logits of every task, float [B, T]; arguments as of PPNet."""
        x_LBH = self.gate_input(prior_BP, embedding_BE)
        h_KBI = h_BI.unsqueeze(0)
        for x_BH, layer in zip(x_LBH[: len(self.experts)], self.experts, strict=True):
            h_KBI = torch.relu(layer(x_BH, h_KBI))
        h_TBI = self.mix(h_BI, h_KBI)
        last = len(self.towers) - 1
        for index, (x_BH, layer) in enumerate(zip(x_LBH[len(self.experts) :], self.towers, strict=True)):
            h_TBI = layer(x_BH, h_TBI)
            if index < last:
                h_TBI = torch.relu(h_TBI)
        return logits_of(h_TBI)


def ppnet_mmoe_for(layout: FeatureLayout, *, num_tasks: int, config: ModelConfig) -> PPNetMMoE:
    return PPNetMMoE(
        prior_width=len(layout.columns_of("user", "item", "author")),
        embedding_width=layout.width if config.ppnet_input == "prior_and_embedding" else 0,
        input_width=first_width(layout, config=config),
        num_tasks=num_tasks,
        config=config,
    )
