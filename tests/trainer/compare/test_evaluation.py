"""AUC and GAUC by domain and task are scikit-learn's, and what is not defined is said."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trainer.compare.evaluation import Cell, choosing_auc, evaluate, mean_of
from trainer.errors import DataError

DOMAINS, TASKS = ("a", "b"), ["click", "like", "hate"]


def _data(seed: int, num: int = 600):
    rng = np.random.default_rng(seed)
    # Few distinct scores: most pairs are tied.
    scores = (rng.integers(0, 9, (num, 3)) / 8).astype(np.float32)
    labels = (rng.random((num, 3)) < [0.5, 0.1, 0.02]).astype(np.float32)
    known = rng.random((num, 3)) < 0.9
    return scores, labels, known, rng.integers(0, 2, num).astype(np.uint8), rng.integers(0, 40, num)


def _gauc_by_sklearn(scores, labels, users):
    values, weights, skipped = [], [], 0
    for user in np.unique(users):
        own = users == user
        if len(np.unique(labels[own])) < 2:
            skipped += 1
            continue
        values.append(roc_auc_score(labels[own], scores[own]))
        weights.append(own.sum())
    return (np.average(values, weights=weights) if values else None), skipped


@pytest.mark.parametrize("seed", range(4))
def test_cells_are_scikit_learns(seed):
    scores, labels, known, domain, users = _data(seed)
    cells = evaluate(
        scores,
        labels_NT=labels,
        known_NT=known,
        domain_N=domain,
        users_N=users,
        domains=DOMAINS,
        tasks=TASKS,
    )
    assert [(cell.domain, cell.task) for cell in cells] == [(d, t) for d in DOMAINS for t in TASKS]
    for cell in cells:
        task = TASKS.index(cell.task)
        own = (domain == DOMAINS.index(cell.domain)) & known[:, task]
        assert cell.impressions == own.sum()
        assert cell.positives == labels[own, task].sum() > 0
        assert cell.auc == pytest.approx(roc_auc_score(labels[own, task], scores[own, task]), abs=1e-12)
        value, skipped = _gauc_by_sklearn(scores[own, task], labels[own, task], users[own])
        assert cell.gauc == pytest.approx(value, abs=1e-12)
        assert (cell.users, cell.users_one_class) == (len(np.unique(users[own])), skipped)
        assert skipped > 0 or cell.task == "click"
        assert cell.undefined() is None


def _one(labels, users, known=None):
    num = len(labels)
    (cell,) = evaluate(
        np.linspace(0, 1, num, dtype=np.float32).reshape(num, 1),
        labels_NT=np.array(labels, np.float32).reshape(num, 1),
        known_NT=np.ones((num, 1), np.bool_) if known is None else np.array(known).reshape(num, 1),
        domain_N=np.zeros(num, np.uint8),
        users_N=np.array(users, np.int64),
        domains=("a",),
        tasks=["hate"],
    )
    return cell


@pytest.mark.parametrize(
    ("labels", "users", "known", "why"),
    [
        ([0, 0], [1, 2], None, "no positives in the slice, AUC and GAUC are not defined"),
        ([1, 1], [1, 2], None, "no negatives in the slice, AUC and GAUC are not defined"),
        ([1, 0], [1, 1], [False, False], "no impressions in the slice, AUC and GAUC are not defined"),
        ([], [], None, "no impressions in the slice"),
        ([1, 0], [1, 2], None, "no user has both classes, GAUC is not defined"),
    ],
)
def test_an_undefined_metric_is_none_and_says_why(labels, users, known, why):
    cell = _one(labels, users, known)
    assert cell.gauc is None
    assert (cell.auc is None) == ("AUC and" in why or "no imp" in why)
    assert f"a/hate: {why}" in (cell.undefined() or "")


def test_labels_and_scores_of_another_kind_are_refused():
    with pytest.raises(DataError, match=r"label 'hate' must be 0 or 1, found 0\.5"):
        _one([0.5, 1], [1, 1])
    with pytest.raises(
        ValueError, match=r"scores \(2, 1\), labels \(2, 2\) and known \(2, 1\) must be \[2, 1\]"
    ):
        evaluate(
            np.zeros((2, 1)),
            labels_NT=np.zeros((2, 2)),
            known_NT=np.ones((2, 1), np.bool_),
            domain_N=np.zeros(2, np.uint8),
            users_N=np.zeros(2, np.int64),
            domains=("a",),
            tasks=["hate"],
        )
    with pytest.raises(ValueError, match="1 scores are not finite: the model diverged"):
        evaluate(
            np.array([[np.nan], [0.5]]),
            labels_NT=np.zeros((2, 1)),
            known_NT=np.ones((2, 1), np.bool_),
            domain_N=np.zeros(2, np.uint8),
            users_N=np.zeros(2, np.int64),
            domains=("a",),
            tasks=["hate"],
        )


def test_an_epoch_is_chosen_by_cells_as_far_as_they_are_sure():
    def cell(auc, positives):
        counts = {"impressions": 1000, "positives": positives, "users": 9, "users_one_class": 0}
        return Cell(domain="a", task="click", auc=auc, gauc=None, **counts)

    cells = [cell(0.7, 400), cell(0.5, 4), cell(0.8, 1000 - 100), cell(None, 0)]
    assert choosing_auc(cells) == pytest.approx((0.7 * 20 + 0.5 * 2 + 0.8 * 10) / 32)
    assert choosing_auc([cell(None, 0)]) is None


def test_mean_leaves_out_what_is_not_defined():
    assert mean_of([0.5, None, 0.7]) == pytest.approx(0.6)
    assert mean_of([None]) is None
