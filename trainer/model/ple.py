"""PLE: experts of each group's own beside shared ones, level upon level; its groups are tasks or domains.

At level j group k mixes its own experts and the shared ones, S^(k,j), by a softmax of what it was at the
level below: g^(k,j) = softmax(W_g^(k,j) g^(k,j-1)) S^(k,j), g^(k,0) = x; own experts read g^(k,j-1), shared
ones the shared group's g^(s,j-1), which mixes all experts and ends one level earlier. With one level this is
CGC. A tower reads the last level: y^k = t^k(g^(k,N)). x is the whole concatenated embedding, priors included.
Source: Tang et al., RecSys 2020 (doi 10.1145/3383313.3412236), sections 4.1 (CGC) and 4.2 (PLE).
PLE-MD, a multi-domain baseline of PEPNet (arXiv 2302.01115, section 4.1), is PLE whose groups are the
domains: an impression is answered by its own domain's group, whose tower t^k is here one tower a task.

Shapes: B batch, E embedding, G groups, S shared experts, K experts a gate weighs, I and O widths, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.by_domain import given, through_own_domain
from trainer.model.gate_nu import xavier_uniform
from trainer.model.layout import FeatureLayout
from trainer.model.towers import LogitTowers, Towers


class GroupGates(nn.Module):
    """softmax(W x) of each group, without a bias as in the paper."""

    def __init__(self, *, num_groups: int, width_in: int, num_experts: int) -> None:
        super().__init__()
        self.weight_GIK = nn.Parameter(torch.empty(num_groups, width_in, num_experts))
        xavier_uniform(self.weight_GIK, fan_in=width_in, fan_out=num_experts)

    def forward(self, x_GBI: Tensor) -> Tensor:
        """Returns: each expert's share, float [G, B, K]."""
        return torch.softmax(torch.bmm(x_GBI, self.weight_GIK), dim=2)


class ExtractionLevel(nn.Module):
    """One level: every group's experts, the shared experts, and the gates that mix them."""

    def __init__(self, *, num_groups: int, width_in: int, config: ModelConfig, last: bool) -> None:
        """Args: last: nothing reads the shared group's mix any more, so there is none."""
        super().__init__()
        self.num_groups = num_groups
        self.num_own = config.num_own_experts
        self.num_shared = config.num_experts
        widths = (width_in, *config.bottom_widths)
        self.own = Towers(num_towers=num_groups * self.num_own, widths=widths)
        self.shared = Towers(num_towers=self.num_shared, widths=widths)
        self.gates = GroupGates(
            num_groups=num_groups, width_in=width_in, num_experts=self.num_own + self.num_shared
        )
        self.shared_gate: GroupGates | None = None
        if not last:
            self.shared_gate = GroupGates(
                num_groups=1, width_in=width_in, num_experts=num_groups * self.num_own + self.num_shared
            )

    def forward(self, own_GBI: Tensor, shared_BI: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns: g of every group, float [G, B, O]; of the shared group, float [B, O], None at the last."""
        own_KBO = self.own(own_GBI.repeat_interleave(self.num_own, dim=0))
        shared_SBO = self.shared(shared_BI)
        # A group's own experts lie first among those that its gate weighs.
        of_own_GBK, of_shared_GBS = self.gates(own_GBI).split([self.num_own, self.num_shared], dim=2)
        own_GKBO = own_KBO.unflatten(0, (self.num_groups, self.num_own))
        mixed_GBO = (of_own_GBK.transpose(1, 2).unsqueeze(3) * own_GKBO).sum(dim=1)
        mixed_GBO = mixed_GBO + torch.einsum("gbs,sbo->gbo", of_shared_GBS, shared_SBO)
        if self.shared_gate is None:
            return mixed_GBO, None
        share_BK = self.shared_gate(shared_BI.unsqueeze(0)).squeeze(0)
        shared_BO = torch.einsum("bk,kbo->bo", share_BK, torch.cat([own_KBO, shared_SBO]))
        return mixed_GBO, shared_BO


class Extraction(nn.Module):
    """All levels, from the embedding to the groups' last mixes."""

    def __init__(self, *, num_groups: int, width_in: int, config: ModelConfig) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.levels = nn.ModuleList(
            ExtractionLevel(
                num_groups=num_groups,
                width_in=width_in if level == 0 else config.bottom_widths[-1],
                config=config,
                last=level == config.ple_levels - 1,
            )
            for level in range(config.ple_levels)
        )

    def forward(self, x_BE: Tensor) -> Tensor:
        """Returns: float [G, B, O]."""
        own_GBI, shared_BI = x_BE.expand(self.num_groups, -1, -1), x_BE
        for level in self.levels:
            own_GBI, shared_BI = level(own_GBI, shared_BI)
        return own_GBI


class PLE(nn.Module):
    """A group a task: config.num_own_experts experts each, config.num_experts shared."""

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        super().__init__()
        self.extraction = Extraction(num_groups=num_tasks, width_in=layout.width, config=config)
        widths = (config.bottom_widths[-1], *config.tower_widths)
        self.towers = LogitTowers(num_towers=num_tasks, widths=widths)

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        logits_BT: Tensor = self.towers(self.extraction(embedding_BE))
        return logits_BT


class PLEMultiDomain(nn.Module):
    """A group a domain, with its own towers, one a task."""

    uses_domain = True

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        super().__init__()
        self.extraction = Extraction(num_groups=num_domains, width_in=layout.width, config=config)
        widths = (config.bottom_widths[-1], *config.tower_widths)
        self.tops = nn.ModuleList(
            LogitTowers(num_towers=num_tasks, widths=widths) for _ in range(num_domains)
        )

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        mixed_GBO = self.extraction(embedding_BE)
        # The shared group mixes all domains' experts, so all are computed; the impression's own is then read.
        picked_1BO = given(domain_B).view(1, -1, 1).expand(1, -1, mixed_GBO.shape[2])
        own_BO = mixed_GBO.gather(0, picked_1BO).squeeze(0)
        return through_own_domain(self.tops, own_BO, domain_B)
