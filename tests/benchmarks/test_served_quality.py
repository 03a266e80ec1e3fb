"""What several benchmarks say alike: means over tasks, differences paired by seed, figures that repeat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.figures import draw_measures
from benchmarks.served_quality import lost, means, quality
from trainer.compare.expected import expected_gauc
from trainer.metrics import auc, gauc


def test_a_task_of_one_class_counts_in_no_mean_of_auc_and_in_that_of_true_gauc():
    generator = np.random.default_rng(1)
    scores_NT = generator.random((400, 2), dtype=np.float32)
    truth_NT = generator.random((400, 2), dtype=np.float32)
    labels_NT = (generator.random((400, 2)) < truth_NT).astype(np.float32)
    labels_NT[:, 1] = 0.0
    users_N = generator.integers(0, 20, 400)
    found = quality(scores_NT, labels_NT=labels_NT, truth_NT=truth_NT, users_N=users_N)
    assert found["auc"] == auc(scores_NT[:, 0], labels_NT[:, 0])
    assert found["gauc"] == gauc(scores_NT[:, 0], labels_NT[:, 0], users_N)
    of_tasks = [expected_gauc(scores_NT[:, task], truth_NT[:, task], users_N) for task in (0, 1)]
    assert found["true_gauc"] == pytest.approx(np.mean(of_tasks))


def test_what_is_lost_is_paired_by_seed():
    best = [{"auc": 0.70, "gauc": 0.6}, {"auc": 0.80, "gauc": 0.6}]
    own = [{"auc": 0.69, "gauc": 0.6}, {"auc": 0.79, "gauc": 0.6}]
    assert means(own) == {"gauc": 0.6, "auc": 0.74}
    # Seeds differ by ten times as much as the two do, and are not noise here.
    assert lost(best, own) == {"gauc_lost": 0.0, "gauc_95": 0.0, "auc_lost": 0.01, "auc_95": 0.0}
    assert lost(best[:1], own[:1])["auc_95"] is None


def test_equal_rows_give_an_equal_figure(tmp_path: Path):
    rows = [
        {"share": share, "kind": kind, "auc": 0.7, "auc_95": 0.01, "gauc": 0.6, "gauc_95": None}
        for share in (1.0, 0.1)
        for kind in ("scored", "hashed")
    ]
    drawn = [
        draw_measures(
            rows,
            tmp_path / folder / "memory_worth.svg",
            place="share",
            places={1.0: "100%", 0.1: "10%"},
            label="table",
            line="kind",
        ).read_text()
        for folder in ("first", "second")
    ]
    assert drawn[0] == drawn[1]
    assert ">hashed<" in drawn[0]
    assert drawn[0].rstrip().endswith("</svg>")
