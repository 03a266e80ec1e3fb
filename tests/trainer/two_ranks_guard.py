"""Run by torchrun in test_ranks_guard.py: a batch that is not finite on one rank is skipped by both, and Adam
for rows.

torchrun --nproc-per-node 2 two_ranks_guard.py CONFIG_TOML CHECKPOINT_DIR NUM_BATCHES
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from msgspec.structs import replace as replace_fields

from trainer.checkpoint import Checkpoints, Progress
from trainer.checkpoint.capture import StateCopier, StateCopy
from trainer.collectives import Ranks, start_ranks
from trainer.config import Config, load_config
from trainer.data.synthetic import SyntheticStream
from trainer.recommender import Recommender
from trainer.stream.columns import Position
from trainer.stream.slicing import slice_impressions


def assert_same(before: StateCopy, after: StateCopy) -> None:
    """Every dense number, and the optimizer's state of all rows together."""
    assert before.dense is not None
    assert after.dense is not None
    for name, value in before.dense.items():
        np.testing.assert_array_equal(after.dense[name], value, err_msg=name)
    (old,), (new,) = before.tables, after.tables
    assert new.state_N.sum(dtype=np.float64) == old.state_N.sum(dtype=np.float64) > 0
    assert np.isfinite(new.rows_ND).all()


def train_with_adam(config: Config, *, ranks: Ranks, path: Path) -> None:
    """The rows of this rank after five steps of Adam for rows: keys [N] and rows [N, D]."""
    config = replace_fields(config, optimizer=replace_fields(config.optimizer, embedding="adam"))
    recommender = Recommender(config, ranks=ranks)
    stream = SyntheticStream(config).batches(config.train.batch_size)
    rows = recommender.batch_rows
    for _ in range(5):
        batch = next(stream)[0]
        mine = slice_impressions(batch, ranks.rank * rows, (ranks.rank + 1) * rows)
        recommender.train(mine, now_s=int(batch.event_time_ms_N.max()) // 1000)
    shard = recommender.shards["dim16"]
    held = shard.ids.rows()
    np.savez(path, keys=held.keys_N, rows=shard.rows.rows_CD[held.slots_N].numpy())


def main(config_path: str, checkpoint_dir: str, num_batches: str) -> None:
    torch.set_num_threads(1)
    config = load_config(Path(config_path))
    ranks = start_ranks()
    train_with_adam(config, ranks=ranks, path=Path(config_path).with_name(f"adam{ranks.rank}.npz"))
    recommender = Recommender(config, ranks=ranks)
    assert recommender.task_rates is not None
    stream = SyntheticStream(config).batches(config.train.batch_size)
    rows = recommender.batch_rows
    for index in range(int(num_batches)):
        batch = next(stream)[0]
        now_s = int(batch.event_time_ms_N.max()) // 1000
        mine = slice_impressions(batch, ranks.rank * rows, (ranks.rank + 1) * rows)
        if index != 2:
            assert not recommender.learn(recommender.map(mine, now_s=now_s)).not_finite
            continue
        if ranks.rank == 1:
            mine = replace(mine, labels_NT=np.full_like(mine.labels_NT, np.nan))
        before = StateCopier().copy(recommender, parts={}, with_dense=True)
        learned = recommender.learn(recommender.map(mine, now_s=now_s))
        expected = ("gradient of the dense model, or another rank's part", "loss")
        assert learned.not_finite == expected[ranks.rank]
        assert np.isfinite(learned.probabilities_NT).all()
        assert_same(before, StateCopier().copy(recommender, parts={}, with_dense=True))
    assert len(set(ranks.gather_bytes(recommender.task_rates.scales().tobytes()))) == 1
    checkpoints = Checkpoints(checkpoint_dir, config=config, ranks=ranks)
    checkpoints.save(
        recommender,
        parts={"task_rates": recommender.task_rates},
        progress=Progress(step=int(num_batches)),
        positions=[Position("impressions", ranks.rank, 1, 0)],
    )
    checkpoints.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
