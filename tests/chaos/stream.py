"""The campaign's stream: a small configuration, the impressions of it, and what must be known of them.

Shapes: N impressions of the whole stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from trainer.config import Config, preset, to_toml
from trainer.data.synthetic import SyntheticStream
from trainer.features import KeyMaker
from trainer.stream.columns import Impressions
from trainer.stream.slicing import concat_impressions

BATCH_SIZE = 64
NUM_BATCHES = 320
NUM_IMPRESSIONS = BATCH_SIZE * NUM_BATCHES
NUM_PARTITIONS = 4
"""So that two ranks have as much to do each."""
BYTES_LIMIT = 640 << 10
"""Fewer rows than the stream has ids: rows are evicted all the time."""
ITEM_TTL_S = 12 * 3600
"""And some expire before that."""


def make_config(seed: int) -> Config:
    """A model and a table so small that a step takes milliseconds, on the quickstart's stream."""
    config = preset("quickstart")
    features = tuple(
        replace(feature, ttl_s=ITEM_TTL_S) if feature.name == "item_id" else feature
        for feature in config.schema.features
    )
    return replace(
        config,
        seed=seed,
        impressions=NUM_IMPRESSIONS,
        schema=replace(config.schema, features=features),
        model=replace(config.model, tower_widths=(16, 8), gate_hidden=8),
        tables=(replace(config.tables[0], bytes_limit=BYTES_LIMIT),),
        train=replace(
            config.train,
            batch_size=BATCH_SIZE,
            rank_timeout_s=30,
            metrics_window=1_000,
            ledger=True,
        ),
        kafka=replace(config.kafka, num_partitions=NUM_PARTITIONS, order="strict"),
        publish=replace(config.publish, interval_ms=100, full_every=10, request_timeout_s=10),
        checkpoint=replace(config.checkpoint, interval_s=1, keep=2),
        serving=replace(config.serving, shard_address=""),
        produce=replace(config.produce, impressions_per_s=1_000_000, record_impressions=BATCH_SIZE),
    )


def with_room(config: Config) -> Config:
    """The same with room for every row, and none that expires.

    Each rank evicts among its own rows: which ones leave depends on the number of ranks. Where that changes,
    only a table that nobody has to leave can be compared.
    """
    features = tuple(replace(feature, ttl_s=None) for feature in config.schema.features)
    return replace(
        config,
        schema=replace(config.schema, features=features),
        tables=(replace(config.tables[0], bytes_limit=32 * BYTES_LIMIT),),
    )


@dataclass(frozen=True)
class Produced:
    """The whole stream, as the topic holds it."""

    impressions: Impressions
    request_ids_N: npt.NDArray[np.uint64]
    keys_by_table: dict[str, npt.NDArray[np.int64]]
    """Every key that the stream has, once each."""


def produced(config: Config) -> Produced:
    """What `python -m trainer produce` puts into the topic under this configuration."""
    chunks = [impressions for impressions, _ in SyntheticStream(config).batches(4_096)]
    impressions = concat_impressions(chunks)
    tables = KeyMaker(config.schema).table_keys(impressions, num_rows=len(impressions))
    return Produced(
        impressions=impressions,
        request_ids_N=impressions.request_ids_N,
        keys_by_table={table.table: np.unique(table.keys_L) for table in tables},
    )


def write_config(path: Path, config: Config) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(config))
    assert msgspec.toml.decode(path.read_bytes(), type=Config) == config
    return path
