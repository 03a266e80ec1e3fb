"""DCN: a cross network and a deep one on the same input, side by side. One network a task.

x_0 = E, the whole concatenated embedding, priors included; cross layers (equation 3), deep layers h_(l+1) =
ReLU(W h_l + b) (4), and the logit w . [x_L, h_L] + b of both ends (5).
Source: Wang et al., AdKDD 2017, arXiv 1708.05123, equations 2 to 5. The paper predicts one label: with more
tasks, one such network a task stands on the shared embedding. Its dense inputs are embeddings here as all
features are.

Shapes: B batch, E embedding, T tasks, H the deep network's last width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.cross import VectorCross
from trainer.model.layout import FeatureLayout
from trainer.model.towers import TowerLinear, Towers, logits_of


class DCN(nn.Module):
    """config.cross_layers cross layers beside deep layers of config.tower_widths."""

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        super().__init__()
        self.cross = VectorCross(num_networks=num_tasks, width=layout.width, num_layers=config.cross_layers)
        self.deep = Towers(num_towers=num_tasks, widths=(layout.width, *config.tower_widths))
        self.head = TowerLinear(
            num_towers=num_tasks, width_in=layout.width + config.tower_widths[-1], width_out=1
        )

    @property
    def output_bias(self) -> nn.Parameter:
        """Added to the logits, [T, 1, 1]."""
        return self.head.bias_T1O

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        ends_TBH = torch.cat([self.cross(embedding_BE), self.deep(embedding_BE)], dim=2)
        return logits_of(self.head(ends_TBH))
