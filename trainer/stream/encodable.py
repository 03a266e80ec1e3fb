"""Impressions that a producer made, looked over before they become bytes, where a mistake could not be seen.

Shapes: N impressions, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.config.schema import BUILT_IN, SchemaConfig
from trainer.stream.columns import Impressions

Array = npt.NDArray[Any]


def check_encodable(impressions: Impressions, schema: SchemaConfig) -> None:
    """Everything that the schema asks for is there, in the right shape, and would not be changed by encoding.

    Raises: ValueError naming the column that is missing, is not of one entry for each impression, or holds an
        id that is no integer, a domain that the schema does not have, or a known label other than 0 and 1.
    """
    _check_present(impressions, schema)
    num, num_tasks = len(impressions), len(schema.tasks)
    integers: dict[str, Array] = {
        "request_ids_N": impressions.request_ids_N,
        "user_ids_N": impressions.user_ids_N,
        "event_time_ms_N": impressions.event_time_ms_N,
        "domain_N": impressions.domain_N,
    }
    expected: dict[str, tuple[Array, tuple[int, ...]]] = {
        **{name: (values, (num,)) for name, values in integers.items()},
        "labels_NT": (impressions.labels_NT, (num, num_tasks)),
        "known_NT": (impressions.known_NT, (num, num_tasks)),
    }
    for feature in schema.features:
        name = feature.name
        if feature.kind == "dense":
            expected[f"dense['{name}']"] = impressions.dense[name], (num,)
        elif name not in BUILT_IN:
            ids, lengths = f"sparse['{name}'].ids_L", f"sparse['{name}'].lengths_N"
            jagged = impressions.sparse[name]
            integers |= {ids: jagged.ids_L, lengths: jagged.lengths_N}
            expected[lengths] = jagged.lengths_N, (num,)
            expected[ids] = jagged.ids_L, (int(jagged.lengths_N.sum()),)
    for name, values in integers.items():
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name}: expected integers, found {values.dtype}")
    for name, (values, shape) in expected.items():
        if values.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {values.shape}")
    _check_domains(impressions.domain_N, schema)
    _check_labels(impressions, schema)


def _check_present(impressions: Impressions, schema: SchemaConfig) -> None:
    for feature in schema.features:
        is_dense = feature.kind == "dense"
        columns: Mapping[str, object] = impressions.dense if is_dense else impressions.sparse
        if feature.name not in columns and feature.name not in BUILT_IN:
            there = ", ".join(sorted(columns)) or "none"
            kind = "dense" if is_dense else "sparse"
            raise ValueError(f"{kind}['{feature.name}'] is missing; the impressions have: {there}")


def _check_domains(domain_N: npt.NDArray[np.uint8], schema: SchemaConfig) -> None:
    wrong_W = np.flatnonzero((domain_N < 0) | (domain_N >= len(schema.domains)))
    if len(wrong_W):
        raise ValueError(
            f"domain_N: impression {int(wrong_W[0])} has {int(domain_N[wrong_W[0]])}, expected an index into "
            f"the schema's {len(schema.domains)} domains"
        )


def _check_labels(impressions: Impressions, schema: SchemaConfig) -> None:
    labels_NT = impressions.labels_NT
    wrong_NT = (impressions.known_NT != 0) & (labels_NT != 0) & (labels_NT != 1)
    if wrong_NT.any():
        row, task = map(int, np.argwhere(wrong_NT)[0])
        raise ValueError(
            f"labels_NT: impression {row} has {labels_NT[row, task]:g} for task '{schema.task_names[task]}'; "
            "a known label is 0 or 1"
        )
