"""Run by torchrun in test_ranks.py: two ranks train one stream and save a checkpoint.

torchrun --nproc-per-node 2 two_ranks.py CONFIG_TOML CHECKPOINT_DIR NUM_BATCHES
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trainer.checkpoint import Checkpoints, Progress
from trainer.collectives import start_ranks
from trainer.config import load_config
from trainer.data.synthetic import SyntheticStream
from trainer.metrics import QualityWindow
from trainer.recommender import Recommender
from trainer.stream.columns import Position
from trainer.stream.slicing import slice_impressions


def main(config_path: str, checkpoint_dir: str, num_batches: str) -> None:
    torch.set_num_threads(1)
    config = load_config(Path(config_path))
    ranks = start_ranks()
    assert ranks.gather_bytes(bytes([ranks.rank]) * (ranks.rank * 5)) == [b"", b"\1" * 5]
    assert ranks.sum(np.array([1, ranks.rank])).tolist() == [2, 1]
    assert ranks.gather(np.array([-5, ranks.rank])).tolist() == [[-5, 0], [-5, 1]]

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
    committed = checkpoints.save(
        recommender,
        parts={"window": window},
        progress=Progress(step=1, dead_letters={"unknown_domain": 1 + ranks.rank}),
        positions=[Position("impressions", ranks.rank, 10 + ranks.rank, 0)],
    )
    assert committed is not None
    assert committed.positions[0].partition == ranks.rank
    checkpoints.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
