"""A checkpoint of any model is restored bit for bit, and refused by another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from trainer.checkpoint import Checkpoints, Progress
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.errors import CheckpointError
from trainer.model import MODELS
from trainer.stream.columns import Impressions

MakeConfig = Callable[..., Config]
MakeBatches = Callable[..., list[Impressions]]
MakeRun = Callable[[Config], Any]
MakeProgress = Callable[[int], Progress]
QUICK = {"epnet", "xdeepfm", "ple_md"}


def with_model(config: Config, name: str) -> Config:
    return replace(config, model=replace(config.model, name=name, bottom_widths=(8,), cin_rows=(4, 4)))


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(MODELS)],
)
def test_a_restored_model_goes_on_bit_for_bit(
    name: str,
    ranks: Ranks,
    make_config: MakeConfig,
    make_run: MakeRun,
    make_batches: MakeBatches,
    make_progress: MakeProgress,
    tmp_path: Path,
) -> None:
    config = with_model(make_config(bytes_limit=256 << 10), name)
    batches = make_batches(config, 8)
    unbroken, restored = make_run(config), make_run(config)
    unbroken.train(batches[:4])
    checkpoints = Checkpoints(str(tmp_path), config=config, ranks=ranks)
    checkpoints.save(unbroken.recommender, parts=unbroken.parts, progress=make_progress(4), positions=[])
    assert checkpoints.restore(restored.recommender, parts=restored.parts) is not None
    for run in (unbroken, restored):
        run.train(batches[4:])
    unbroken.assert_same(restored)
    checkpoints.close()


@pytest.mark.parametrize(
    ("saved", "other", "named"),
    [
        # All of PPNet's parameters are in a checkpoint of PEPNet, under the same names.
        ("pepnet", "ppnet", r"dense 'param/epnet\.gate\.bias': the model has no such parameter"),
        ("ppnet", "pepnet", r"dense 'param/epnet\.\S+': expected shape .* found nothing"),
        ("dcnv2", "dcnv2_mt", r"expected shape \[1, 160, 160\], found \[6, 160, 160\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    saved: str,
    other: str,
    named: str,
    ranks: Ranks,
    make_config: MakeConfig,
    make_run: MakeRun,
    make_progress: MakeProgress,
    tmp_path: Path,
) -> None:
    config = make_config(bytes_limit=256 << 10)
    run = make_run(with_model(config, saved))
    checkpoints = Checkpoints(str(tmp_path), config=config, ranks=ranks)
    checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(4), positions=[])
    into = make_run(with_model(config, other))
    with pytest.raises(CheckpointError, match=named):
        checkpoints.restore(into.recommender, parts=into.parts)
    checkpoints.close()
