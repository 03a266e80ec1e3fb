"""SpecificAll: a whole network for each domain, bottom and task towers.

y_t = h^(d,t)(f^d(x)) for an impression of domain d; x is the whole concatenated embedding, priors included.
Nothing at all is shared only where the embeddings are the domain's own too: a comparison therefore trains one
run a domain, with tables of its own (trained_per = "domain"). In one run the domains share the embeddings.
Source: a multi-domain baseline of PEPNet (arXiv 2302.01115, section 4.1), which names it and gives no
equation.

Shapes: B batch, E embedding, T tasks.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.by_domain import through_own_domain
from trainer.model.layout import FeatureLayout
from trainer.model.shared_bottom import SharedBottom


class SpecificAll(nn.Module):
    """A SharedBottom a domain."""

    uses_domain = True

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            SharedBottom(layout, num_tasks=num_tasks, num_domains=1, config=config)
            for _ in range(num_domains)
        )

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        return through_own_domain(self.networks, embedding_BE, domain_B)
