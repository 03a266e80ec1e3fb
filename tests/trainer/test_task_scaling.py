"""Scaling by positives against its formula written out, and its memory of the stream."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from trainer.collectives import Ranks
from trainer.config import Config
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions
from trainer.task_scaling import WINDOW, TaskRates


def event_time_s(batch: Impressions) -> int:
    return int(batch.event_time_ms_N.max()) // 1000


def test_the_scale_is_one_over_the_rate_of_what_was_counted() -> None:
    rates = TaskRates(3)
    assert rates.scales().tolist() == [2.0, 2.0, 2.0]
    rates.add(np.array([498.0, 0.0, 99.0]), np.array([1000.0, 1000.0, 198.0]))
    rates.add(np.array([1.0, 0.0, 0.0]), np.array([0.0, 998.0, 0.0]))
    np.testing.assert_allclose(rates.scales(), [1002 / 500, 2000.0, 2.0])


def test_a_stream_that_changes_is_followed_within_a_window() -> None:
    rates = TaskRates(1)
    for _ in range(3 * WINDOW // 50_000):
        rates.add(np.array([500.0]), np.array([50_000.0]))
    assert rates.scales()[0] == pytest.approx(100, rel=1e-3)
    assert rates.columns()["known"][0] == WINDOW
    for _ in range(5 * WINDOW // 50_000):
        rates.add(np.array([25_000.0]), np.array([50_000.0]))
    assert rates.scales()[0] == pytest.approx(2, rel=0.02)


def test_what_was_counted_comes_back_on_any_number_of_ranks() -> None:
    rates, again = TaskRates(2), TaskRates(2)
    rates.add(np.array([3.0, 4.0]), np.array([50.0, 60.0]))
    again.restore([rates.columns()], rank=1, world_size=2)
    np.testing.assert_array_equal(again.scales(), rates.scales())
    with pytest.raises(ValueError, match=r"task rates: 'known': expected float64 \[2\], found nothing"):
        again.restore([{"positives": np.zeros(2)}], rank=0, world_size=1)


def test_each_tasks_loss_counts_its_weight_over_its_running_rate(
    ranks: Ranks, make_config: Callable[..., Config], make_batches: Callable[..., list[Impressions]]
) -> None:
    """The gradient of a whole step, from sums over the batches before it written out with numpy."""
    config = make_config()
    tasks = tuple(replace(task, loss_weight=0.5 + index) for index, task in enumerate(config.schema.tasks))
    config = replace(
        config,
        schema=replace(config.schema, tasks=tasks),
        train=replace(config.train, task_scaling="by_positives"),
    )
    batches = make_batches(config, 6)
    recommender = Recommender(config, ranks=ranks)
    for batch in batches[:5]:
        recommender.train(batch, now_s=event_time_s(batch))
    known_T = sum(batch.known_NT.sum(0) for batch in batches[:5])
    positives_T = sum((batch.labels_NT * batch.known_NT).sum(0) for batch in batches[:5])
    weight_T = (0.5 + np.arange(len(tasks))) * (known_T + 2) / (positives_T + 1)
    assert weight_T.max() > 20 * weight_T.min(), "tasks that do not differ would prove nothing"

    last = batches[5]
    gradients = {}

    def remember(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients["found"] = [
            parameter.grad.clone()
            for parameter in recommender.dense.parameters()
            if parameter.grad is not None
        ]

    recommender.dense_optimizer.register_step_pre_hook(remember)
    mapped = recommender.map(last, now_s=event_time_s(last))
    for table in mapped.tables:
        recommender._apply_map(table)
    embedding_BE = recommender.embeddings(mapped.tables[0].slots_L, mapped.tables[0].lengths_FB).detach()
    logits_BT = recommender._logits(embedding_BE, None)
    labels_BT = torch.from_numpy(last.labels_NT)
    each_BT = torch.nn.functional.softplus(logits_BT) - labels_BT * logits_BT
    known_BT = torch.from_numpy(last.known_NT.astype(np.float32))
    loss = (each_BT * known_BT * torch.from_numpy(weight_T.astype(np.float32))).sum()
    expected = torch.autograd.grad(loss, list(recommender.dense.parameters()))
    recommender.learn(mapped)
    for found, wanted in zip(gradients["found"], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
