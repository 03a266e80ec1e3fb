"""The arithmetic of a large installation, from what was measured on small ones.

python -m benchmarks.scale [--ids 1e11] [--impressions-per-s 1e6] [--replicas 1000] [--version-s 10] ...

Nothing runs here: figures of docs/benchmarks.md and sizes of the code are multiplied. What a large
installation really does, in which everything is slower than the sum of its parts, is open (docs/scale.md).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, fields

import numpy as np

from feature_eviction.layout import table_bytes
from feature_eviction.policy import NUM_SLOTS_MAX, ClassPolicy, TablePolicy
from feature_eviction.slot_map import SlotMap
from proto.row_formats import packed_width
from trainer.publish.changed_rows import BYTES_PER_SLOT

GIB = float(1 << 30)
ADAGRAD_BYTES = 4
ID_BYTES = 8
FIRST_RANKS = 100_000
"""Of Zipf's ranks so many are summed one by one, the rest by pieces of equal ratio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """docs/benchmarks.md, 2026-11-24 and 25; 2 virtual cores, 24 GiB."""

    impressions_per_s_rank: float = 16_080.0
    """The training step, everything on: PEPNet with 20 features, dim 16, one rank of one thread beside its
    mapping thread."""
    rank_efficiency: float = 0.72
    """A rank of two beside one alone, by processor time: 1.44 / 2. Of more ranks nothing is measured."""
    rank_efficiency_clock: float = 0.555
    """The same by the clock, 1.11 / 2: two ranks and their mapping threads shared two cores."""
    dense_parameters: float = 1.4e6
    """5.7 MB of dense weights go with a version of that model."""
    append_bytes_per_s: float = 247e6
    """The version log: 1.47 M durable rows of 168 bytes a second."""
    apply_rows_per_s: float = 2.5e6
    """The row store, upsert at dim 16: a version prepared and switched to."""
    fewer_bytes: float = 1.88
    """`int8` beside float32, by all bytes of rows; segments with scores and times."""
    fewer_by_rules: float = 3.48
    """`by_class_int8` beside `int8`, by all bytes of rows: 8.62 and 2.48 MB. Not a preset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked for."""

    ids: float = 1e11
    impressions_per_s: float = 1e6
    replicas: float = 1_000.0
    features: float = 20.0
    dim: float = 16.0
    zipf: float = 1.05
    """The ids of each feature are drawn by rank^-zipf."""
    batch_rank: float = 1_024.0
    version_s: float = 10.0
    """A version in so many seconds."""
    host_gib: float = 192.0
    """Memory of a host that rows may take."""
    link_gbit_per_s: float = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What it takes. Bytes and rows are those of one second where no other unit is named."""

    table_bytes_id: float
    table_tib: float
    ranks_for_speed: float
    ranks_for_speed_clock: float
    ranks_for_memory: float
    ranks_for_slots: float
    ranks: float
    steps_per_s: float
    distinct_ids_rank_step: float
    rank_link_gbit_per_s: float
    impressions_mb_per_s: float
    changed_rows_version: float
    version_gb: float
    versions_a_minute: float
    shards_for_append: float
    replica_bytes_id: float
    replica_tib: float
    row_shards_for_memory: float
    row_shards_for_apply: float
    replica_link_gbit_per_s: float
    fan_out_gbit_per_s: float
    senders: float
    senders_with_rules: float


def distinct(draws: float, *, ids: float, zipf: float) -> float:
    """How many different ids so many draws are expected to show: the sum of 1 - (1 - p)^draws."""
    first = np.arange(1.0, min(ids, FIRST_RANKS) + 1.0)
    edges = np.geomspace(first[-1] + 1.0, ids + 1.0, 4_001) if ids > FIRST_RANKS else np.zeros(1)
    middle, width = np.sqrt(edges[1:] * edges[:-1]), np.diff(edges)
    rank = np.concatenate([first, middle])
    count = np.concatenate([np.ones_like(first), width])
    weight = rank**-zipf
    share = weight / (weight * count).sum()
    return float((-np.expm1(draws * np.log1p(-share)) * count).sum())


def plan(load: Load, measured: Measured) -> Plan:
    """Raises: ValueError for a load that is not above 0."""
    for field in fields(load):
        if not getattr(load, field.name) > 0:
            raise ValueError(f"{field.name} must be above 0, found {getattr(load, field.name)}")
    per_feature = load.ids / load.features
    id_table = _id_table_bytes()
    bytes_id = load.dim * 4 + ADAGRAD_BYTES + BYTES_PER_SLOT + id_table
    for_speed = load.impressions_per_s / (measured.impressions_per_s_rank * measured.rank_efficiency)
    for_speed_clock = for_speed * measured.rank_efficiency / measured.rank_efficiency_clock
    for_memory = load.ids * bytes_id / (load.host_gib * GIB)
    for_slots = load.ids / NUM_SLOTS_MAX
    ranks = math.ceil(max(for_speed, for_memory, for_slots))
    steps_per_s = load.impressions_per_s / (ranks * load.batch_rank)
    in_batch = load.features * distinct(load.batch_rank, ids=per_feature, zipf=load.zipf)
    away = (ranks - 1) / ranks
    # Ids to their owners, rows back, gradients to the owners; the dense gradient both ways of a ring.
    step_bytes = in_batch * away * (ID_BYTES + 2 * load.dim * 4) + 2 * away * measured.dense_parameters * 4
    draws = load.impressions_per_s * load.version_s
    changed = load.features * distinct(draws, ids=per_feature, zipf=load.zipf)
    row_bytes = (load.dim * 4 + ID_BYTES + 12) / measured.fewer_bytes
    dense_bytes = measured.dense_parameters * 4
    version_bytes = changed * row_bytes + dense_bytes
    with_rules = (changed * row_bytes / measured.fewer_by_rules + dense_bytes) / version_bytes
    replica_id = packed_width(int(load.dim), "int8") + SlotMap(1_000_000).bytes_used / 1e6
    replica_gbit = version_bytes / load.version_s * 8 / 1e9
    senders = replica_gbit * load.replicas / (0.8 * load.link_gbit_per_s)
    return Plan(
        table_bytes_id=bytes_id,
        table_tib=load.ids * bytes_id / 2**40,
        ranks_for_speed=math.ceil(for_speed),
        ranks_for_speed_clock=math.ceil(for_speed_clock),
        ranks_for_memory=math.ceil(for_memory),
        ranks_for_slots=math.ceil(for_slots),
        ranks=ranks,
        steps_per_s=steps_per_s,
        distinct_ids_rank_step=in_batch,
        rank_link_gbit_per_s=step_bytes * steps_per_s * 8 / 1e9,
        impressions_mb_per_s=load.impressions_per_s * load.features * ID_BYTES / 1e6,
        changed_rows_version=changed,
        version_gb=version_bytes / 1e9,
        versions_a_minute=60 / load.version_s,
        shards_for_append=math.ceil(version_bytes / load.version_s / measured.append_bytes_per_s),
        replica_bytes_id=replica_id,
        replica_tib=load.ids * replica_id / 2**40,
        row_shards_for_memory=math.ceil(load.ids * replica_id / (load.host_gib * GIB)),
        row_shards_for_apply=math.ceil(changed / load.version_s / measured.apply_rows_per_s),
        replica_link_gbit_per_s=replica_gbit,
        fan_out_gbit_per_s=replica_gbit * load.replicas,
        senders=math.ceil(senders),
        senders_with_rules=math.ceil(senders * with_rules),
    )


def _id_table_bytes() -> float:
    """Bytes an id of the id table, with lifetimes."""
    slots = 1_000_000
    policy = TablePolicy(num_slots=slots, classes=(ClassPolicy(class_id=1, ttl_s=86_400),))
    return table_bytes(slots, policy=policy) / slots


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    for field in fields(Load):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    options = parser.parse_args(argv)
    load = Load(**vars(options))
    try:
        found = plan(load, Measured())
    except ValueError as error:
        parser.error(str(error))
    for name, value in asdict(found).items():
        sys.stdout.write(f"{name:<26} {value:>18,.4g}\n" if value < 1e4 else f"{name:<26} {value:>18,.0f}\n")
    rounded = {name: float(f"{value:.4g}") for name, value in asdict(found).items()}
    sys.stdout.write(json.dumps({"name": "scale", "load": asdict(load), **rounded}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
