"""The sharded tables against means written out, where features have different dims and numbers of ids."""

from __future__ import annotations

import numpy as np
import torch

from trainer.collectives import Ranks
from trainer.config.config import OptimizerConfig
from trainer.config.schema import FeatureConfig
from trainer.model.layout import FeatureLayout
from trainer.tables import ShardedTables

LAYOUT = FeatureLayout(
    features=(
        FeatureConfig(name="tags", class_id=1, dim=4, kind="multi"),
        FeatureConfig(name="item", class_id=2, dim=4),
        FeatureConfig(name="user", class_id=3, dim=8),
    ),
    starts=(0, 4, 8),
)
LENGTHS_FB = np.array([[3, 0], [1, 1], [1, 0]], np.int32)
SLOTS_L = np.array([5, 6, 5, 1, 2, 7])
"""tags 5, 6, 5 and none; items 1 and 2; user 7 and none."""


def tables(ranks: Ranks) -> ShardedTables:
    made = ShardedTables(
        LAYOUT,
        slots_per_rank={"dim4": 10, "dim8": 10},
        optimizer=OptimizerConfig(embedding_learning_rate=0.5),
        world_size=1,
        device=ranks.device,
    )
    for local in made.local.values():
        local.rows_CD.copy_(torch.arange(local.rows_CD.numel()).reshape(local.rows_CD.shape) / 10)
    return made


def test_an_embedding_is_the_mean_of_its_ids_and_zero_without_any(ranks: Ranks) -> None:
    made = tables(ranks)
    four_CD, eight_CD = made.local["dim4"].rows_CD.clone(), made.local["dim8"].rows_CD.clone()
    none = torch.zeros(8)
    expected_BE = torch.stack(
        [
            torch.cat([(2 * four_CD[5] + four_CD[6]) / 3, four_CD[1], eight_CD[7]]),
            torch.cat([none[:4], four_CD[2], none]),
        ]
    )
    torch.testing.assert_close(made(SLOTS_L, LENGTHS_FB).detach(), expected_BE)


def test_each_id_learns_its_share_of_the_mean(ranks: Ranks) -> None:
    """Row-wise AdaGrad moves a row that has no state yet by its gradient over the gradient's mean square."""
    made = tables(ranks)
    before_CD = made.local["dim4"].rows_CD.clone()
    made(SLOTS_L, LENGTHS_FB).sum().backward()
    state_C = made.local["dim4"].state_C
    expected_C = torch.zeros(10)
    expected_C[[5, 6, 1, 2]] = torch.tensor([2 / 3, 1 / 3, 1.0, 1.0]) ** 2
    torch.testing.assert_close(state_C, expected_C)
    moved_C = (before_CD - made.local["dim4"].rows_CD)[:, 0]
    torch.testing.assert_close(moved_C, torch.where(expected_C > 0, 0.5, 0.0), atol=1e-5, rtol=1e-5)
