"""AUC and GAUC against scikit-learn and a loop over users."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trainer.metrics import QualityWindow, auc, gauc, joint_qualities


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_scores", [3, 50, 10**6])
def test_auc_equals_scikit_learn_with_ties(seed: int, num_scores: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, num_scores, 500) / num_scores
    labels = rng.random(500) < 0.3
    assert auc(scores, labels.astype(float)) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("num_scores", [4, 10**6])
def test_gauc_equals_the_weighted_mean_over_users(num_scores: int) -> None:
    rng = np.random.default_rng(7)
    scores = rng.integers(0, num_scores, 2000) / num_scores
    users = rng.zipf(1.5, 2000) % 97
    labels = (rng.random(2000) < 0.3).astype(np.float32)
    total, weight = 0.0, 0
    for user in np.unique(users):
        mine = users == user
        if 0 < labels[mine].sum() < mine.sum():
            total += mine.sum() * roc_auc_score(labels[mine], scores[mine])
            weight += mine.sum()
    assert gauc(scores, labels, users) == pytest.approx(total / weight, abs=1e-12)


def test_quality_is_undefined_without_both_classes() -> None:
    ones = np.ones(4)
    assert auc(np.arange(4.0), ones) is None
    assert auc(np.zeros(0), np.zeros(0)) is None
    assert gauc(np.arange(4.0), np.array([0, 1, 0, 1.0]), np.arange(4)) is None
    assert gauc(np.zeros(0), np.zeros(0), np.zeros(0, np.int64)) is None


def make_window(window: int) -> QualityWindow:
    return QualityWindow(domains=("a", "b"), tasks=["click", "like"], window=window)


def test_window_keeps_the_newest_of_each_domain_and_only_known_labels() -> None:
    rng = np.random.default_rng(3)
    num, window = 700, 150
    scores = rng.random((num, 2)).astype(np.float32)
    labels = (rng.random((num, 2)) < 0.4).astype(np.float32)
    known = rng.random((num, 2)) < 0.8
    domain = (rng.random(num) < 0.2).astype(np.uint8)
    users = rng.integers(0, 30, num)
    quality = make_window(window)
    start = 0
    while start < num:
        end = min(num, start + int(rng.integers(1, 400)))
        quality.add(
            scores[start:end],
            labels_NT=labels[start:end],
            known_NT=known[start:end],
            domain_N=domain[start:end],
            users_N=users[start:end],
        )
        start = end
    aucs, gaucs = quality.qualities()
    for index, name in enumerate(("a", "b")):
        mine = np.flatnonzero(domain == index)[-window:]
        for task, task_name in enumerate(("click", "like")):
            rows = mine[known[mine, task]]
            assert aucs[name][task_name] == pytest.approx(
                roc_auc_score(labels[rows, task], scores[rows, task])
            )
            assert gaucs[name][task_name] == gauc(scores[rows, task], labels[rows, task], users[rows])


def test_window_without_impressions_of_a_domain_says_nothing_about_it() -> None:
    assert make_window(10).qualities() == ({}, {})


def random_impressions(num: int, *, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "scores_NT": rng.random((num, 2)).astype(np.float32),
        "labels_NT": (rng.random((num, 2)) < 0.4).astype(np.float32),
        "known_NT": rng.random((num, 2)) < 0.8,
        "domain_N": (rng.random(num) < 0.3).astype(np.uint8),
        "users_N": np.arange(num),
    }


def add(window: QualityWindow, impressions: dict[str, np.ndarray], rows: slice) -> None:
    window.add(
        impressions["scores_NT"][rows], **{k: v[rows] for k, v in impressions.items() if k != "scores_NT"}
    )


def users_held(windows: list[QualityWindow], domain: str) -> list[int]:
    columns = [window.columns() for window in windows]
    return sorted(int(user) for one in columns for user in one.get(f"users/{domain}", np.zeros(0)))


def test_window_restores_exactly_what_it_saved() -> None:
    """A ring that has gone round, to its last byte: the next impression replaces the same one."""
    impressions = random_impressions(130, seed=1)
    saved, restored = make_window(25), make_window(25)
    add(saved, impressions, slice(0, 100))
    restored.restore([saved.columns()], rank=0, world_size=1)
    for window in (saved, restored):
        add(window, impressions, slice(100, 130))
    assert saved.columns().keys() == restored.columns().keys()
    for name, column in saved.columns().items():
        np.testing.assert_array_equal(restored.columns()[name], column, err_msg=name)


@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(2, 1), (1, 3), (3, 2), (4, 4)])
@pytest.mark.parametrize("window_after", [6, 12])
def test_windows_for_another_number_of_ranks_keep_the_newest(
    ranks_before: int, ranks_after: int, window_after: int
) -> None:
    """Ranks that took the impressions in turn: together the newest of each domain, each once."""
    num = 240
    impressions = random_impressions(num, seed=2)
    impressions["domain_N"] = (np.arange(num) // ranks_before % 2).astype(np.uint8)
    before = [make_window(12) for _ in range(ranks_before)]
    for rank, window in enumerate(before):
        for start in range(rank, num, ranks_before):
            add(window, impressions, slice(start, start + 1))
    after = [make_window(window_after) for _ in range(ranks_after)]
    for rank, window in enumerate(after):
        window.restore([one.columns() for one in before], rank=rank, world_size=ranks_after)
    num_kept = min(12 * ranks_before, window_after * ranks_after)
    for index, domain in enumerate(("a", "b")):
        newest = np.flatnonzero(impressions["domain_N"] == index)[-num_kept:]
        assert users_held(after, domain) == newest.tolist()
    for window in after:
        columns = window.columns()
        for domain in ("a", "b"):
            rows = columns[f"users/{domain}"]
            np.testing.assert_array_equal(columns[f"scores/{domain}"], impressions["scores_NT"][rows])
            np.testing.assert_array_equal(columns[f"known/{domain}"], impressions["known_NT"][rows])
        add(window, impressions, slice(0, 3))


def test_window_of_other_domains_or_tasks_is_refused() -> None:
    saved = make_window(10)
    add(saved, random_impressions(5, seed=3), slice(0, 5))
    for other in (
        QualityWindow(domains=("a", "c"), tasks=["click", "like"], window=10),
        QualityWindow(domains=("a", "b"), tasks=["click"], window=10),
        QualityWindow(domains=("a", "b", "c"), tasks=["click", "like"], window=10),
    ):
        with pytest.raises(ValueError, match="metric window: expected domains"):
            other.restore([saved.columns()], rank=0, world_size=1)
        assert other.qualities() == ({}, {})


def test_windows_of_ranks_together_are_one_window() -> None:
    rng = np.random.default_rng(5)
    num = 400
    scores = rng.random((num, 2)).astype(np.float32)
    labels = (rng.random((num, 2)) < 0.4).astype(np.float32)
    known = rng.random((num, 2)) < 0.8
    domain = (rng.random(num) < 0.3).astype(np.uint8)
    users = rng.integers(0, 30, num)
    whole, parts = make_window(num), [make_window(num), make_window(num)]
    for part, rows in ((whole, slice(None)), (parts[0], slice(0, None, 2)), (parts[1], slice(1, None, 2))):
        part.add(
            scores[rows],
            labels_NT=labels[rows],
            known_NT=known[rows],
            domain_N=domain[rows],
            users_N=users[rows],
        )
    joint = joint_qualities([part.columns() for part in parts], domains=("a", "b"), tasks=["click", "like"])
    for found, expected in zip(joint, whole.qualities(), strict=True):
        assert set(found) == {"a", "b"}
        for name in found:
            assert found[name] == pytest.approx(expected[name])
