"""The number of ranks does not change what is learned."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from feature_eviction import owner_of
from trainer.checkpoint import Checkpoints, Progress
from trainer.collectives import Ranks
from trainer.config import Config, to_toml
from trainer.metrics import QualityWindow
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions, Position
from trainer.stream.slicing import slice_impressions

NUM_BATCHES = 15
HERE = Path(__file__).parent


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "model",
    [
        {},
        # What a rank must not do twice, and what it must know of its own impressions.
        pytest.param({"name": "ple_md", "l2": 1e-3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_learn_what_one_rank_learns(
    ranks: Ranks,
    make_config: Callable[..., Config],
    make_batches: Callable[..., list[Impressions]],
    tmp_path: Path,
    model: dict[str, Any],
) -> None:
    """Within float32's reordering of sums; and one rank restores what two have saved, two what one has."""
    config = make_config(batch_size=64)
    config = replace(config, model=replace(config.model, **model))
    one_rank_dir = str(tmp_path / "one-rank")
    before = Recommender(config, ranks=ranks)
    for batch in make_batches(config, 5):
        before.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
    window = QualityWindow(domains=config.schema.domains, tasks=config.schema.task_names, window=100)
    checkpoints = Checkpoints(one_rank_dir, config=config, ranks=ranks)
    checkpoints.save(
        before,
        parts={"window": window},
        progress=Progress(step=5, dead_letters={"unknown_domain": 5}),
        positions=[],
    )
    checkpoints.close()
    (tmp_path / "config.toml").write_text(to_toml(config))
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(HERE / "two_ranks.py"), str(tmp_path / "config.toml"), str(tmp_path / "checkpoints")),
        *(str(NUM_BATCHES), one_rank_dir),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    one = Recommender(config, ranks=ranks)
    *batches, last = make_batches(config, NUM_BATCHES + 1)
    for batch in batches:
        one.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
    one.train(slice_impressions(last, 0, 32), now_s=int(last.event_time_ms_N.max()) // 1000)

    two = Recommender(config, ranks=ranks)
    restored = Checkpoints(str(tmp_path / "checkpoints"), config=config, ranks=ranks).restore(
        two, parts={"window": window}
    )
    assert restored is not None
    assert restored.positions == [Position("impressions", 0, 10, 0), Position("impressions", 1, 11, 0)]
    assert restored.progress.dead_letters == {"unknown_domain": 3}
    for (name, expected), (_, found) in zip(
        one.dense.named_parameters(), two.dense.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3, msg=name)
    mine, theirs = one.shards["dim16"], two.shards["dim16"]
    rows = mine.ids.rows()
    slots_N = theirs.ids.lookup(rows.keys_N)
    assert (slots_N >= 0).all()
    assert theirs.ids.num_rows == len(rows.keys_N)
    torch.testing.assert_close(
        theirs.rows.rows_CD[slots_N], mine.rows.rows_CD[rows.slots_N], atol=5e-4, rtol=1e-2
    )
    np.testing.assert_array_equal(theirs.ids.rows(slots_N).updates_N, rows.updates_N)
    np.testing.assert_array_equal(theirs.ids.rows(slots_N).last_seen_s_N, rows.last_seen_s_N)
    np.testing.assert_allclose(theirs.ids.rows(slots_N).scores_N, rows.scores_N, rtol=1e-6)
    owners = owner_of(rows.keys_N, num_owners=2)
    assert 0.4 < owners.mean() < 0.6
