"""L2 regularisation: what is added to the gradient, and of which parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from msgspec.structs import replace

from tests.trainer.model.equations import Built
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.model import MODELS
from trainer.model.l2 import is_bias, parameter_groups
from trainer.recommender import Recommender

NUM = 50


def test_a_step_is_the_gradient_of_the_loss_with_the_penalty_of_each_impression() -> None:
    built, penalised = Built("mmoe"), Built("mmoe")
    l2, rate = 1e-3, 0.01
    optimizer = torch.optim.SGD(parameter_groups(built.model, l2=l2, batch_size=NUM), lr=rate)
    built.model(built.embedding_BE).square().sum().backward()
    optimizer.step()

    weights = [p for name, p in penalised.model.named_parameters() if not is_bias(name)]
    assert 0 < len(weights) < len(list(penalised.model.parameters()))
    penalty = sum(l2 / 2 * weight.square().sum() for weight in weights)
    (penalised.model(penalised.embedding_BE).square().sum() + NUM * penalty).backward()
    for (name, found), expected in zip(
        built.model.named_parameters(), penalised.model.parameters(), strict=True
    ):
        assert expected.grad is not None
        torch.testing.assert_close(found, expected - rate * expected.grad, msg=name)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_parameter_is_in_one_group_and_biases_are_not_regularised(name: str) -> None:
    model = Built(name).model
    groups = parameter_groups(model, l2=1e-5, batch_size=NUM)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    regularised = {id(p) for group in groups if group.get("weight_decay") for p in group["params"]}
    for key, parameter in model.named_parameters():
        # A bias is what begins at zero; weights never do.
        assert (id(parameter) in regularised) == ("bias" not in key), key


def test_without_regularisation_there_is_one_group() -> None:
    model = Built("dcn").model
    (group,) = parameter_groups(model, l2=0.0, batch_size=NUM)
    assert set(group) == {"params"}


def test_the_recommender_regularises_by_its_batch_size(
    ranks: Ranks, make_config: Callable[..., Config]
) -> None:
    config = make_config(batch_size=64)
    config = replace(config, model=replace(config.model, l2=1e-3))
    groups = Recommender(config, ranks=ranks).dense_optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [pytest.approx(0.064), 0]
