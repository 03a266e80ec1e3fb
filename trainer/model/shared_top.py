"""SharedTop: a bottom for each domain, task towers that all domains share.

y_t = h^t(f^d(x)) for an impression of domain d; x is the whole concatenated embedding, priors included.
Source: a multi-domain baseline of PEPNet (arXiv 2302.01115, section 4.1), which names it and gives no
equation; read here as the bottom being the domain's own and the top shared, as the names of its two
neighbours ask.

Shapes: B batch, E embedding, T tasks.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.by_domain import through_own_domain
from trainer.model.layout import FeatureLayout
from trainer.model.towers import LogitTowers, hidden_layers


class SharedTop(nn.Module):
    """config.bottom_widths are the layers of each f^d, config.tower_widths those of each h^t."""

    uses_domain = True

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        super().__init__()
        widths = (layout.width, *config.bottom_widths)
        self.bottoms = nn.ModuleList(hidden_layers(widths) for _ in range(num_domains))
        self.towers = LogitTowers(num_towers=num_tasks, widths=(widths[-1], *config.tower_widths))

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        logits_BT: Tensor = self.towers(through_own_domain(self.bottoms, embedding_BE, domain_B))
        return logits_BT
