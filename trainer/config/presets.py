"""Whole configurations by name: quickstart and its relatives."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from msgspec.structs import replace

from param_server.client import RulesConfig
from trainer.config.config import (
    Config,
    PublishConfig,
    TableConfig,
    TrainConfig,
)
from trainer.config.schema import FeatureConfig, SchemaConfig, TaskConfig
from trainer.errors import ConfigError

DAY_S = 86_400

SYNTHETIC_TASKS = (
    TaskConfig(name="like", base_rate=0.03),
    TaskConfig(name="follow", base_rate=0.004),
    TaskConfig(name="forward", base_rate=0.002),
    TaskConfig(name="hate", base_rate=0.001),
    TaskConfig(name="click"),
    TaskConfig(name="effective_view"),
)
"""Rates of the size of PEPNet's Table 1 (trainer/data/table1.py)."""
KUAIRAND_TASKS = (
    TaskConfig(name="click"),
    TaskConfig(name="like"),
    TaskConfig(name="follow", base_rate=0.005),
    TaskConfig(name="forward", base_rate=0.005),
    TaskConfig(name="comment", base_rate=0.02),
    TaskConfig(name="hate"),
    TaskConfig(name="long_view"),
)
"""Likes and hates are known of few impressions of the trimmed trace, and rare in the published files."""


def quickstart() -> Config:
    """The synthetic stream of PEPNet's Table 1 at a laptop's scale: three domains, six tasks."""
    dim = 16
    features = (
        FeatureConfig(name="domain", class_id=1, dim=dim, role="domain", protected=True),
        FeatureConfig(name="user_id", class_id=2, dim=dim, role="user", protected=True),
        FeatureConfig(name="user_group", class_id=3, dim=dim, role="user", protected=True),
        FeatureConfig(name="item_id", class_id=4, dim=dim, role="item", ttl_s=4 * DAY_S),
        FeatureConfig(name="category", class_id=5, dim=dim, role="item"),
        FeatureConfig(name="tags", class_id=6, dim=dim, kind="multi", role="item", ids_max=8),
        FeatureConfig(name="author_id", class_id=7, dim=dim, role="author"),
        FeatureConfig(name="hour", class_id=8, dim=dim, role="other"),
        FeatureConfig(
            name="item_age_h",
            class_id=9,
            dim=dim,
            kind="dense",
            role="item",
            bucket_edges=(1.0, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0),
        ),
        FeatureConfig(
            name="domain_click_rate",
            class_id=10,
            dim=dim,
            kind="dense",
            role="domain",
            bucket_edges=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
        ),
    )
    return Config(
        preset="quickstart",
        schema=SchemaConfig(
            features=features,
            domains=("discovery", "featured_video", "slide"),
            tasks=SYNTHETIC_TASKS,
            positive_task="click",
        ),
        tables=(TableConfig(dim=dim, bytes_limit=4 << 20),),
        train=TrainConfig(batch_size=256),
        publish=PublishConfig(rules=RulesConfig(update_limit=20, update_limit_window_s=20)),
    )


def seesaw() -> Config:
    """Where models are compared: tasks and domains of the synthetic stream conflict (docs/data.md).

    Populations are small beside the stream: a million impressions show users and items as often as Table 1's
    do, half a million half as often. The embedding table holds every id.
    """
    base = quickstart()
    return replace(
        base,
        preset="seesaw",
        impressions=500_000,
        tables=(replace(base.tables[0], bytes_limit=32 << 20),),
        produce=replace(
            base.produce, scale=0.005, domain_conflict=0.4, task_conflict=0.2, group_taste_share=0.5
        ),
    )


def paper() -> Config:
    """The seesaw's stream trained with the sizes of PEPNet's paper (arXiv 2302.01115, section 4.1).

    Embeddings of 40, towers 100-64, batch 1,024, the dense part by Adam 1e-3 with L2 1e-5, one of the three
    that the paper tries. The rows learn by its production's AdaGrad 0.05: offline it takes Adam for them too,
    whose state is not saved here.
    """
    base = seesaw()
    dim = 40
    features = tuple(replace(feature, dim=dim) for feature in base.schema.features)
    return replace(
        base,
        preset="paper",
        schema=replace(base.schema, features=features),
        tables=(replace(base.tables[0], dim=dim, bytes_limit=64 << 20),),
        model=replace(base.model, tower_widths=(100, 64), l2=1e-5),
        optimizer=replace(base.optimizer, embedding_learning_rate=0.05, dense_learning_rate=1e-3),
        train=replace(base.train, batch_size=1_024),
    )


def one_domain() -> Config:
    """Where PEPNet should not win: one domain, and nothing in a person that plain features do not say.

    All users of a group are alike, and what a user and an item add to a logit does not depend on each other.
    """
    base = quickstart()
    return replace(
        base,
        preset="one_domain",
        impressions=500_000,
        schema=replace(base.schema, domains=("featured_video",)),
        tables=(replace(base.tables[0], bytes_limit=32 << 20),),
        produce=replace(
            base.produce, scale=0.005, taste_scale=0.0, group_taste_share=1.0, group_effect_share=1.0
        ),
    )


def kuairand() -> Config:
    """Published KuaiRand files and the trimmed trace: tabs as domains, behaviour columns as tasks."""
    dim = 16
    features = (
        FeatureConfig(name="domain", class_id=1, dim=dim, role="domain", protected=True),
        FeatureConfig(name="user_id", class_id=2, dim=dim, role="user", protected=True),
        FeatureConfig(name="user_active_degree", class_id=3, dim=dim, role="user"),
        FeatureConfig(name="item_id", class_id=4, dim=dim, role="item", ttl_s=7 * DAY_S),
        FeatureConfig(name="author_id", class_id=5, dim=dim, role="author"),
        FeatureConfig(name="tags", class_id=6, dim=dim, kind="multi", role="item", ids_max=16),
        FeatureConfig(name="hour", class_id=7, dim=dim, role="other"),
        FeatureConfig(
            name="duration_s",
            class_id=8,
            dim=dim,
            kind="dense",
            role="item",
            bucket_edges=(7.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 240.0),
        ),
        FeatureConfig(
            name="register_days",
            class_id=9,
            dim=dim,
            kind="dense",
            role="user",
            bucket_edges=(30.0, 90.0, 180.0, 365.0, 730.0, 1460.0),
        ),
    )
    return Config(
        preset="kuairand",
        schema=SchemaConfig(
            features=features,
            domains=("main", *(f"tab_{tab}" for tab in range(15))),
            tasks=KUAIRAND_TASKS,
            positive_task="click",
        ),
        tables=(TableConfig(dim=dim, bytes_limit=1 << 20),),
        train=TrainConfig(batch_size=256),
        publish=PublishConfig(rules=RulesConfig(update_limit=20, update_limit_window_s=20)),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "quickstart": quickstart,
    "seesaw": seesaw,
    "paper": paper,
    "one_domain": one_domain,
    "kuairand": kuairand,
}


def preset(name: str) -> Config:
    """Raises: ConfigError naming the closest preset and all that there are."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        meant = f" (did you mean '{close[0]}'?)" if close else ""
        raise ConfigError(f"unknown preset '{name}'{meant}; there are: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
