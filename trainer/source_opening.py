"""Open a rank's source so that all ranks see one topic: their shares follow from its number of partitions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from trainer.collectives import Ranks
from trainer.errors import StreamError
from trainer.stream.columns import Position
from trainer.stream.source import KafkaSource

SOURCE_ATTEMPTS_MAX = 20
SOURCE_RETRY_S = 0.5

OpenSource = Callable[[Iterable[Position], str], KafkaSource]
"""Reads on from positions of the topic with that id ("" = not known)."""


def open_alike(
    open_source: OpenSource, positions: Iterable[Position], *, topic_id: str, topic: str, ranks: Ranks
) -> KafkaSource:
    """Collective.

    Raises: StreamError if the ranks do not see one topic with equally many partitions.
    """
    positions = tuple(positions)
    for _ in range(SOURCE_ATTEMPTS_MAX):
        source = open_source(positions, topic_id)
        seen_R = ranks.gather(np.array([source.num_partitions], np.int64))[:, 0]
        if seen_R.min() == seen_R.max():
            return source
        # The topic is growing right now: some brokers know it already, others not.
        source.close()
        time.sleep(SOURCE_RETRY_S)
    raise StreamError(
        f"topic '{topic}': ranks see {seen_R.tolist()} partitions; the brokers do not "
        "agree. Wait until they do and start again"
    )
