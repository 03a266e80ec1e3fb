"""Loss scaling by task: each task's loss over its running rate of positives (train.task_scaling).

Tasks differ by hundreds in how often they are positive: Click in half of all impressions, Hate in one of a
thousand. Early, a task's summed loss gradient is about its number of positives; divided by their rate all
tasks pull equally hard. The rate is what was trained before this batch, so that a step depends on the steps
before it and on nothing else.
Shapes: T tasks, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

WINDOW = 1_000_000
"""Known labels of a task that its rate is of: older ones fade, so that it follows a stream that changes."""


class TaskRates:
    """Positives and known labels of each task over all ranks; the same on every rank."""

    def __init__(self, num_tasks: int) -> None:
        self._positives_T = np.zeros(num_tasks, np.float64)
        self._known_T = np.zeros(num_tasks, np.float64)

    def add(self, positives_T: npt.NDArray[np.float64], known_T: npt.NDArray[np.float64]) -> None:
        """Count a batch of all ranks. Until WINDOW labels are known the counts are exact."""
        room_T = np.maximum(WINDOW - known_T, 0.0)
        kept_T = np.minimum(1.0, room_T / np.maximum(self._known_T, 1.0))
        self._positives_T = self._positives_T * kept_T + positives_T
        self._known_T = self._known_T * kept_T + known_T

    def scales(self) -> npt.NDArray[np.float64]:
        """1 / rate of each task, [T].

        One positive and one negative are added (Laplace's rule): a task that has had n labels and no positive
        yet gets n + 2 and not infinity, one without labels 2.
        """
        return (self._known_T + 2.0) / (self._positives_T + 1.0)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        return {"positives": self._positives_T, "known": self._known_T}

    def restore(
        self, columns_by_rank: Sequence[dict[str, npt.NDArray[Any]]], *, rank: int, world_size: int
    ) -> None:
        """Any rank's will do. Raises: ValueError if it is not float64 [T] twice."""
        columns = columns_by_rank[0]
        for name in ("positives", "known"):
            column, expected = columns.get(name), self._known_T.shape
            if column is None or column.dtype != np.float64 or column.shape != expected:
                found = "nothing" if column is None else f"{column.dtype} {list(column.shape)}"
                raise ValueError(f"task rates: '{name}': expected float64 {list(expected)}, found {found}")
        self._positives_T, self._known_T = columns["positives"].copy(), columns["known"].copy()
