"""What a comparison is asked for, and the configuration that each of its runs gets from it."""

from __future__ import annotations

import hashlib
import math
import re
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

from feature_eviction import AdmissionConfig
from feature_eviction.layout import table_bytes
from feature_eviction.policy import ClassPolicy, TablePolicy
from trainer.compare.protocol import Protocol
from trainer.config import Config, preset
from trainer.config.config import TableConfig
from trainer.config.schema import FeatureConfig
from trainer.data.kuairand import recording_files
from trainer.publish.changed_rows import BYTES_PER_SLOT

Mode = Literal["batch", "online"]

SPARE_ROWS = 2.0
"""Rows a table gets for each distinct key of the data: nothing ever has to leave."""
PREDICTION_ROWS = 1024


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One comparison."""

    preset: str = "seesaw"
    config: Config | None = None
    """A configuration of the user's own, whose schema, model and stream take the preset's place."""
    data: str = ""
    """A KuaiRand file or folder in the place of the synthetic stream."""
    mode: Mode = "batch"
    epochs: int = 3
    """Batch mode: at most so many; the one that is best on the validation day is judged."""
    seeds: int = 3
    impressions: int = 500_000
    """Drawn for each seed, before the filter; a recording is read to its end."""
    batch_size: int = 512
    protocol: Protocol = Protocol()
    dense_learning_rate: float = 3e-3
    embedding_learning_rate: float = 0.1
    embedding_initial_accumulator: float = 4.0
    """Of Adam and of AdaGrad, the same for all models; how they were chosen: docs/compare.md."""

    def __post_init__(self) -> None:
        for name in ("epochs", "seeds", "impressions", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("dense_learning_rate", "embedding_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if not 0 <= self.embedding_initial_accumulator < math.inf:
            raise ValueError(
                "embedding_initial_accumulator must not be negative, found "
                f"{self.embedding_initial_accumulator}"
            )
        if self.mode == "online" and self.epochs != 1:
            raise ValueError(
                f"mode 'online' sees every impression once: epochs must be 1, found {self.epochs}"
            )


def as_file_name(text: str) -> str:
    """The text with all that a file's name should not hold as "_"."""
    return re.sub(r"[^A-Za-z0-9_.+=]+", "_", text)


def base_config(settings: Settings, *, seed: int) -> Config:
    """The preset, or the user's configuration, with the comparison's sizes; tables and domains are as there.

    Admission, lifetimes and quotas are off: what memory is worth is another question (docs/benchmarks.md).
    Raises: ConfigError for an unknown preset.
    """
    config = settings.config or preset(settings.preset)
    features = tuple(_for_ever(feature) for feature in config.schema.features)
    return replace(
        config,
        seed=seed,
        impressions=settings.impressions,
        schema=replace(config.schema, features=features),
        train=replace(config.train, batch_size=settings.batch_size, num_threads=1),
        optimizer=replace(
            config.optimizer,
            dense_learning_rate=settings.dense_learning_rate,
            embedding_learning_rate=settings.embedding_learning_rate,
            embedding_initial_accumulator=settings.embedding_initial_accumulator,
            # Where Adam learns the rows too, it is one Adam throughout.
            embedding_adam_learning_rate=settings.dense_learning_rate,
        ),
    )


def _for_ever(feature: FeatureConfig) -> FeatureConfig:
    return replace(
        feature, ttl_s=None, min_updates=0, max_rows=None, protected=False, admission=AdmissionConfig()
    )


def with_room(config: Config, *, num_keys: dict[int, int]) -> Config:
    """The tables with room for every key twice over. Args: num_keys: distinct keys by class_id."""
    tables = []
    for dim in config.schema.dims:
        classes = {feature.class_id for feature in config.schema.features if feature.dim == dim}
        num_slots = int(SPARE_ROWS * sum(num_keys.get(one, 0) for one in classes)) + PREDICTION_ROWS
        rules = tuple(ClassPolicy(class_id=one) for one in sorted(classes))
        policy = TablePolicy(
            num_slots=num_slots, score=TableConfig(dim=dim, bytes_limit=1).score, classes=rules
        )
        # A row, its optimizer state (up to two values beside each of its own) and its record of changes.
        row_bytes = dim * 4 * 3 + 8 + BYTES_PER_SLOT
        bytes_limit = num_slots * row_bytes + table_bytes(num_slots, policy=policy)
        tables.append(TableConfig(dim=dim, bytes_limit=bytes_limit))
    return replace(config, tables=tuple(tables))


def data_key(settings: Settings, config: Config) -> str:
    """A digest of all that decides the columns of a seed, the code that draws them included: drawing them
    once more than needed takes seconds."""
    schema = config.schema
    meaning: list[object] = [_drawing_code(), schema.hash(), settings.protocol]
    if settings.data:
        meaning += [str(Path(settings.data).resolve()), _files(Path(settings.data))]
    else:
        # How fast and in which records a stream is sent changes nothing about it.
        stream = replace(config.produce, impressions_per_s=1, record_impressions=1)
        meaning += [stream, config.seed, config.impressions]
    return hashlib.sha256(msgspec.json.encode(meaning, order="deterministic")).hexdigest()[:16]


@cache
def _drawing_code() -> str:
    package = Path(__file__).parent
    files = [*sorted((package.parent / "data").glob("*.py")), package / "dataset.py", package / "protocol.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _files(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the recording's files: hashing gigabytes at each start would cost more."""
    found = [(one.name, one.stat()) for one in recording_files(path)]
    return [(name, facts.st_size, facts.st_mtime_ns) for name, facts in found]
