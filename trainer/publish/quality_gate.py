"""The quality gate: a version goes out only while training predicts about as well as it did lately.

Predictions are judged before they are trained on (metrics.py), so a model that has gone wrong shows here
before serving has it. The gate remembers the AUC of the last versions published and holds the next one while
AUC is below the best of them by more than a threshold. Its memory is a part of each checkpoint, so that a
restart lets nothing slip through. Every rank holds the same memory and gives the same word.
Shapes: K published versions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from param_server.client import Version, decode_tensors, encode_tensors
from trainer.collectives import Ranks
from trainer.metrics import Columns, QualityWindow, auc

_UNKNOWN = -1
_SCALE = 1e9
"""AUC travels between ranks as a whole number of billionths."""


class QualityGate:
    """Judges versions that are due by the AUC of those that went out."""

    def __init__(self, *, auc_drop_max: float, versions_max: int) -> None:
        self._auc_drop_max = auc_drop_max
        self._published: deque[tuple[Version, float]] = deque(maxlen=versions_max)

    def held_because(self, auc_now: float | None) -> str:
        """Why a version of this AUC may not go out; empty = it may. None = not known: it may."""
        if auc_now is None or not self._published:
            return ""
        best, best_auc = self._best()
        if best_auc - auc_now <= self._auc_drop_max:
            return ""
        return (
            f"windowed AUC {auc_now:.4f} is more than {self._auc_drop_max:g} below the {best_auc:.4f} of "
            f"version {best}"
        )

    def last_good(self) -> Version | None:
        """The best version remembered, of equally good ones the newest; None where serving has it now."""
        best = self._best()[0] if self._published else None
        return None if best is None or best == self._published[-1][0] else best

    def note_published(self, version: Version, auc_then: float | None) -> None:
        """A version is durable. What is not known is not remembered."""
        if auc_then is not None:
            self._published.append((version, auc_then))

    def _best(self) -> tuple[Version, float]:
        return max(self._published, key=lambda one: (one[1], one[0]))

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """For a checkpoint."""
        versions = [(version.generation, version.sequence) for version, _ in self._published]
        return {
            "versions_K2": np.array(versions, np.int64).reshape(-1, 2),
            "auc_K": np.array([value for _, value in self._published], np.float64),
        }

    def restore(
        self, columns_by_rank: Sequence[dict[str, npt.NDArray[Any]]], *, rank: int, world_size: int
    ) -> None:
        """Take over the memory of a saved run; all its ranks had the same.

        Raises: ValueError if the columns do not belong together.
        """
        versions_K2, auc_K = columns_by_rank[0]["versions_K2"], columns_by_rank[0]["auc_K"]
        if versions_K2.shape != (len(auc_K), 2):
            raise ValueError(f"quality gate: {len(auc_K)} values of AUC, versions of {versions_K2.shape}")
        self._published.clear()
        for (generation, sequence), value in zip(versions_K2.tolist(), auc_K.tolist(), strict=True):
            self._published.append((Version(generation, sequence), value))


def joint_auc(window: QualityWindow, *, task: str, num_min: int, ranks: Ranks) -> float | None:
    """The task's AUC in each domain, averaged by the domain's labelled impressions of all ranks. Collective.

    A mean and not one AUC over all: that would move with the mix of domains. The same on every rank, to the
    last bit: rank 0's value counts.
    Returns: None with fewer than num_min labelled impressions, or where no domain has both labels.
    """
    gathered = ranks.gather_bytes(encode_tensors(window.task_columns(task), metadata={}))
    value = None
    if ranks.rank == 0:
        value = _mean_auc(
            [decode_tensors(data, where="metric window")[0] for data in gathered], num_min=num_min
        )
    said = np.array([_UNKNOWN if value is None else round(value * _SCALE)], np.int64)
    agreed = int(ranks.gather(said)[0, 0])
    return None if agreed == _UNKNOWN else agreed / _SCALE


def _mean_auc(windows: list[Columns], *, num_min: int) -> float | None:
    total, num_judged, num_seen = 0.0, 0, 0
    for domain in sorted({name.partition("/")[2] for window in windows for name in window}):
        scores_K, labels_K = (
            np.concatenate([window[name] for window in windows if name in window])
            for name in (f"scores/{domain}", f"labels/{domain}")
        )
        num_seen += len(scores_K)
        if (of_domain := auc(scores_K, labels_K)) is not None:
            total += of_domain * len(scores_K)
            num_judged += len(scores_K)
    return total / num_judged if num_judged and num_seen >= num_min else None
