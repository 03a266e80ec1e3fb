"""Networks of which each impression passes its domain's: SharedTop, SpecificTop, SpecificAll."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.trainer.model.equations import BATCH, NUM_TASKS, Built, bottom, tower_logit
from trainer.model.by_domain import through_own_domain

PARTS = {
    "shared_top": ("bottoms.{}", "towers"),
    "specific_top": ("bottom", "tops.{}"),
    "specific_all": ("networks.{}.bottom", "networks.{}.towers"),
}
"""Where each model keeps the bottom f and the tower h of a domain."""


@pytest.mark.parametrize("name", sorted(PARTS))
def test_model_equals_its_equations_impression_by_impression(name: str) -> None:
    built = Built(name)
    w, (bottom_name, tower_name) = built.weights, PARTS[name]
    expected = np.zeros((BATCH, NUM_TASKS))
    for row, domain in enumerate(built.domain_B.tolist()):
        f = bottom(built.e[[row]], w, bottom_name.format(domain))
        for task in range(NUM_TASKS):
            expected[row, task] = tower_logit(f, w, tower_name.format(domain), task)[0]
    built.assert_logits(expected)


@pytest.mark.parametrize("name", [*sorted(PARTS), "ple_md"])
def test_other_domains_impressions_change_no_answer(name: str) -> None:
    built = Built(name)
    together = built.model(built.embedding_BE, built.domain_B)
    for domain in range(3):
        mine = built.domain_B == domain
        alone = built.model(built.embedding_BE[mine], built.domain_B[mine])
        torch.testing.assert_close(alone, together[mine], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*sorted(PARTS), "ple_md"])
def test_a_domain_without_impressions_has_zero_gradients(name: str) -> None:
    """Every rank must bring a gradient for every parameter, whatever its part of the batch holds."""
    built = Built(name)
    built.model(built.embedding_BE, torch.ones(BATCH, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None for p in built.model.parameters())
    empty = built.model(built.embedding_BE[:0], built.domain_B[:0])
    assert empty.shape == (0, NUM_TASKS)


@pytest.mark.parametrize("name", [*sorted(PARTS), "ple_md"])
def test_a_model_that_reads_the_domain_says_so_and_asks_for_it(name: str) -> None:
    built = Built(name)
    assert built.model.uses_domain is True
    with pytest.raises(ValueError, match="call it with domain_B"):
        built.model(built.embedding_BE)


def test_impressions_come_back_in_their_order() -> None:
    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    networks = nn.ModuleList(Times(factor) for factor in (1.0, 10.0, 100.0))
    domain_B = torch.tensor([2, 0, 1, 0, 2])
    answers = through_own_domain(networks, torch.arange(1.0, 6.0).unsqueeze(1), domain_B)
    assert answers.flatten().tolist() == [100.0, 2.0, 30.0, 4.0, 500.0]
