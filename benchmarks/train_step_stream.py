"""The workload of benchmarks.train_step: 20 features, 6 tasks, 3 domains, Zipf ids over a thousand millions.

Shapes: N impressions, F features, L keys of a batch, S rows of the table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from benchmarks.zipf import zipf_ranks
from feature_eviction import AdmissionConfig, make_keys, table_bytes
from trainer.config.config import Config, ModelConfig, PublishConfig, TableConfig, TrainConfig
from trainer.config.schema import FeatureConfig, FeatureRole, SchemaConfig, TaskConfig
from trainer.model.layout import FeatureLayout
from trainer.publish.changed_rows import BYTES_PER_SLOT
from trainer.recommender import policy_of
from trainer.stream.columns import Impressions, Jagged

BATCH = 1024
NUM_RAW_IDS = 1_000_000_000
"""Of all features together; each draws from its own share."""
TASKS = ("like", "follow", "forward", "hate", "click", "effective_view")
DOMAINS = ("discovery", "featured_video", "slide")
START_S = 1_750_000_000
EVENT_MS_PER_BATCH = 50
DAY_S = 86_400

ALWAYS = AdmissionConfig()
SECOND_SIGHT = AdmissionConfig(kind="count", min_count=2)
"""As the large classes of such a stream would be admitted: most of their ids are never seen again."""

# An odd factor modulo 2^52 spreads the ranks over all raw ids, one to one.
_SPREAD = 0x9E3779B97F4A7
_ID_MASK = (1 << 52) - 1

Keys = npt.NDArray[np.int64]


def features_of(dim: int, *, admission: AdmissionConfig = ALWAYS) -> tuple[FeatureConfig, ...]:
    """A domain, 6 user, 6 item, 2 author and 5 other features; items and authors expire.

    Args: admission: of all but the domain, which has three ids.
    """
    counts: dict[FeatureRole, int] = {"user": 6, "item": 6, "author": 2, "other": 5}
    roles = [role for role, count in counts.items() for _ in range(count)]
    return (
        FeatureConfig(name="domain", class_id=1, dim=dim, role="domain", protected=True),
        *(
            FeatureConfig(
                name=f"{role}_{index}",
                class_id=index + 2,
                dim=dim,
                role=role,
                admission=admission,
                ttl_s=30 * DAY_S if role in ("item", "author") else None,
            )
            for index, role in enumerate(roles)
        ),
    )


def config_for(
    *, dim: int, rows: int, world_size: int, threads: int, admission: AdmissionConfig = ALWAYS
) -> Config:
    """A run whose table has `rows` rows over all ranks, or a few more."""
    table = TableConfig(dim=dim, bytes_limit=1)
    config = Config(
        preset="train_step",
        schema=SchemaConfig(
            features=features_of(dim, admission=admission),
            domains=DOMAINS,
            tasks=tuple(TaskConfig(name=name) for name in TASKS),
            positive_task="click",
        ),
        model=ModelConfig(tower_widths=(128, 64)),
        tables=(table,),
        train=TrainConfig(batch_size=BATCH, num_threads=threads),
        publish=PublishConfig(interval_ms=10_000),
    )
    local = rows // world_size
    policy = policy_of(table, num_slots=local, config=config)
    per_rank = local * (dim * 4 + 4 + BYTES_PER_SLOT) + table_bytes(local, policy=policy)
    return replace(config, tables=(replace(table, bytes_limit=per_rank * world_size),))


class Stream:
    """One rank's batches."""

    def __init__(self, config: Config, *, rank: int, world_size: int) -> None:
        self._schema = config.schema
        self._num = config.train.batch_size // world_size
        self._generator = np.random.default_rng([config.seed, rank])
        self._batch = 0

    def batches(self, num: int) -> list[Impressions]:
        return [self._next() for _ in range(num)]

    def _next(self) -> Impressions:
        self._batch += 1
        num, generator = self._num, self._generator
        num_ranks = NUM_RAW_IDS // (len(self._schema.features) - 1)
        ids = {
            feature.name: raw_ids(zipf_ranks(generator, num, num_ranks=num_ranks))
            for feature in self._schema.features
            if feature.name != "domain"
        }
        # What is liked hangs on the ids, so that there is something to learn.
        liked_N = 0.1 + 0.15 * (ids["user_0"] & 1) + 0.3 * (ids["item_6"] & 1)
        now_ms = START_S * 1000 + self._batch * EVENT_MS_PER_BATCH
        ones_N = np.ones(num, np.int32)
        return Impressions(
            request_ids_N=np.arange(self._batch * num, (self._batch + 1) * num, dtype=np.uint64),
            user_ids_N=ids["user_0"],
            event_time_ms_N=np.full(num, now_ms),
            produced_ms_N=np.full(num, now_ms),
            domain_N=generator.integers(0, len(DOMAINS), num).astype(np.uint8),
            sparse={name: Jagged(ids_N, ones_N) for name, ids_N in ids.items()},
            dense={},
            labels_NT=(generator.random((num, len(TASKS))) < liked_N[:, None]).astype(np.float32),
            known_NT=np.ones((num, len(TASKS)), np.bool_),
        )


def raw_ids(ranks_N: Keys) -> Keys:
    return (ranks_N * _SPREAD) & _ID_MASK


def keys_of(impressions: Impressions, layout: FeatureLayout) -> Keys:
    """int64 [F * N]: each feature's ids with its class, as a table shared by features needs them."""
    columns = []
    for feature in layout.features:
        if feature.name == "domain":
            ids_N = impressions.domain_N.astype(np.int64)
        else:
            ids_N = impressions.sparse[feature.name].ids_L
        columns.append(ids_N | (feature.class_id << 52))
    return np.concatenate(columns)


def popular_keys(layout: FeatureLayout, num: int) -> Keys:
    """int64 [num], distinct: what a table holds when it has been full for long."""
    domain, *others = sorted(layout.features, key=lambda feature: feature.role != "domain")
    parts = [make_keys(np.arange(len(DOMAINS)), class_id=domain.class_id)[0]]
    per_feature = -(-num // len(others))
    ids_N = raw_ids(np.arange(per_feature))
    parts += [make_keys(ids_N, class_id=feature.class_id)[0] for feature in others]
    return np.concatenate(parts)[:num]
