"""SpecificTop: one bottom that all domains share, task towers for each domain.

y_t = h^(d,t)(f(x)) for an impression of domain d; x is the whole concatenated embedding, priors included.
Source: a multi-domain baseline of PEPNet (arXiv 2302.01115, section 4.1), which names it and gives no
equation.

Shapes: B batch, E embedding, T tasks.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.by_domain import through_own_domain
from trainer.model.layout import FeatureLayout
from trainer.model.towers import LogitTowers, hidden_layers


class SpecificTop(nn.Module):
    """config.bottom_widths are the layers of f, config.tower_widths those of each h^(d,t)."""

    uses_domain = True

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        super().__init__()
        self.bottom = hidden_layers((layout.width, *config.bottom_widths))
        widths = (config.bottom_widths[-1], *config.tower_widths)
        self.tops = nn.ModuleList(
            LogitTowers(num_towers=num_tasks, widths=widths) for _ in range(num_domains)
        )

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        return through_own_domain(self.tops, self.bottom(embedding_BE), domain_B)
