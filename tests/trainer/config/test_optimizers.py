"""Optimizers by name, and the refusal of one that cannot be saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from trainer.config import load_config, preset, to_toml
from trainer.config.config import OptimizerConfig
from trainer.config.optimizers import OPTIMIZERS, optimizer
from trainer.errors import ConfigError
from trainer.run.plan import RunOptions, resolve_config

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_published_pair_and_the_default_differ_in_the_dense_rate_alone() -> None:
    assert optimizer("production") == replace(OptimizerConfig(), dense_learning_rate=5e-6)
    assert optimizer("online") == OptimizerConfig() == preset("quickstart").optimizer
    assert optimizer("online").embedding_learning_rate == 0.05
    assert optimizer("adam") == OptimizerConfig(embedding="adam")
    assert optimizer("adam").embedding_adam_learning_rate == optimizer("adam").dense_learning_rate == 1e-3


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown optimizer 'prodction' \(the closest: production\); there are: online"
    ):
        optimizer("prodction")
    with pytest.raises(ConfigError, match=r"unknown optimizer 'zzz'; there are: online, production, adam"):
        optimizer("zzz")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_printed_configuration_has_the_named_pair(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.toml"
    command = [sys.executable, "-m", "trainer", "config", "--optimizer", name]
    path.write_bytes(subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout)
    assert load_config(path).optimizer == OPTIMIZERS[name]


def test_a_stream_is_not_trained_with_an_optimizer_that_checkpoints_do_not_hold(tmp_path: Path) -> None:
    config = replace(preset("quickstart"), optimizer=optimizer("adam"))
    with pytest.raises(ConfigError, match="Train a stream with"):
        resolve_config(config, RunOptions(out_dir=tmp_path))
    path = tmp_path / "config.toml"
    kafka = replace(config.kafka, bootstrap_servers="127.0.0.1:9")
    serving = replace(config.serving, shard_address="")
    path.write_text(to_toml(replace(config, kafka=kafka, serving=serving)))
    command = [
        sys.executable,
        "-m",
        "trainer",
        "train",
        "--config",
        str(path),
        "--run-dir",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: optimizer.embedding = 'adam' is for comparisons"), done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("embedding_adam_learning_rate", 0.0), ("dense_learning_rate", float("inf")), ("embedding_eps", -1.0)],
)
def test_rates_are_above_0_and_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0, found"):
        OptimizerConfig(**{name: value})
