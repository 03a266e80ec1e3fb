"""The training step's benchmark measures every contestant that is here, and says where the time goes."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.train_step import rows_of, why_absent
from benchmarks.train_step_stream import BATCH, Stream, config_for, keys_of, popular_keys
from feature_eviction import make_keys
from trainer.features import KeyMaker
from trainer.model.layout import FeatureLayout
from trainer.recommender import slots_for


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_contestant_is_measured_and_the_parts_fill_the_step(run_benchmark):
    peers = ("static", "static_same_dense", "mch_lfu_10")
    record, output = run_benchmark(
        "train_step",
        *("--quick", "--rounds", "1", "--turn-s", "0.3", "--rows", "20000"),
        *("--contestants", "ours", "ours_always", *peers),
    )
    assert record["name"] == "train_step"
    for case in ("step", "step_always"):
        assert {row["peer"] for row in record["rows"] if row["case"] == case} == set(peers)
    assert {row["case"] for row in record["rows"]} >= {"dense_float32", "dense_bfloat16"}
    for row in record["rows"]:
        assert row["ours"] > 0, row
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"], rel=2e-3), row
        assert row["ratio_cpu"] > 0, row
    (setup,) = record["facts"]["setups"]
    assert setup["versions"] == 1
    assert setup["rows_pushed"] > 0
    # Where every id gets a row at first sight, more rows have to leave for it.
    assert 0 < setup["evicted_a_step"]["ours"] < setup["evicted_a_step"]["ours_always"]
    assert setup["version_stall_ms"] > 0
    assert 0 < setup["checkpoint_stall_ms"] < setup["checkpoint_save_ms"]
    for parts in setup["parts_ms"].values():
        assert min(value for name, value in parts.items() if name != "reports") > 0, parts
        outside = ("step", "map", "step_wall")
        of_the_step = sum(value for name, value in parts.items() if name not in outside)
        assert of_the_step == pytest.approx(parts["step"], rel=1e-2)
    assert "SKIPPED" not in output


def test_managed_collision_over_ranks_is_named_as_skipped():
    assert "first eviction" in (why_absent("mch_lfu_1", ranks=2) or "")
    assert why_absent("mch_lfu_1", ranks=1) is None
    assert why_absent("static", ranks=2) is None


def test_a_checkpoint_a_minute_is_taken_off_ours_alone():
    rates = {"ours": [100.0, 300.0, 200.0], "static": [100.0, 100.0, 100.0]}
    facts = {"rates": rates, "cpu_rates": rates, "checkpoint_share": 0.1, "checkpoint_share_cpu": 0.25}
    (row,) = rows_of("1x1", 16, facts)
    assert (row["ours"], row["theirs"], row["ratio"], row["ratio_cpu"]) == (180.0, 100.0, 1.8, 1.6)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_ranks_are_set_against_one_in_turns(run_benchmark):
    record, _ = run_benchmark(
        "train_step",
        *("--quick", "--setups", "--scaling-rounds", "1"),
        *("--rounds", "1", "--turn-s", "0.3", "--rows", "20000", "--contestants", "ours"),
    )
    (scaling,) = record["facts"]["two_ranks_over_one"]
    assert scaling["ratio"] == pytest.approx(scaling["two"] / scaling["one"], rel=2e-3)
    assert scaling["ratio_cpu"] > 0
    assert scaling["cores_of_one"] > 0


def test_peers_get_the_keys_that_the_trainer_makes():
    config = config_for(dim=16, rows=5000, world_size=1, threads=1)
    (batch,) = Stream(config, rank=0, world_size=1).batches(1)
    assert len(batch) == BATCH
    layout = FeatureLayout.of(config.schema)
    (table,) = KeyMaker(config.schema).table_keys(batch, num_rows=BATCH)
    np.testing.assert_array_equal(keys_of(batch, layout), table.keys_L)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_table_has_the_rows_that_were_asked_for(world_size: int):
    config = config_for(dim=40, rows=50_000, world_size=world_size, threads=1)
    slots = slots_for(config.tables[0], world_size=world_size, config=config)
    assert slots * world_size == pytest.approx(50_000, rel=0.02)
    keys_S = popular_keys(FeatureLayout.of(config.schema), 50_000)
    assert len(np.unique(keys_S)) == 50_000
    assert make_keys(np.array([2]), class_id=1)[0][0] in keys_S


def test_ranks_draw_different_impressions():
    config = config_for(dim=16, rows=5000, world_size=2, threads=1)
    first, second = (Stream(config, rank=rank, world_size=2).batches(1)[0] for rank in range(2))
    assert len(first) == len(second) == BATCH // 2
    assert not np.array_equal(first.user_ids_N, second.user_ids_N)
