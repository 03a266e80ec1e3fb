"""EPNet alone and PPNet alone, and each or both of them on MMoE: what PEPNet plugs onto other networks.

EPNet gives the network its domain's view O_ep of the embedding (equations 5 and 6); without EPNet the network
gets E, and PPNet's gates see E where equation 7 has O_ep. PPNet gates the layers of the network (equations 7
to 9); without PPNet they are plain ReLU layers.
Source: arXiv 2302.01115; "plug-and-play", and the ablations without EPNet and without PPNet.

Shapes: B batch, E embedding, T tasks.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.layout import FeatureLayout, columns_in
from trainer.model.mmoe import MixtureTowers
from trainer.model.pepnet import (
    domain_runs_of,
    epnet_for,
    first_hidden_for,
    first_input,
    first_width,
    ppnet_for,
    prior_runs_of,
)
from trainer.model.ppnet_mmoe import ppnet_mmoe_for
from trainer.model.towers import LogitTowers


class EPNetAlone(nn.Module):
    """EPNet below plain task towers, or below an MMoE."""

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, config: ModelConfig, mmoe: bool = False
    ) -> None:
        """Raises: ConfigError if the schema lacks a domain feature."""
        super().__init__()
        self.domain_runs = domain_runs_of(layout)
        self.epnet = epnet_for(layout, config=config)
        self.first_hidden = first_hidden_for(layout, config=config)
        width = first_width(layout, config=config)
        self.towers = (
            MixtureTowers(width_in=width, num_tasks=num_tasks, config=config)
            if mmoe
            else LogitTowers(num_towers=num_tasks, widths=(width, *config.tower_widths))
        )

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        domain_view_BE = self.epnet(columns_in(embedding_BE, self.domain_runs), embedding_BE)
        logits_BT: Tensor = self.towers(first_input(domain_view_BE, self.first_hidden))
        return logits_BT


class PPNetAlone(nn.Module):
    """PPNet on the embedding as it is, with task towers or an MMoE."""

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, config: ModelConfig, mmoe: bool = False
    ) -> None:
        """Raises: ConfigError if the schema lacks any user, item or author feature."""
        super().__init__()
        self.prior_runs = prior_runs_of(layout)
        self.first_hidden = first_hidden_for(layout, config=config)
        self.ppnet = (ppnet_mmoe_for if mmoe else ppnet_for)(layout, num_tasks=num_tasks, config=config)

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        prior_BP = columns_in(embedding_BE, self.prior_runs)
        h_BI = first_input(embedding_BE, self.first_hidden)
        logits_BT: Tensor = self.ppnet(prior_BP, embedding_BE, h_BI)
        return logits_BT


class PEPNetMMoE(nn.Module):
    """EPNet below an MMoE whose layers PPNet gates."""

    def __init__(self, layout: FeatureLayout, *, num_tasks: int, config: ModelConfig) -> None:
        """Raises: ConfigError if the schema lacks a domain feature, or any user, item or author feature."""
        super().__init__()
        self.domain_runs = domain_runs_of(layout)
        self.prior_runs = prior_runs_of(layout)
        self.epnet = epnet_for(layout, config=config)
        self.first_hidden = first_hidden_for(layout, config=config)
        self.ppnet = ppnet_mmoe_for(layout, num_tasks=num_tasks, config=config)

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        domain_view_BE = self.epnet(columns_in(embedding_BE, self.domain_runs), embedding_BE)
        prior_BP = columns_in(embedding_BE, self.prior_runs)
        h_BI = first_input(domain_view_BE, self.first_hidden)
        logits_BT: Tensor = self.ppnet(prior_BP, domain_view_BE, h_BI)
        return logits_BT
