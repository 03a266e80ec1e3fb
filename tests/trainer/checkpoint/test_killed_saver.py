"""A save killed at any point leaves a whole checkpoint, and the next one works and tidies up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint import Checkpoints, Progress
from trainer.checkpoint.folders import list_folders, verify
from trainer.checkpoint.store import open_store
from trainer.collectives import Ranks
from trainer.config import Config, to_toml
from trainer.failpoints import FAILPOINTS

HERE = Path(__file__).parent
NAMES = [name for name in FAILPOINTS if name.startswith("checkpoint.")]
COMMITTED_FROM = NAMES.index("checkpoint.after_manifest")


@pytest.fixture(scope="module")
def small(make_config: Callable[..., Config]) -> Config:
    return make_config(bytes_limit=256 << 10)


@pytest.fixture(scope="module")
def killed(small: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """One directory a failpoint, and how the process that reached it ended."""
    directory = tmp_path_factory.mktemp("killed")
    (directory / "config.toml").write_text(to_toml(small))
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_saver.py"), str(directory / "config.toml"), str(directory)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = (line.split() for line in done.stdout.splitlines() if line.startswith("checkpoint."))
    return directory, {name: int(code) for name, code in ends}


@pytest.mark.timeout(200)
def test_every_failpoint_of_a_save_fires(killed: tuple[Path, dict[str, int]]) -> None:
    directory, ends = killed
    assert ends == dict.fromkeys(NAMES, -signal.SIGKILL)
    assert (directory / "fired").read_text().split() == [f"{name}:1" for name in NAMES]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", NAMES)
def test_killed_save_leaves_a_whole_checkpoint(
    name: str,
    killed: tuple[Path, dict[str, int]],
    small: Config,
    ranks: Ranks,
    make_run: Callable[[Config], Any],
) -> None:
    root = killed[0] / name
    store = open_store(str(root))
    for folder in list_folders(store).committed:
        verify(store, folder)
    run = make_run(small)
    checkpoints = Checkpoints(str(root), config=small, ranks=ranks)
    restored = checkpoints.restore(run.recommender, parts={})
    assert restored is not None
    assert restored.progress.step == (2 if NAMES.index(name) >= COMMITTED_FROM else 1)
    assert list_folders(store).set_aside == [], "unfinished is not damaged"
    assert checkpoints.save(run.recommender, parts={}, progress=Progress(step=3), positions=[])
    checkpoints.close()
    listing = list_folders(store)
    assert listing.unfinished == []
    assert [folder.step for folder in listing.committed][-1] == 3
    assert (root / "LATEST").read_text() == str(listing.committed[-1])
