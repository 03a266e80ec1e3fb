"""Adam for rows is torch's lazy Adam, and an evicted row's moments do not outlive it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from trainer.checkpoint import Checkpoints, Progress
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.config.config import OptimizerConfig
from trainer.config.schema import FeatureConfig
from trainer.errors import ConfigError
from trainer.model.layout import FeatureLayout
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions
from trainer.tables import ShardedTables

NUM_SLOTS = 12
LAYOUT = FeatureLayout(
    features=(FeatureConfig(name="tags", class_id=1, dim=4, kind="multi"),),
    starts=(0,),
)


def event_time_s(batch: Impressions) -> int:
    return int(batch.event_time_ms_N.max()) // 1000


def with_adam(config: Config) -> Config:
    return replace(config, optimizer=replace(config.optimizer, embedding="adam"))


def test_rows_move_as_under_torchs_lazy_adam(ranks: Ranks) -> None:
    tables = ShardedTables(
        LAYOUT,
        slots_per_rank={"dim4": NUM_SLOTS},
        optimizer=OptimizerConfig(embedding="adam", embedding_adam_learning_rate=0.01),
        world_size=1,
        device=ranks.device,
    )
    generator = torch.Generator().manual_seed(3)
    local = tables.local["dim4"]
    local.rows_CD.copy_(torch.randn(NUM_SLOTS, 4, generator=generator))
    reference = torch.nn.EmbeddingBag(NUM_SLOTS, 4, mode="sum", sparse=True)
    with torch.no_grad():
        reference.weight.copy_(local.rows_CD)
    adam = torch.optim.SparseAdam(reference.parameters(), lr=0.01)
    for step in range(30):
        # Slots occur twice, and some are missed for many steps.
        slots_L = torch.randint(0, NUM_SLOTS // (1 + step % 3), (10,), generator=generator)
        lengths_FB = np.full((1, 5), 2, np.int32)
        scale_BE = torch.randn(5, 4, generator=generator)
        pooled_BE = tables(slots_L.numpy(), lengths_FB)
        tables.apply(pooled_BE, gradient_BE=scale_BE, touched={"dim4": slots_L.numpy()})
        adam.zero_grad()
        # A batch row is the mean of its two slots.
        (reference(slots_L.reshape(5, 2)) / 2 * scale_BE).sum().backward()
        adam.step()
        torch.testing.assert_close(local.rows_CD, reference.weight.detach(), atol=1e-6, rtol=1e-5)
    state = adam.state[reference.weight]
    torch.testing.assert_close(local.states[0], state["exp_avg"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(local.states[1], state["exp_avg_sq"], atol=1e-6, rtol=1e-4)


def test_a_slots_next_owner_begins_without_moments_and_the_budget_counts_them(
    ranks: Ranks,
    make_config: Callable[..., Config],
    make_batches: Callable[..., list[Impressions]],
) -> None:
    plain = make_config(bytes_limit=256 << 10, batch_size=16)
    config = with_adam(plain)
    recommender = Recommender(config, ranks=ranks)
    shard = recommender.shards["dim16"]
    assert shard.bytes_used <= config.tables[0].bytes_limit
    assert shard.slots_per_rank < Recommender(plain, ranks=ranks).shards["dim16"].slots_per_rank * 2 / 3
    num_new = 0
    for batch in make_batches(config, 60):
        mapped = recommender.map(batch, now_s=event_time_s(batch))
        new_M = torch.from_numpy(mapped.tables[0].owned.new_slots_M)
        num_new += int((shard.rows.states[1][new_M].abs().sum(1) > 0).sum())
        assert not recommender.learn(mapped).not_finite
        # After one gradient g: first = 0.1 g, second = 0.001 g^2. Anything remembered would show.
        first_MD, second_MD = (state[new_M] for state in shard.rows.states)
        torch.testing.assert_close(second_MD, first_MD**2 / 10, rtol=1e-4, atol=1e-12)
    assert num_new > 100, "slots that had moments before"
    assert shard.ids.counters().evicted["score"] > 100


def test_adam_learns_and_its_state_is_refused_by_a_checkpoint(
    ranks: Ranks,
    make_config: Callable[..., Config],
    make_batches: Callable[..., list[Impressions]],
    tmp_path: Path,
) -> None:
    config = with_adam(make_config())
    recommender = Recommender(config, ranks=ranks)
    batch = make_batches(config, 1)[0]
    found = []
    for _ in range(40):
        scores_NT = recommender.train(batch, now_s=event_time_s(batch)).astype(np.float64)
        right_NT = np.where(batch.labels_NT > 0, scores_NT, 1 - scores_NT)
        found.append(-np.log(right_NT[batch.known_NT]).mean())
    assert found[-1] < 0.7 * found[0]
    checkpoints = Checkpoints(str(tmp_path), config=config, ranks=ranks)
    with pytest.raises(ConfigError, match=r"optimizer.embedding = 'adam' is for comparisons"):
        checkpoints.save(recommender, parts={}, progress=Progress(), positions=[])
    checkpoints.close()
