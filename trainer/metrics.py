"""Predict-then-train quality: AUC and GAUC by domain and task over a sliding window.

Shapes: N impressions, T tasks, W window. Every impression is judged by the prediction that was made
before it was trained (Monolith's protocol, arXiv 2209.07663).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.run.status import Quality

Columns = dict[str, npt.NDArray[Any]]


def auc(scores_N: npt.NDArray[np.floating], labels_N: npt.NDArray[np.number]) -> float | None:
    """Area under the ROC curve; tied scores count half.

    Args: scores_N: compared as float32. labels_N: 0 or 1, any dtype.
    Returns: None where it is not defined (no positives or no negatives).
    """
    return _gauc(scores_N, labels_N, np.zeros(len(scores_N), np.int64))


def gauc(
    scores_N: npt.NDArray[np.floating],
    labels_N: npt.NDArray[np.number],
    users_N: npt.NDArray[np.integer],
) -> float | None:
    """AUC per user, averaged with the users' impressions as weights; users with one class are skipped.

    Args: scores_N: compared as float32. labels_N: 0 or 1, any dtype.
    Returns: None where no user has both classes.
    """
    _, user_N = np.unique(users_N, return_inverse=True)
    return _gauc(scores_N, labels_N, user_N)


def _gauc(
    scores_N: npt.NDArray[np.floating],
    labels_N: npt.NDArray[np.number],
    user_N: npt.NDArray[np.int64],
) -> float | None:
    """gauc of users that are numbered from 0 to less than 2^31."""
    if len(scores_N) == 0:
        return None
    # User, score and label in one integer: a plain sort takes a tenth of the time of sorting places.
    packed_N = user_N.astype(np.uint64) << np.uint64(33)
    packed_N |= _in_order(scores_N).astype(np.uint64) << np.uint64(1)
    packed_N |= (labels_N > 0.5).astype(np.uint64)
    packed_N.sort()
    positive_N = (packed_N & np.uint64(1)).astype(np.int64)
    user_start_U = np.flatnonzero(_begins(packed_N >> np.uint64(33)))
    begins_tie_N = _begins(packed_N >> np.uint64(1))
    tie_start_G = np.flatnonzero(begins_tie_N)

    shown_U = np.diff(user_start_U, append=len(packed_N))
    positive_U = np.add.reduceat(positive_N, user_start_U)
    negative_U = shown_U - positive_U
    # Of each positive: the negatives of its user with a lower score, and half of those with the same.
    positive_G = np.add.reduceat(positive_N, tie_start_G)
    negative_G = np.diff(tie_start_G, append=len(packed_N)) - positive_G
    first_tie_U = np.cumsum(begins_tie_N)[user_start_U] - 1
    negative_before_G = np.cumsum(negative_G) - negative_G
    twice_won_G = positive_G * (2 * negative_before_G + negative_G)
    twice_won_U = np.add.reduceat(twice_won_G, first_tie_U)
    twice_won_U -= 2 * positive_U * negative_before_G[first_tie_U]
    both_U = (positive_U > 0) & (negative_U > 0)
    if not both_U.any():
        return None
    auc_U = twice_won_U[both_U] / (2.0 * positive_U[both_U] * negative_U[both_U])
    return float(np.average(auc_U, weights=shown_U[both_U]))


def _in_order(scores_N: npt.NDArray[np.floating]) -> npt.NDArray[np.uint32]:
    """Integers in the order of the scores, equal where they are."""
    # Adding zero makes one zero of two.
    bits_N = (scores_N.astype(np.float32) + np.float32(0.0)).view(np.uint32)
    sign = np.uint32(1 << 31)
    return np.where(bits_N & sign, ~bits_N, bits_N | sign)


def _begins(sorted_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Where a run of equal values begins; at least one value."""
    begins_N = np.ones(len(sorted_N), np.bool_)
    np.not_equal(sorted_N[1:], sorted_N[:-1], out=begins_N[1:])
    return begins_N


class QualityWindow:
    """The newest predictions of each domain: a ring of `window` impressions a domain."""

    def __init__(self, *, domains: tuple[str, ...], tasks: list[str], window: int) -> None:
        self._domains, self._tasks, self._window = domains, tasks, window
        num_domains, num_tasks = len(domains), len(tasks)
        self._scores_DWT = np.zeros((num_domains, window, num_tasks), np.float32)
        self._labels_DWT = np.zeros((num_domains, window, num_tasks), np.uint8)
        self._known_DWT = np.zeros((num_domains, window, num_tasks), np.bool_)
        self._users_DW = np.zeros((num_domains, window), np.int64)
        self._num_seen_D = np.zeros(num_domains, np.int64)

    def add(
        self,
        scores_NT: npt.NDArray[np.floating],
        *,
        labels_NT: npt.NDArray[np.floating],
        known_NT: npt.NDArray[np.bool_],
        domain_N: npt.NDArray[np.integer],
        users_N: npt.NDArray[np.int64],
    ) -> None:
        """Take in predictions in stream order; beyond the window the oldest are forgotten."""
        for domain in np.unique(domain_N):
            row_M = np.flatnonzero(domain_N == domain)
            first = int(self._num_seen_D[domain]) + max(0, len(row_M) - self._window)
            self._num_seen_D[domain] += len(row_M)
            row_M = row_M[-self._window :]
            place_M = (first + np.arange(len(row_M))) % self._window
            self._scores_DWT[domain, place_M] = scores_NT[row_M]
            self._labels_DWT[domain, place_M] = labels_NT[row_M] > 0.5
            self._known_DWT[domain, place_M] = known_NT[row_M]
            self._users_DW[domain, place_M] = users_N[row_M]

    def columns(self) -> Columns:
        """The filled part of each domain's ring, for checkpoints and for merging over ranks; views."""
        columns: Columns = {"num_seen": self._num_seen_D, "window": np.array([self._window], np.int64)}
        for index, domain in enumerate(self._domains):
            num = int(min(self._num_seen_D[index], self._window))
            for name, ring in self._rings().items():
                if num:
                    columns[f"{name}/{domain}"] = ring[index, :num]
        return columns

    def task_columns(self, task: str) -> Columns:
        """Scores and labels of one task where they are known, by domain: what its AUC needs."""
        index_T = self._tasks.index(task)
        columns: Columns = {}
        for index, domain in enumerate(self._domains):
            num = int(min(self._num_seen_D[index], self._window))
            known_K = self._known_DWT[index, :num, index_T].astype(np.bool_)
            if known_K.any():
                columns[f"scores/{domain}"] = self._scores_DWT[index, :num, index_T][known_K]
                columns[f"labels/{domain}"] = self._labels_DWT[index, :num, index_T][known_K]
        return columns

    def _rings(self) -> Columns:
        return {
            "scores": self._scores_DWT,
            "labels": self._labels_DWT,
            "known": self._known_DWT,
            "users": self._users_DW,
        }

    def restore(self, columns_by_rank: Sequence[Columns], *, rank: int, world_size: int) -> None:
        """Take over the windows of a saved run.

        With the same window and ranks this is exact. Otherwise the windows of all ranks are merged, the
        newest kept, and dealt out in turn, so that together the ranks judge by the same impressions. The k-th
        newest of each rank count as equally old: ranks train in step.
        Raises: ValueError if they are of other domains or tasks.
        """
        for columns in columns_by_rank:
            self._check_alike(columns)
        sizes = {int(columns["window"][0]) for columns in columns_by_rank}
        if len(columns_by_rank) == world_size and sizes == {self._window}:
            np.copyto(self._num_seen_D, columns_by_rank[rank]["num_seen"])
            self._fill(columns_by_rank[rank])
            return
        self._num_seen_D[:] = 0
        for index, domain in enumerate(self._domains):
            owners_M, places_M = _newest_places(
                [int(columns["num_seen"][index]) for columns in columns_by_rank],
                [int(columns["window"][0]) for columns in columns_by_rank],
                num_max=self._window * world_size,
            )
            owners_K, places_K = owners_M[rank::world_size], places_M[rank::world_size]
            self._num_seen_D[index] = len(owners_K)
            for name, ring in self._rings().items():
                for owner, columns in enumerate(columns_by_rank):
                    mine_K = owners_K == owner
                    if mine_K.any():
                        ring[index, : len(owners_K)][mine_K] = columns[f"{name}/{domain}"][places_K[mine_K]]

    def _check_alike(self, columns: Columns) -> None:
        known = {f"{name}/{domain}" for name in self._rings() for domain in self._domains}
        unknown = sorted(name for name in columns if "/" in name and name not in known)
        num_tasks = {ring.shape[1] for name, ring in columns.items() if name.startswith("scores/")}
        shape = columns["num_seen"].shape
        if unknown or shape != self._num_seen_D.shape or not num_tasks <= {len(self._tasks)}:
            raise ValueError(
                f"metric window: expected domains {list(self._domains)} and {len(self._tasks)} tasks, found "
                f"{shape[0]} domains, {sorted(num_tasks)} tasks and unknown columns {unknown[:3]}"
            )

    def _fill(self, columns: Columns) -> None:
        for index, domain in enumerate(self._domains):
            for name, ring in self._rings().items():
                if (part := columns.get(f"{name}/{domain}")) is not None:
                    ring[index, : len(part)] = part

    def qualities(self) -> tuple[Quality, Quality]:
        """(AUC, GAUC) by domain and task; domains without impressions are left out."""
        return joint_qualities([self.columns()], domains=self._domains, tasks=self._tasks)


def _newest_places(
    num_seen_R: list[int], window_R: list[int], *, num_max: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The newest num_max entries of R rings of one domain, from old to new: (whose, place in its ring)."""
    owners, places, ages = [], [], []
    for owner, (num_seen, window) in enumerate(zip(num_seen_R, window_R, strict=True)):
        num = min(num_seen, window)
        ages.append(np.arange(num, 0, -1))
        owners.append(np.full(num, owner, np.int64))
        # Of a ring that is full the oldest lies where the next would go.
        places.append((num_seen - num + np.arange(num)) % window)
    order_M = np.argsort(-np.concatenate(ages), kind="stable")[-num_max:]
    return np.concatenate(owners)[order_M], np.concatenate(places)[order_M]


def joint_qualities(
    windows: list[Columns], *, domains: tuple[str, ...], tasks: list[str]
) -> tuple[Quality, Quality]:
    """(AUC, GAUC) over the windows of all ranks together.

    Args: windows: QualityWindow.columns() of each rank.
    """
    aucs: Quality = {}
    gaucs: Quality = {}
    for domain in domains:
        seen = [window for window in windows if f"scores/{domain}" in window]
        if not seen:
            continue
        scores_MT, labels_MT, known_MT, users_M = (
            np.concatenate([window[f"{name}/{domain}"] for window in seen])
            for name in ("scores", "labels", "known", "users")
        )
        aucs[domain], gaucs[domain] = {}, {}
        _, user_M = np.unique(users_M, return_inverse=True)
        for task_index, task in enumerate(tasks):
            known_M = known_MT[:, task_index].astype(np.bool_)
            scores_K, labels_K = scores_MT[known_M, task_index], labels_MT[known_M, task_index]
            aucs[domain][task] = auc(scores_K, labels_K)
            gaucs[domain][task] = _gauc(scores_K, labels_K, user_M[known_M])
    return aucs, gaucs
