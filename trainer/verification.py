"""Predictions of the trainer's final state, written down so that replicas can be held against them."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from param_server.client import encode_tensors
from trainer.config.schema import SchemaConfig
from trainer.features import request_columns
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions
from trainer.stream.slicing import concat_impressions, empty_impressions, slice_impressions

VERIFY_IMPRESSIONS = 1024


class RecentImpressions:
    """The newest impressions that this rank trained; at most a batch more than VERIFY_IMPRESSIONS."""

    def __init__(self) -> None:
        self._parts: deque[Impressions] = deque()

    def add(self, impressions: Impressions) -> None:
        if len(impressions):
            self._parts.append(impressions)
        while self._parts and sum(map(len, self._parts)) - len(self._parts[0]) >= VERIFY_IMPRESSIONS:
            self._parts.popleft()

    def pieces(self, num_rows: int, *, schema: SchemaConfig) -> list[Impressions]:
        """The newest VERIFY_IMPRESSIONS, num_rows a piece; as many pieces on every rank, some empty."""
        empty = empty_impressions(schema)
        joined = concat_impressions(list(self._parts)) if self._parts else empty
        return [
            slice_impressions(joined, start, start + num_rows)
            for start in range(0, VERIFY_IMPRESSIONS, num_rows)
        ]


def write_verification(
    recommender: Recommender,
    *,
    recent: list[Impressions],
    schema: SchemaConfig,
    version: str,
    path: Path | None,
) -> None:
    """Predict `recent` and write inputs ("in.<name>") and outputs ("out.<task>"). Collective.

    Args: recent: pieces of at most a batch, as many on every rank. path: None = only take part.
    """
    predicted_NT = np.concatenate([recommender.predict(piece) for piece in recent])
    if path is None:
        return
    joined = concat_impressions(recent)
    tensors: dict[str, npt.NDArray[Any]] = {
        f"in.{name}": column for name, column in request_columns(joined, schema).items()
    }
    for index, task in enumerate(schema.task_names):
        tensors[f"out.{task}"] = np.ascontiguousarray(predicted_NT[:, index])
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(encode_tensors(tensors, metadata={"version": version}))
    os.replace(temporary, path)
