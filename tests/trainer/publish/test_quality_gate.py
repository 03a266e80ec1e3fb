"""The gate holds a version that predicts worse than those published lately, and says why."""

from __future__ import annotations

import numpy as np
import pytest

from param_server.client import Version
from trainer.collectives import Ranks
from trainer.metrics import QualityWindow, auc
from trainer.publish.quality_gate import QualityGate, joint_auc


def gate_of(*aucs: float, versions_max: int = 3) -> QualityGate:
    gate = QualityGate(auc_drop_max=0.05, versions_max=versions_max)
    for index, value in enumerate(aucs):
        gate.note_published(Version(1, index + 1), value)
    return gate


@pytest.mark.parametrize(
    ("published", "now", "held"),
    [
        ((), 0.1, False),
        ((0.7,), None, False),
        ((0.7, 0.8), 0.76, False),
        ((0.7, 0.8), 0.751, False),
        ((0.8, 0.7), 0.74, True),
        ((0.7, 0.8), 0.9, False),
        ((0.9, 0.7, 0.7, 0.7), 0.66, False),  # the best has left the window of three
    ],
)
def test_a_version_is_held_when_auc_fell_by_more_than_the_threshold(
    published: tuple[float, ...], now: float | None, held: bool
) -> None:
    assert bool(gate_of(*published).held_because(now)) == held


def test_the_word_of_the_gate_has_both_values_and_the_version() -> None:
    assert gate_of(0.7, 0.8).held_because(0.6) == (
        "windowed AUC 0.6000 is more than 0.05 below the 0.8000 of version 1.2"
    )


def test_the_last_good_version_is_the_best_one_that_serving_does_not_have_already() -> None:
    assert gate_of(0.7, 0.8, 0.6).last_good() == Version(1, 2)
    assert gate_of(0.8, 0.8, 0.6).last_good() == Version(1, 2), "of equally good ones the newest"
    assert gate_of(0.6, 0.7).last_good() is None
    assert gate_of().last_good() is None


def test_what_is_not_known_is_not_remembered() -> None:
    gate = gate_of(0.8)
    gate.note_published(Version(1, 2), None)
    assert gate.held_because(0.6).endswith("version 1.1")


@pytest.mark.parametrize("aucs", [(), (0.8, 0.7)])
def test_memory_goes_through_a_checkpoint(aucs: tuple[float, ...]) -> None:
    saved = gate_of(*aucs).columns()
    restored = gate_of(0.1)
    restored.restore([saved, saved], rank=0, world_size=1)
    assert restored.held_because(0.6) == gate_of(*aucs).held_because(0.6)
    assert restored.last_good() == gate_of(*aucs).last_good()
    saved["auc_K"] = np.zeros(7)
    with pytest.raises(ValueError, match="quality gate: 7 values of AUC"):
        restored.restore([saved], rank=0, world_size=1)


def window_of(domain_N: np.ndarray, scores_N: np.ndarray, labels_N: np.ndarray) -> QualityWindow:
    window = QualityWindow(domains=("a", "b"), tasks=["other", "click"], window=500)
    window.add(
        np.stack([np.zeros(len(scores_N)), scores_N], axis=1),
        labels_NT=np.stack([np.zeros(len(scores_N)), labels_N], axis=1),
        known_NT=np.stack([np.ones(len(scores_N)), np.arange(len(scores_N)) % 5 > 0], axis=1).astype(bool),
        domain_N=domain_N,
        users_N=np.zeros(len(scores_N), np.int64),
    )
    return window


def test_auc_is_the_mean_of_the_domains_over_their_labelled_impressions(ranks: Ranks) -> None:
    rng = np.random.default_rng(5)
    domain_N = (np.arange(400) % 4 == 0).astype(np.int64)
    scores_N = rng.random(400)
    labels_N = (rng.random(400) < 0.5 * scores_N + 0.4 * domain_N).astype(np.int64)
    known_N = np.arange(400) % 5 > 0
    expected, weight = 0.0, 0
    for domain in (0, 1):
        chosen_N = known_N & (domain_N == domain)
        of_domain = auc(scores_N[chosen_N].astype(np.float32), labels_N[chosen_N])
        assert of_domain is not None
        expected += of_domain * int(chosen_N.sum())
        weight += int(chosen_N.sum())
    window = window_of(domain_N, scores_N, labels_N)
    assert joint_auc(window, task="click", num_min=320, ranks=ranks) == pytest.approx(
        expected / weight, abs=1e-8
    )
    assert joint_auc(window, task="click", num_min=321, ranks=ranks) is None, "too few to tell"
    assert joint_auc(window, task="other", num_min=1, ranks=ranks) is None, "no positives"


def test_auc_of_an_empty_window_is_not_known(ranks: Ranks) -> None:
    window = QualityWindow(domains=("a",), tasks=["click"], window=5)
    assert joint_auc(window, task="click", num_min=1, ranks=ranks) is None
