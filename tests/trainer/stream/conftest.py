"""A small schema, impressions for it, and writing them to a broker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from kafka import KafkaProducer

from trainer.config.config import KafkaConfig
from trainer.config.schema import FeatureConfig, SchemaConfig, TaskConfig
from trainer.stream.broker import Security, connect_options
from trainer.stream.columns import Impressions, Jagged

MakeImpressions = Callable[..., Impressions]


@pytest.fixture(scope="session")
def schema() -> SchemaConfig:
    return SchemaConfig(
        features=(
            FeatureConfig(name="domain", class_id=1, dim=4),
            FeatureConfig(name="user_id", class_id=2, dim=4),
            FeatureConfig(name="item_id", class_id=3, dim=4),
            FeatureConfig(name="tags", class_id=4, dim=4, kind="multi", ids_max=4),
            FeatureConfig(name="age_h", class_id=5, dim=4, kind="dense", bucket_edges=(1.0, 2.0)),
        ),
        domains=("home", "slide"),
        tasks=(TaskConfig(name="click"), TaskConfig(name="like")),
        positive_task="click",
    )


@pytest.fixture(scope="session")
def make_impressions() -> MakeImpressions:
    """`make(num, first=0)`: request ids count up from `first`, everything else is drawn from it."""

    def make(num: int, first: int = 0, produced_ms: int = 0) -> Impressions:
        rng = np.random.default_rng([num, first])
        domain_N = rng.integers(0, 2, num).astype(np.uint8)
        user_ids_N = rng.integers(-(2**63), 2**63 - 1, num)
        lengths_N = rng.integers(0, 5, num).astype(np.int32)
        ones_N = np.ones(num, np.int32)
        known_NT = rng.random((num, 2)) < 0.7
        labels_NT = (rng.random((num, 2)) < 0.5) & known_NT
        return Impressions(
            request_ids_N=np.arange(first, first + num, dtype=np.uint64),
            user_ids_N=user_ids_N,
            event_time_ms_N=rng.integers(1, 1_700_000_000_000, num),
            produced_ms_N=np.full(num, produced_ms),
            domain_N=domain_N,
            sparse={
                "domain": Jagged(domain_N.astype(np.int64), ones_N),
                "user_id": Jagged(user_ids_N, ones_N),
                "item_id": Jagged(rng.integers(0, 2**52, num), ones_N),
                "tags": Jagged(rng.integers(0, 100, int(lengths_N.sum())), lengths_N),
            },
            dense={"age_h": rng.standard_normal(num).astype(np.float32)},
            labels_NT=labels_NT.astype(np.float32),
            known_NT=known_NT,
        )

    return make


@pytest.fixture(scope="session")
def kafka_config() -> Callable[..., KafkaConfig]:
    """`config(broker, topic, **changes)`"""

    def config(broker: object, topic: str, **changes: object) -> KafkaConfig:
        settings: dict[str, object] = {
            "bootstrap_servers": broker.bootstrap_servers,  # type: ignore[attr-defined]
            "topic": topic,
            "dead_letter_topic": f"{topic}-dead",
            "group": f"group-{topic}",
            "start_timeout_s": 30,
        }
        return KafkaConfig(**(settings | changes))  # type: ignore[arg-type]

    return config


@pytest.fixture(scope="session")
def send_values() -> Callable[..., None]:
    """`send(config, [(partition, value, timestamp_ms), ...])`, in that order, all stored on return."""

    def send(config: KafkaConfig, values: Sequence[tuple[int, bytes, int]]) -> None:
        options = connect_options(config.bootstrap_servers, security=Security(), timeout_s=30)
        producer = KafkaProducer(**options, acks="all", linger_ms=5, max_request_size=1 << 24)
        sent = [
            producer.send(config.topic, value=value, partition=partition, timestamp_ms=timestamp_ms)
            for partition, value, timestamp_ms in values
        ]
        for answer in sent:
            answer.get(timeout=30)
        producer.close()

    return send
