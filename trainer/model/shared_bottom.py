"""SharedBottom: one network below, one tower a task above it.

y_t = h^t(f(x)), x the whole concatenated embedding, priors included.
Source: Caruana, Multitask Learning, 1997 (doi 10.1023/A:1007379606734); in the notation of MMoE (doi
10.1145/3219819.3220007), equation 1.

Shapes: B batch, E embedding, T tasks.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.layout import FeatureLayout
from trainer.model.towers import LogitTowers, hidden_layers


class SharedBottom(nn.Module):
    """config.bottom_widths are the layers of f, config.tower_widths those of each h^t."""

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        super().__init__()
        self.bottom = hidden_layers((layout.width, *config.bottom_widths))
        self.towers = LogitTowers(
            num_towers=num_tasks, widths=(config.bottom_widths[-1], *config.tower_widths)
        )

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        logits_BT: Tensor = self.towers(self.bottom(embedding_BE))
        return logits_BT
