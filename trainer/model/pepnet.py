"""PEPNet: EPNet on the shared embedding, PPNet on the task towers (arXiv 2302.01115).

Shapes: B batch, E width of the concatenated embedding, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.errors import ConfigError
from trainer.model.epnet import EPNet
from trainer.model.layout import FeatureLayout, columns_in
from trainer.model.ppnet import PPNet


class PEPNet(nn.Module):
    """The dense part of the model: from pooled embeddings to one logit a task.

    Every task is predicted in every domain; the towers are shared by the domains.
    """

    def __init__(self, layout: FeatureLayout, *, num_tasks: int, config: ModelConfig) -> None:
        """Raises: ConfigError if the schema lacks a domain feature, or any user, item or author feature."""
        super().__init__()
        self.domain_runs = layout.runs_of("domain")
        self.prior_runs = layout.runs_of("user", "item", "author")
        if not self.domain_runs:
            raise ConfigError("PEPNet: EPNet needs at least one feature with role 'domain'")
        if not self.prior_runs:
            raise ConfigError("PEPNet: PPNet needs at least one feature with role 'user', 'item' or 'author'")
        self.epnet = EPNet(
            domain_width=len(layout.columns_of("domain")),
            field_dims=layout.dims,
            gate_hidden=config.gate_hidden,
            gamma=config.gate_gamma,
            sees_embedding=config.epnet_input == "domain_and_embedding",
            by_field=config.epnet_gate == "field",
        )
        self.first_hidden: nn.Linear | None = None
        input_width = layout.width
        if config.first_layer == "hidden":
            self.first_hidden = nn.Linear(layout.width, config.tower_widths[0])
            nn.init.xavier_uniform_(self.first_hidden.weight)
            nn.init.zeros_(self.first_hidden.bias)
            input_width = config.tower_widths[0]
        self.ppnet = PPNet(
            prior_width=len(layout.columns_of("user", "item", "author")),
            embedding_width=layout.width,
            input_width=input_width,
            num_tasks=num_tasks,
            tower_widths=config.tower_widths,
            gate_hidden=config.gate_hidden,
            gamma=config.gate_gamma,
        )

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Args: domain_B: not used, EPNet sees the domain's features. Returns: logits, float [B, T]."""
        domain_BD = columns_in(embedding_BE, self.domain_runs)
        prior_BP = columns_in(embedding_BE, self.prior_runs)
        domain_view_BE = self.epnet(domain_BD, embedding_BE)
        h_BI = domain_view_BE
        if self.first_hidden is not None:
            h_BI = torch.relu(self.first_hidden(domain_view_BE))
        logits_BT: Tensor = self.ppnet(prior_BP, domain_view_BE, h_BI)
        return logits_BT


def multi_task_loss(logits_BT: Tensor, *, labels_BT: Tensor, known_BT: Tensor, weight_T: Tensor) -> Tensor:
    """Binary cross-entropy summed over impressions and tasks; unknown labels add nothing.

    A sum, not a mean: summed gradients mean the same on any number of ranks.
    """
    loss_BT = nn.functional.binary_cross_entropy_with_logits(logits_BT, labels_BT, reduction="none")
    return (loss_BT * known_BT * weight_T).sum()
