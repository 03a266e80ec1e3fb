"""PEPNet: EPNet on the shared embedding, PPNet on the task towers (arXiv 2302.01115).

Shapes: B batch, E width of the concatenated embedding, I input width of the towers, T tasks.
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
        self.domain_runs = domain_runs_of(layout)
        self.prior_runs = prior_runs_of(layout)
        self.epnet = epnet_for(layout, config=config)
        self.first_hidden = first_hidden_for(layout, config=config)
        self.ppnet = ppnet_for(layout, num_tasks=num_tasks, config=config)

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Args: domain_B: not used, EPNet sees the domain's features. Returns: logits, float [B, T]."""
        domain_BD = columns_in(embedding_BE, self.domain_runs)
        prior_BP = columns_in(embedding_BE, self.prior_runs)
        domain_view_BE = self.epnet(domain_BD, embedding_BE)
        h_BI = first_input(domain_view_BE, self.first_hidden)
        logits_BT: Tensor = self.ppnet(prior_BP, domain_view_BE, h_BI)
        return logits_BT


def domain_runs_of(layout: FeatureLayout) -> tuple[tuple[int, int], ...]:
    """Where EPNet's prior E(F_d) lies in E. Raises: ConfigError if there is none."""
    runs = layout.runs_of("domain")
    if not runs:
        raise ConfigError("PEPNet: EPNet needs at least one feature with role 'domain'")
    return runs


def prior_runs_of(layout: FeatureLayout) -> tuple[tuple[int, int], ...]:
    """Where PPNet's prior, E(F_u) + E(F_i) + E(F_a), lies in E. Raises: ConfigError if there is none."""
    runs = layout.runs_of("user", "item", "author")
    if not runs:
        raise ConfigError("PEPNet: PPNet needs at least one feature with role 'user', 'item' or 'author'")
    return runs


def epnet_for(layout: FeatureLayout, *, config: ModelConfig) -> EPNet:
    return EPNet(
        domain_width=len(layout.columns_of("domain")),
        field_dims=layout.dims,
        gate_hidden=config.gate_hidden,
        gamma=config.gate_gamma,
        sees_embedding=config.epnet_input == "domain_and_embedding",
        seen_gradient=config.gate_input_gradient,
        by_field=config.epnet_gate == "field",
    )


def first_hidden_for(layout: FeatureLayout, *, config: ModelConfig) -> nn.Linear | None:
    """The layer that makes H^(1) of EPNet's output; None if that output itself is H^(1)."""
    if config.first_layer == "epnet_output":
        return None
    layer = nn.Linear(layout.width, config.tower_widths[0])
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def first_width(layout: FeatureLayout, *, config: ModelConfig) -> int:
    """I, the width of H^(1)."""
    return layout.width if config.first_layer == "epnet_output" else config.tower_widths[0]


def first_input(domain_view_BE: Tensor, first_hidden: nn.Linear | None) -> Tensor:
    """H^(1), float [B, I]."""
    return domain_view_BE if first_hidden is None else torch.relu(first_hidden(domain_view_BE))


def ppnet_for(layout: FeatureLayout, *, num_tasks: int, config: ModelConfig) -> PPNet:
    return PPNet(
        prior_width=len(layout.columns_of("user", "item", "author")),
        embedding_width=layout.width if config.ppnet_input == "prior_and_embedding" else 0,
        input_width=first_width(layout, config=config),
        num_tasks=num_tasks,
        tower_widths=config.tower_widths,
        gate_hidden=config.gate_hidden,
        gamma=config.gate_gamma,
        seen_gradient=config.gate_input_gradient,
    )


def multi_task_loss(logits_BT: Tensor, *, labels_BT: Tensor, known_BT: Tensor, weight_T: Tensor) -> Tensor:
    """Binary cross-entropy summed over impressions and tasks; unknown labels add nothing.

    A sum, not a mean: summed gradients mean the same on any number of ranks.
    """
    loss_BT = nn.functional.binary_cross_entropy_with_logits(logits_BT, labels_BT, reduction="none")
    return (loss_BT * known_BT * weight_T).sum()
