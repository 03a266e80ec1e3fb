"""Cut and join impressions in columns.

Shapes: N impressions, M chosen impressions, T tasks, L = ids of one jagged column.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainer.config.schema import SchemaConfig
from trainer.stream.columns import Impressions, Jagged


def empty_impressions(schema: SchemaConfig) -> Impressions:
    """No impressions, with every column of the schema: what a rank trains when it has no data."""
    num_tasks = len(schema.tasks)
    return Impressions(
        request_ids_N=np.zeros(0, np.uint64),
        user_ids_N=np.zeros(0, np.int64),
        event_time_ms_N=np.zeros(0, np.int64),
        produced_ms_N=np.zeros(0, np.int64),
        domain_N=np.zeros(0, np.uint8),
        sparse={
            feature.name: Jagged(np.zeros(0, np.int64), np.zeros(0, np.int32))
            for feature in schema.features
            if feature.kind != "dense"
        },
        dense={
            feature.name: np.zeros(0, np.float32) for feature in schema.features if feature.kind == "dense"
        },
        labels_NT=np.zeros((0, num_tasks), np.float32),
        known_NT=np.zeros((0, num_tasks), np.bool_),
    )


def concat_impressions(parts: Sequence[Impressions]) -> Impressions:
    """Join impressions of the same schema in the given order.

    Raises: ValueError without parts (the columns would not be known: use empty_impressions).
    """
    if not parts:
        raise ValueError("at least one part is needed; empty_impressions(schema) makes one without rows")
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Impressions(
        request_ids_N=np.concatenate([part.request_ids_N for part in parts]),
        user_ids_N=np.concatenate([part.user_ids_N for part in parts]),
        event_time_ms_N=np.concatenate([part.event_time_ms_N for part in parts]),
        produced_ms_N=np.concatenate([part.produced_ms_N for part in parts]),
        domain_N=np.concatenate([part.domain_N for part in parts]),
        sparse={
            name: Jagged(
                np.concatenate([part.sparse[name].ids_L for part in parts]),
                np.concatenate([part.sparse[name].lengths_N for part in parts]),
            )
            for name in first.sparse
        },
        dense={name: np.concatenate([part.dense[name] for part in parts]) for name in first.dense},
        labels_NT=np.concatenate([part.labels_NT for part in parts]),
        known_NT=np.concatenate([part.known_NT for part in parts]),
    )


def slice_impressions(impressions: Impressions, start: int, stop: int) -> Impressions:
    """Impressions start..stop-1 as views; bounds beyond the end are cut as in a Python slice."""
    num = len(impressions)
    start, stop, _ = slice(start, stop).indices(num)
    if start == 0 and stop == num:
        return impressions
    stop = max(start, stop)
    return Impressions(
        request_ids_N=impressions.request_ids_N[start:stop],
        user_ids_N=impressions.user_ids_N[start:stop],
        event_time_ms_N=impressions.event_time_ms_N[start:stop],
        produced_ms_N=impressions.produced_ms_N[start:stop],
        domain_N=impressions.domain_N[start:stop],
        sparse={name: _slice_jagged(jagged, start, stop) for name, jagged in impressions.sparse.items()},
        dense={name: values_N[start:stop] for name, values_N in impressions.dense.items()},
        labels_NT=impressions.labels_NT[start:stop],
        known_NT=impressions.known_NT[start:stop],
    )


def select_impressions(impressions: Impressions, chosen_N: npt.NDArray[np.bool_]) -> Impressions:
    """The impressions where the mask is set, in order.

    Raises: ValueError if the mask's length is not the number of impressions.
    """
    if len(chosen_N) != len(impressions):
        raise ValueError(f"mask of {len(chosen_N)} for {len(impressions)} impressions")
    if chosen_N.all():
        return impressions
    return Impressions(
        request_ids_N=impressions.request_ids_N[chosen_N],
        user_ids_N=impressions.user_ids_N[chosen_N],
        event_time_ms_N=impressions.event_time_ms_N[chosen_N],
        produced_ms_N=impressions.produced_ms_N[chosen_N],
        domain_N=impressions.domain_N[chosen_N],
        sparse={
            name: Jagged(
                jagged.ids_L[np.repeat(chosen_N, jagged.lengths_N)],
                jagged.lengths_N[chosen_N],
            )
            for name, jagged in impressions.sparse.items()
        },
        dense={name: values_N[chosen_N] for name, values_N in impressions.dense.items()},
        labels_NT=impressions.labels_NT[chosen_N],
        known_NT=impressions.known_NT[chosen_N],
    )


def _slice_jagged(jagged: Jagged, start: int, stop: int) -> Jagged:
    first = int(jagged.lengths_N[:start].sum(dtype=np.int64))
    last = first + int(jagged.lengths_N[start:stop].sum(dtype=np.int64))
    return Jagged(jagged.ids_L[first:last], jagged.lengths_N[start:stop])
