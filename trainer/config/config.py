"""The configuration of a run: frozen structs, each part owning its section.

A deployment writes TOML (`python -m trainer config` prints one), an experiment calls a preset.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli_w

from feature_eviction.policy import ScoreConfig
from param_server.client import RulesConfig
from trainer.config.schema import SchemaConfig, table_name
from trainer.errors import ConfigError


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every section is: frozen, keyword-only, closed to unknown keys."""


class ModelConfig(Section, frozen=True, kw_only=True):
    """PEPNet's sizes and named options (arXiv 2302.01115)."""

    tower_widths: tuple[int, ...] = (100, 64)
    gate_hidden: int = 64
    gate_gamma: float = 2.0
    """The gate's range is (0, gamma)."""
    first_layer: Literal["epnet_output", "hidden"] = "epnet_output"
    """H^(1) of equation 8: EPNet's output itself, or a first hidden layer on it."""
    epnet_input: Literal["domain_and_embedding", "domain"] = "domain_and_embedding"
    """The KDD version's input, or the early version's."""
    epnet_gate: Literal["element", "field"] = "element"


class OptimizerConfig(Section, frozen=True, kw_only=True):
    """Row-wise AdaGrad for embeddings, Adam for the dense part."""

    embedding_learning_rate: float = 0.05
    embedding_eps: float = 1e-6
    embedding_init_scale: float = 0.01
    """A new row is uniform in [-scale, scale], a pure function of (seed, id)."""
    dense_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("embedding_learning_rate", "embedding_eps", "dense_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")


class TableConfig(Section, frozen=True, kw_only=True):
    """The one shared table of a dim: its budget and its score."""

    dim: int
    bytes_limit: int
    """Everything the table may use: rows, optimizer state and id table together, over all ranks."""
    score: ScoreConfig = ScoreConfig()
    victim_window: int = 64
    expiry_scan: int = 256

    @property
    def name(self) -> str:
        return table_name(self.dim)


class TrainConfig(Section, frozen=True, kw_only=True):
    """The loop: batch, device, metrics."""

    batch_size: int = 1024
    """Impressions of one step over all ranks together."""
    batch_wait_ms: int = 200
    """A batch that has not filled within this time is trained as it is."""
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int = 1
    metrics_window: int = 50_000
    """Newest impressions of each domain that AUC and GAUC look at, over all ranks."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_wait_ms", "num_threads", "metrics_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")


class KafkaConfig(Section, frozen=True, kw_only=True):
    """Where impressions come from. Security settings come from the environment (docs/operations.md)."""

    bootstrap_servers: str = "127.0.0.1:9092"
    topic: str = "impressions"
    dead_letter_topic: str = "impressions-dead-letters"
    group: str = "freshet-trainer"
    """Committed offsets of this group are for lag displays and pacing; training never reads them."""
    num_partitions: int = 8
    """Used when the topic has to be created."""
    record_bytes_max: int = 1 << 20
    fetch_bytes_max: int = 8 << 20
    prefetch_impressions_max: int = 16_384
    """Decoded impressions waiting for training; the source stops fetching beyond it."""
    start_timeout_s: int = 30


class PublishConfig(Section, frozen=True, kw_only=True):
    """When versions are made and which rows they carry."""

    interval_ms: int = 500
    full_every: int = 100
    """Each so many versions a full one is published; bounds the chain a new replica loads."""
    rules: RulesConfig = RulesConfig()
    segment_bytes_max: int = 4 << 20
    request_timeout_s: int = 30

    def __post_init__(self) -> None:
        for name in ("interval_ms", "full_every", "request_timeout_s"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not 1 << 16 <= self.segment_bytes_max <= 4 << 20:
            raise ValueError(f"segment_bytes_max must be in 64 KiB..4 MiB, found {self.segment_bytes_max}")


class CheckpointConfig(Section, frozen=True, kw_only=True):
    """Where and how often the whole state is saved."""

    directory: str = ""
    """Empty = <run directory>/checkpoints."""
    interval_s: int = 15
    keep: int = 3

    def __post_init__(self) -> None:
        if self.interval_s < 1 or self.keep < 1:
            raise ValueError("interval_s and keep must be at least 1")


class ServingConfig(Section, frozen=True, kw_only=True):
    """The processes that `python -m trainer run` starts around the trainer."""

    shard_address: str = "127.0.0.1:0"
    """Port 0 = any free port."""
    num_replicas: int = 2
    row_format: Literal["float32", "float16", "int8"] = "float32"
    keep_full: int = 2
    """Full versions kept in the log, with the deltas that follow the oldest of them."""


class ProduceConfig(Section, frozen=True, kw_only=True):
    """The synthetic stream and the pace of the producer."""

    impressions_per_s: int = 2_000
    record_impressions: int = 64
    scale: float = 0.02
    """Share of PEPNet's Table 1 populations."""
    event_days: float = 12.0
    """Event time that the whole stream spans."""

    def __post_init__(self) -> None:
        for name in ("impressions_per_s", "record_impressions", "scale", "event_days"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")


class Config(Section, frozen=True, kw_only=True):
    """One run, whole."""

    preset: str
    seed: int = 1
    impressions: int = 200_000
    schema: SchemaConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    tables: tuple[TableConfig, ...]
    train: TrainConfig = TrainConfig()
    kafka: KafkaConfig = KafkaConfig()
    publish: PublishConfig = PublishConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    serving: ServingConfig = ServingConfig()
    produce: ProduceConfig = ProduceConfig()

    def __post_init__(self) -> None:
        budgeted = sorted(table.dim for table in self.tables)
        if budgeted != self.schema.dims:
            raise ValueError(
                f"tables: one table a dim is needed; features use dims {self.schema.dims}, "
                f"tables give dims {budgeted}"
            )

    def hash(self) -> str:
        """A short digest of the whole configuration."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]


def load_config(path: Path) -> Config:
    """Read a TOML file.

    Raises: ConfigError naming the file and the path of the wrong key.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Config)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}") from error


def to_toml(config: Config) -> str:
    """The configuration as TOML that load_config reads back to an equal value."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(config)))


def _without_none(value: Any) -> Any:
    """TOML has no null: an absent key means the default, which is None where None is allowed."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value
