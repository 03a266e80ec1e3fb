"""Run by torchrun in test_ranks.py: two ranks train, save a checkpoint, restore it and one of one rank.

torchrun --nproc-per-node 2 two_ranks.py CONFIG_TOML CHECKPOINT_DIR NUM_BATCHES ONE_RANK_CHECKPOINT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from feature_eviction import owner_of
from trainer.checkpoint import Checkpoints, Progress
from trainer.checkpoint.folders import list_folders, read_manifest
from trainer.checkpoint.restore import SavedState
from trainer.checkpoint.store import LocalStore, open_store
from trainer.collectives import Ranks, start_ranks
from trainer.config import load_config
from trainer.data.synthetic import SyntheticStream
from trainer.errors import CheckpointError, StoreError
from trainer.metrics import QualityWindow
from trainer.publish.quality_gate import joint_auc
from trainer.recommender import Recommender
from trainer.stream.columns import Position
from trainer.stream.slicing import slice_impressions


def no_space(store: LocalStore, name: str, data: bytes, *, inside: str = "") -> None:
    raise StoreError(f"{name}: no space at rank 1")


def assert_rows_restored(recommender: Recommender, checkpoint_dir: str, *, ranks: Ranks) -> None:
    """This rank holds every row of the checkpoint that it owns, and no other."""
    store = open_store(checkpoint_dir)
    folder = list_folders(store).committed[-1]
    saved = SavedState(store, folder, read_manifest(store, folder))
    shard = recommender.shards["dim16"]
    num_rows = 0
    for segment in saved.segments("dim16"):
        own_N = owner_of(segment.ids_N, num_owners=ranks.world_size) == ranks.rank
        slots_N = shard.ids.lookup(segment.ids_N)
        np.testing.assert_array_equal(slots_N >= 0, own_N)
        np.testing.assert_array_equal(shard.rows.rows_CD[slots_N[own_N]].numpy(), segment.rows_ND[own_N])
        np.testing.assert_array_equal(shard.rows.state_C[slots_N[own_N]].numpy(), segment.state_N[own_N])
        num_rows += int(own_N.sum())
    assert num_rows == shard.ids.num_rows > 100


def assert_gate_says_the_same(ranks: Ranks) -> None:
    """Each rank has seen other impressions; all judge by those of both, to the last bit."""
    window = QualityWindow(domains=("a", "b"), tasks=["click"], window=100)
    rng = np.random.default_rng(ranks.rank)
    labels_NT = (rng.random((50, 1)) < 0.3).astype(np.float32)
    window.add(
        rng.random((50, 1)) + (0.5 - ranks.rank) * labels_NT,
        labels_NT=labels_NT,
        known_NT=np.ones((50, 1), np.bool_),
        domain_N=np.full(50, ranks.rank),
        users_N=np.zeros(50, np.int64),
    )
    value = joint_auc(window, task="click", num_min=100, ranks=ranks)
    assert value is not None
    assert 0.2 < value < 0.8
    assert len(set(ranks.gather_bytes(repr(value).encode()))) == 1


def main(config_path: str, checkpoint_dir: str, num_batches: str, one_rank_dir: str) -> None:
    torch.set_num_threads(1)
    config = load_config(Path(config_path))
    ranks = start_ranks()
    assert ranks.gather_bytes(bytes([ranks.rank]) * (ranks.rank * 5)) == [b"", b"\1" * 5]
    assert ranks.sum(np.array([1, ranks.rank])).tolist() == [2, 1]
    assert ranks.gather(np.array([-5, ranks.rank])).tolist() == [[-5, 0], [-5, 1]]

    assert_gate_says_the_same(ranks)
    recommender = Recommender(config, ranks=ranks)
    stream = SyntheticStream(config).batches(config.train.batch_size)
    rows = recommender.batch_rows
    for _ in range(int(num_batches)):
        batch = next(stream)[0]
        now_s = int(batch.event_time_ms_N.max()) // 1000
        mine = slice_impressions(batch, ranks.rank * rows, (ranks.rank + 1) * rows)
        recommender.train(mine, now_s=now_s)
    # A rank without data takes part with an empty batch.
    last = next(stream)[0]
    empty = slice_impressions(last, 0, 0)
    now_s = int(last.event_time_ms_N.max()) // 1000
    recommender.train(slice_impressions(last, 0, rows) if ranks.rank == 0 else empty, now_s=now_s)

    window = QualityWindow(domains=config.schema.domains, tasks=config.schema.task_names, window=100)
    checkpoints = Checkpoints(checkpoint_dir, config=config, ranks=ranks)
    write = LocalStore.write
    if ranks.rank == 1:
        LocalStore.write = no_space  # type: ignore[method-assign]
    # Every rank learns what happened on one.
    with pytest.raises(CheckpointError, match="no space at rank 1"):
        checkpoints.save(recommender, parts={"window": window}, progress=Progress(step=1), positions=[])
    LocalStore.write = write  # type: ignore[method-assign]
    committed = checkpoints.save(
        recommender,
        parts={"window": window},
        progress=Progress(step=1, dead_letters={"unknown_domain": 1 + ranks.rank}),
        positions=[Position("impressions", ranks.rank, 10 + ranks.rank, 0)],
    )
    assert committed is not None
    assert committed.positions[0].partition == ranks.rank
    again = Recommender(config, ranks=ranks)
    restored = checkpoints.restore(again, parts={"window": window})
    assert restored is not None
    assert [position.partition for position in restored.positions] == [0, 1]
    assert_rows_restored(again, checkpoint_dir, ranks=ranks)
    rows, rows2 = (one.shards["dim16"].ids.rows() for one in (recommender, again))
    np.testing.assert_array_equal(rows.slots_N, rows2.slots_N, err_msg="slot for slot")
    checkpoints.close()

    checkpoints = Checkpoints(one_rank_dir, config=config, ranks=ranks)
    from_one = Recommender(config, ranks=ranks)
    restored = checkpoints.restore(from_one, parts={"window": window})
    assert restored is not None
    assert restored.progress.dead_letters == ({"unknown_domain": 5} if ranks.rank == 0 else {})
    assert_rows_restored(from_one, one_rank_dir, ranks=ranks)
    checkpoints.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
