"""The number of ranks changes neither what is skipped, nor how tasks are scaled, nor Adam for rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from trainer.checkpoint import Checkpoints
from trainer.collectives import Ranks
from trainer.config import Config, to_toml
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions

NUM_BATCHES = 8
HERE = Path(__file__).parent


def assert_adams_rows_are_one_ranks(
    config: Config, *, ranks: Ranks, batches: list[Impressions], directory: Path
) -> None:
    config = replace(config, optimizer=replace(config.optimizer, embedding="adam"))
    one = Recommender(config, ranks=ranks)
    for batch in batches:
        one.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
    shard = one.shards["dim16"]
    num = 0
    for rank in (0, 1):
        with np.load(directory / f"adam{rank}.npz") as found:
            slots_N = shard.ids.lookup(found["keys"])
            assert (slots_N >= 0).all()
            # Adam moves by about its rate whatever the gradient: where that is 0 but for rounding, it may
            # move either way.
            gap_ND = np.abs(found["rows"] - shard.rows.rows_CD[slots_N].numpy())
            num += len(slots_N)
        assert np.quantile(gap_ND, 0.99) < 1e-5
        assert gap_ND.max() <= 2 * len(batches) * config.optimizer.embedding_adam_learning_rate
    assert num == shard.ids.num_rows > 100


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_batch_that_is_bad_on_one_of_two_ranks_is_skipped_by_both_as_one_rank_would(
    ranks: Ranks,
    make_config: Callable[..., Config],
    make_batches: Callable[..., list[Impressions]],
    tmp_path: Path,
) -> None:
    """Batch 2 has no labels that are numbers in rank 1's part."""
    config = make_config(batch_size=64)
    config = replace(config, train=replace(config.train, task_scaling="by_positives"))
    (tmp_path / "config.toml").write_text(to_toml(config))
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(HERE / "two_ranks_guard.py"), str(tmp_path / "config.toml"), str(tmp_path / "checkpoints")),
        str(NUM_BATCHES),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_adams_rows_are_one_ranks(config, ranks=ranks, batches=make_batches(config, 5), directory=tmp_path)

    one, two = Recommender(config, ranks=ranks), Recommender(config, ranks=ranks)
    for index, batch in enumerate(make_batches(config, NUM_BATCHES)):
        mapped = one.map(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
        if index == 2:
            for table in mapped.tables:
                one._apply_map(table)
            continue
        assert not one.learn(mapped).not_finite
    assert one.task_rates is not None
    assert two.task_rates is not None
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"), config=config, ranks=ranks)
    assert checkpoints.restore(two, parts={"task_rates": two.task_rates}) is not None
    checkpoints.close()
    np.testing.assert_array_equal(two.task_rates.scales(), one.task_rates.scales())
    assert one.task_rates.scales().max() > 20
    for (name, expected), (_, found) in zip(
        one.dense.named_parameters(), two.dense.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3, msg=name)
    mine, theirs = one.shards["dim16"], two.shards["dim16"]
    held = mine.ids.rows()
    slots_N = theirs.ids.lookup(held.keys_N)
    torch.testing.assert_close(
        theirs.rows.rows_CD[slots_N], mine.rows.rows_CD[held.slots_N], atol=5e-4, rtol=1e-2
    )
