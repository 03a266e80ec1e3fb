"""After the warm-up training compiles nothing any more: no impression waits for a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
from msgspec.structs import replace
from numba.core import event
from trainer.collectives import start_ranks
from trainer.config import preset
from trainer.data.synthetic import SyntheticStream
from trainer.recommender import Recommender
from trainer.warm_up import compile_kernels

config = preset("quickstart")
config = replace(config, tables=(replace(config.tables[0], bytes_limit=256 << 10),))
with event.install_recorder("numba:compile") as recorder:
    compile_kernels(config)
    warm_up = len(recorder.buffer)
    recommender = Recommender(config, ranks=start_ranks())
    stream = SyntheticStream(config).batches(256)
    for _ in range(60):
        batch = next(stream)[0]
        recommender.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
    counters = recommender.shards["dim16"].ids.counters()
    assert counters.evicted["score"] > 100, counters
print(warm_up, len(recorder.buffer) - warm_up)
"""


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_training_compiles_nothing_after_the_warm_up(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    warm_up, training = map(int, done.stdout.split())
    assert warm_up > 0
    assert training == 0
