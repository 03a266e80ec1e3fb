"""What eviction_quality's figures rest on: its metrics, its references and its streams."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss as reference_log_loss
from sklearn.metrics import roc_auc_score

from benchmarks.eviction_policies import VARIANTS, Foresight, Hashed, Random, Setting, known_policies
from benchmarks.eviction_quality import calls_of, learn
from benchmarks.factorisation import ROW_BYTES, Factorisation, auc, log_loss
from benchmarks.quality_streams import SYNTHETIC
from benchmarks.quality_summary import goals, summarised
from feature_eviction import table_bytes


def test_metrics_are_those_of_scikit_learn_with_ties():
    generator = np.random.default_rng(2)
    labels_N = generator.integers(0, 2, 500).astype(np.int32)
    logits_N = np.round(generator.standard_normal(500) + labels_N, 1)
    assert auc(logits_N, labels_N) == pytest.approx(roc_auc_score(labels_N, logits_N))
    probabilities_N = 1.0 / (1.0 + np.exp(-logits_N))
    assert log_loss(logits_N, labels_N) == pytest.approx(reference_log_loss(labels_N, probabilities_N))


def test_the_model_learns_a_product_of_factors_that_biases_cannot():
    generator = np.random.default_rng(3)
    users_N, items_N = generator.integers(0, 20, 20_000), generator.integers(20, 40, 20_000)
    labels_N = ((users_N + items_N) % 2).astype(np.int32)
    model = Factorisation(40, generator)
    model.train(users_N[:15_000], items_N[:15_000], labels_N[:15_000])
    assert auc(model.predict(users_N[15_000:], items_N[15_000:]), labels_N[15_000:]) > 0.99


@pytest.fixture(scope="module")
def stream_and_calls():
    stream = SYNTHETIC["steady_zipf"](4_000, np.random.default_rng(0))
    return stream, calls_of(stream)


def setting_of(stream, calls, num_slots: int) -> Setting:
    return Setting(num_slots, 864_000, 0, [call.unique.keys_U for call in calls])


def test_no_policy_has_more_hits_than_foresight(stream_and_calls):
    stream, calls = stream_and_calls
    setting = setting_of(stream, calls, 400)
    policies, _ = known_policies()
    hit_rates = {
        name: learn(stream, calls, make(setting), seed=0).hit_rate for name, make in policies.items()
    }
    # A table that refuses ids at sight may do better than one that has to make room for each.
    at_sight = [rate for name, rate in hit_rates.items() if name not in ("hashed", "kraken_count2")]
    assert max(at_sight) == hit_rates["foresight"]
    assert hit_rates["foresight"] > hit_rates["random"] + 0.05


def test_references_keep_their_budget_and_one_slot_an_id(stream_and_calls):
    stream, calls = stream_and_calls
    for make in (Random, Foresight):
        table = make(setting_of(stream, calls, 300))
        owner_of_slot: dict[int, int] = {}
        for call in calls:
            mapped = table.map(call.unique, call.now_s)
            for key in mapped.evicted_keys_K.tolist():
                owner_of_slot = {slot: owner for slot, owner in owner_of_slot.items() if owner != key}
            owner_of_slot.update(zip(mapped.new_slots_M.tolist(), mapped.new_keys_M.tolist(), strict=True))
            assert len(owner_of_slot) <= 300
            for key, slot in zip(call.unique.keys_U.tolist(), mapped.slots_U.tolist(), strict=True):
                assert owner_of_slot[slot] == key


def test_the_hashed_table_gets_all_the_memory_of_the_others_as_rows(stream_and_calls):
    stream, calls = stream_and_calls
    budget = table_bytes(300) + 300 * ROW_BYTES
    table = Hashed(setting_of(stream, calls, 300))
    assert budget - ROW_BYTES < table.num_bytes <= budget
    assert table.num_slots > 300


def test_floods_bring_items_that_are_seen_once_and_churn_ends_items():
    floods = SYNTHETIC["one_hit_floods"](20_000, np.random.default_rng(1))
    _, counts = np.unique(floods.items_N, return_counts=True)
    steady = SYNTHETIC["steady_zipf"](20_000, np.random.default_rng(1))
    _, steady_counts = np.unique(steady.items_N, return_counts=True)
    assert (counts == 1).sum() > (steady_counts == 1).sum() + 1_500
    churn = SYNTHETIC["item_churn"](20_000, np.random.default_rng(1))
    first, last = churn.items_N[:2_000], churn.items_N[-2_000:]
    assert not set(first) & set(last)


def test_a_policy_that_is_surely_better_is_reported_as_a_loss():
    def outcome(value: float) -> dict[str, float]:
        return {"auc": value, "log_loss": 0.5, "hit_rate": 0.9, "re_entries": 10, "num_bytes": 1.0}

    policies = ("kraken", "lru", "foresight", *VARIANTS)
    equal = {(share, one): [outcome(0.7), outcome(0.71)] for share in (0.6, 1.0) for one in policies}
    assert "met" in goals(summarised("s", equal))["lines"][0]
    better = {**equal, (0.6, "lru"): [outcome(0.72), outcome(0.7301)]}
    assert "missed 1 of 1: s at 60% to lru" in goals(summarised("s", better))["lines"][0]
    noisy = {**equal, (0.6, "lru"): [outcome(0.80), outcome(0.711)]}
    assert "met" in goals(summarised("s", noisy))["lines"][0]
