"""Warm-up: the share that each step takes, and what it does to a dense step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from msgspec.structs import replace

from trainer.collectives import Ranks
from trainer.config import Config
from trainer.config.config import TrainConfig
from trainer.learning_rate import WarmUp
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions

When = Literal["start", "resume", "both"]


def shares(when: When, *, resumed_at: int | None, first: int, num: int = 6) -> list[float]:
    warm_up = WarmUp(TrainConfig(warm_up=when, warm_up_steps=4), resumed_at=resumed_at)
    return [warm_up.share(step) for step in range(first, first + num)]


RISING = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
FULL = [1.0] * 6


@pytest.mark.parametrize(("when", "expected"), [("start", RISING), ("both", RISING), ("resume", FULL)])
def test_a_fresh_model(when: When, expected: list[float]) -> None:
    assert shares(when, resumed_at=None, first=0) == expected


@pytest.mark.parametrize(("when", "expected"), [("start", FULL), ("both", RISING), ("resume", RISING)])
def test_a_model_that_is_resumed_long_after_its_start(when: When, expected: list[float]) -> None:
    assert shares(when, resumed_at=1_000, first=1_000) == expected


def test_a_kill_in_the_middle_of_the_start_changes_nothing_and_in_both_begins_anew() -> None:
    assert shares("start", resumed_at=2, first=2) == [*RISING[2:], 1.0, 1.0]
    assert shares("both", resumed_at=2, first=2) == RISING


def test_no_steps_are_no_warm_up() -> None:
    assert WarmUp(TrainConfig(), resumed_at=None).share(0) == 1.0


def test_an_imported_model_of_step_0_warms_up_either_way() -> None:
    for when in ("start", "resume", "both"):
        assert shares(when, resumed_at=0, first=0) == RISING


def test_a_share_scales_the_dense_step_and_leaves_the_rows_step_alone(
    ranks: Ranks, make_config: Callable[..., Config], make_batches: Callable[..., list[Impressions]]
) -> None:
    """Adam's first step moves a weight by its rate, whatever the gradient."""
    config = make_config()
    config = replace(config, optimizer=replace(config.optimizer, dense_learning_rate=1e-2))
    batch = make_batches(config, 1)[0]
    moved, rows = {}, {}
    for share in (1.0, 0.25):
        recommender = Recommender(config, ranks=ranks)
        before = [parameter.detach().clone() for parameter in recommender.dense.parameters()]
        mapped = recommender.map(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
        recommender.learn(mapped, dense_rate_share=share)
        parameters = list(recommender.dense.parameters())
        moved[share] = torch.cat(
            [(new.detach() - old).flatten() for new, old in zip(parameters, before, strict=True)]
        )
        rows[share] = recommender.shards["dim16"].rows.rows_CD.clone()
    assert moved[1.0].abs().max() == pytest.approx(1e-2, rel=1e-3)
    torch.testing.assert_close(moved[0.25], 0.25 * moved[1.0], atol=1e-7, rtol=1e-4)
    assert torch.equal(rows[1.0], rows[0.25])
