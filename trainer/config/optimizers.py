"""Optimizers by name: the pairs that PEPNet was published with, and the one that a run begins with here."""

from __future__ import annotations

import difflib

from trainer.config.config import Config, OptimizerConfig
from trainer.errors import ConfigError

OPTIMIZERS: dict[str, OptimizerConfig] = {
    # The default. Row-wise AdaGrad 0.05 is the published rate of embeddings. The published dense rate keeps a
    # model steady that has trained for months: from a fresh start it would move a weight by 0.04 at most in
    # 8,000 steps. So the dense rate is that of the published experiments, which begin afresh as well.
    "online": OptimizerConfig(),
    # As published for production: embeddings follow the stream quickly, towers stay as they are.
    "production": OptimizerConfig(dense_learning_rate=5e-6),
    # As published for the offline experiments: Adam at one rate for everything.
    "adam": OptimizerConfig(embedding="adam"),
}

NOT_SAVED = (
    "optimizer.embedding = 'adam' is for comparisons and cannot be saved: a checkpoint holds one number of "
    "optimizer state a row, and Adam keeps two for each of the row's values. Train a stream with "
    "optimizer.embedding = 'adagrad'"
)


def check_can_be_saved(config: Config) -> None:
    """Raises: ConfigError if checkpoints do not hold the state of its optimizer."""
    if config.optimizer.embedding == "adam":
        raise ConfigError(NOT_SAVED)


def optimizer(name: str) -> OptimizerConfig:
    """Raises: ConfigError with the closest names."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    close = difflib.get_close_matches(name, OPTIMIZERS, cutoff=0.5)
    meant = f" (the closest: {', '.join(close)})" if close else ""
    raise ConfigError(f"unknown optimizer '{name}'{meant}; there are: {', '.join(OPTIMIZERS)}")
