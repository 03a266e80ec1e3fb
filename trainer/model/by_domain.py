"""Networks of which each impression passes one: its domain's.

The batch is sorted by domain and cut, so that each network computes its own impressions and no others. A
program for serving has no such cuts, which depend on the data: there every network computes the whole batch,
and each impression's own answer is picked.

Shapes: B batch, D domains; ... whatever else a network's input or output has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def through_own_domain(networks_D: nn.ModuleList, x_B: Tensor, domain_B: Tensor | None) -> Tensor:
    """Each impression's answer of the network of its domain.

    Args: networks_D: from [B', ...] to [B', ...], also of no impression at all. x_B: float [B, ...].
        domain_B: int64 [B], in [0, D); None is refused.
    Returns: float [B, ...].
    """
    known_B = given(domain_B)
    if torch.compiler.is_exporting():
        return _picked(networks_D, x_B, known_B)
    order_B = torch.argsort(known_B, stable=True)
    counts = torch.bincount(known_B, minlength=len(networks_D)).tolist()
    parts = x_B.index_select(0, order_B).split(counts)  # type: ignore[no-untyped-call]
    answers_B = torch.cat([network(part) for network, part in zip(networks_D, parts, strict=True)])
    return answers_B.index_select(0, torch.argsort(order_B))


def _picked(networks_D: nn.ModuleList, x_B: Tensor, domain_B: Tensor) -> Tensor:
    answer_B: Tensor = networks_D[0](x_B)
    for domain, network in enumerate(networks_D[1:], start=1):
        own_B = (domain_B == domain).view(-1, *[1] * (answer_B.ndim - 1))
        answer_B = torch.where(own_B, network(x_B), answer_B)
    return answer_B


def given(domain_B: Tensor | None) -> Tensor:
    """Raises: ValueError if the caller has not asked `uses_domain` and left the domains out."""
    if domain_B is None:
        raise ValueError("this model reads the domain of each impression: call it with domain_B, int64 [B]")
    return domain_B
