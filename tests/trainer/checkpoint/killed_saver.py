"""Run by test_killed_saver.py: a save that is killed at each failpoint in turn, in a process of its own.

killed_saver.py CONFIG_TOML DIRECTORY

One recommender trains; each failpoint gets a forked copy of this process and of the directory with a first
checkpoint, since starting anew would take longer than all of it. Prints NAME RETURN_CODE a failpoint.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

from trainer.checkpoint import Checkpoints, Progress
from trainer.collectives import Ranks, start_ranks
from trainer.config import Config, load_config
from trainer.data.synthetic import SyntheticStream
from trainer.failpoints import FAILPOINTS, arm_from_environment
from trainer.recommender import Recommender


def save(root: Path, recommender: Recommender, *, step: int, config: Config, ranks: Ranks) -> None:
    checkpoints = Checkpoints(str(root), config=config, ranks=ranks)
    checkpoints.save(recommender, parts={}, progress=Progress(step=step), positions=[])
    checkpoints.close()


def main(config_path: str, directory: str) -> None:
    torch.set_num_threads(1)
    config = load_config(Path(config_path))
    ranks = start_ranks()
    recommender = Recommender(config, ranks=ranks)
    batches = SyntheticStream(config).batches(config.train.batch_size)

    def train() -> None:
        batch = next(batches)[0]
        recommender.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)

    train()
    first = Path(directory) / "first"
    save(first, recommender, step=1, config=config, ranks=ranks)
    train()
    for name in (name for name in FAILPOINTS if name.startswith("checkpoint.")):
        root = Path(directory) / name
        shutil.copytree(first, root)
        child = os.fork()
        if child == 0:
            arm_from_environment(
                {"FRESHET_FAILPOINT": f"{name}:1:kill", "FRESHET_FAILPOINT_LOG": f"{directory}/fired"}
            )
            save(root, recommender, step=2, config=config, ranks=ranks)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{name} {os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
