"""MMoE: experts that all tasks share, and one gate a task that mixes them.

y_t = h^t(f^t(x)) (equation 6), f^t(x) = sum_k g^t(x)_k f_k(x) (7), g^t(x) = softmax(W_g^t x) (8); x is the
whole concatenated embedding, priors included.
Source: Ma et al., KDD 2018 (doi 10.1145/3219819.3220007), equations 6 to 8.

Shapes: B batch, E embedding, K experts, T tasks, O an expert's output width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.layout import FeatureLayout
from trainer.model.towers import LogitTowers, Towers


class ExpertMix(nn.Module):
    """f^t for every task: the experts' outputs, weighted by the task's softmax gate."""

    def __init__(self, *, width_in: int, num_experts: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.num_experts = num_experts
        self.gate = nn.Linear(width_in, num_tasks * num_experts, bias=False)
        for weight_KE in self.gate.weight.data.chunk(num_tasks):
            nn.init.xavier_uniform_(weight_KE)

    def forward(self, x_BE: Tensor, experts_KBO: Tensor) -> Tensor:
        """Returns: float [T, B, O]."""
        share_BTK = torch.softmax(self.gate(x_BE).unflatten(1, (self.num_tasks, self.num_experts)), dim=2)
        mixed_BTO = torch.bmm(share_BTK, experts_KBO.transpose(0, 1))
        return mixed_BTO.transpose(0, 1)


class MixtureTowers(nn.Module):
    """Experts, mix and task towers on any input."""

    def __init__(self, *, width_in: int, num_tasks: int, config: ModelConfig) -> None:
        super().__init__()
        self.experts = Towers(num_towers=config.num_experts, widths=(width_in, *config.bottom_widths))
        self.mix = ExpertMix(width_in=width_in, num_experts=config.num_experts, num_tasks=num_tasks)
        self.towers = LogitTowers(
            num_towers=num_tasks, widths=(config.bottom_widths[-1], *config.tower_widths)
        )

    def forward(self, x_BE: Tensor) -> Tensor:
        """Returns: logits, float [B, T]."""
        logits_BT: Tensor = self.towers(self.mix(x_BE, self.experts(x_BE)))
        return logits_BT


class MMoE(nn.Module):
    """config.num_experts experts with the layers config.bottom_widths."""

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        super().__init__()
        self.mixture = MixtureTowers(width_in=layout.width, num_tasks=num_tasks, config=config)

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        logits_BT: Tensor = self.mixture(embedding_BE)
        return logits_BT
