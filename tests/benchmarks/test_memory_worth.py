"""What memory is worth: 100 % holds every id, a hashed table keeps to its bytes, the last line has all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from benchmarks.memory_worth import (
    KINDS,
    SHARES,
    HashedKeys,
    bytes_for,
    distinct_keys,
    hashed,
    learn,
    row_bytes,
    scored,
    unprotected,
)
from trainer.config import preset
from trainer.data.synthetic import SyntheticStream
from trainer.features import KeyMaker


@pytest.fixture(scope="module")
def config():
    return replace(preset("quickstart"), impressions=1_500)


@pytest.fixture(scope="module")
def stream(config):
    return list(SyntheticStream(config).batches(config.train.batch_size))


def test_the_whole_budget_has_a_row_for_every_id_and_a_share_of_it_has_not(config, stream, ranks):
    num_ids = distinct_keys(stream, config)
    budget = bytes_for(num_ids, config)
    whole = learn(scored(config, bytes_limit=budget, ranks=ranks), stream)
    assert whole["rows"] == num_ids
    assert whole["refused"] == 0
    quarter = learn(scored(config, bytes_limit=budget // 4, ranks=ranks), stream)
    assert quarter["rows"] < num_ids / 4
    assert quarter["ids_left"] + quarter["refused"] > whole["ids_left"]


def test_protected_ids_stay_where_others_are_refused_and_leave_where_nobody_is_protected(
    config, stream, ranks
):
    budget = bytes_for(distinct_keys(stream, config), config) // 4
    kept = learn(scored(config, bytes_limit=budget, ranks=ranks), stream)
    given_up = learn(unprotected(config, bytes_limit=budget, ranks=ranks), stream)
    assert kept["refused"] > 0
    assert given_up["refused"] < kept["refused"]
    assert given_up["ids_left"] > kept["ids_left"]


def test_the_hashed_table_has_the_bytes_of_the_scored_one_as_rows_and_keeps_them(config, stream, ranks):
    budget = bytes_for(distinct_keys(stream, config), config) // 4
    recommender = hashed(config, bytes_limit=budget, ranks=ranks)
    outcome = learn(recommender, stream)
    assert budget - row_bytes(config) < outcome["rows"] * row_bytes(config) <= budget
    assert outcome["rows"] > scored(config, bytes_limit=budget, ranks=ranks).shards["dim16"].slots_per_rank
    assert (outcome["ids_left"], outcome["refused"]) == (0, 0)


def test_hashed_keys_are_a_function_of_the_key_alone(config, stream):
    hashed_keys, plain = HashedKeys(config, num_rows=97), KeyMaker(config.schema)
    seen: dict[int, int] = {}
    for part, _ in stream:
        keys_L = plain.table_keys(part, num_rows=len(part))[0].keys_L
        hashed_L = hashed_keys.table_keys(part, num_rows=len(part))[0].keys_L
        for key, row in zip(keys_L.tolist(), hashed_L.tolist(), strict=True):
            assert seen.setdefault(key, row) == row
    assert len(np.unique(list(seen.values()))) == 97


@pytest.mark.slow
def test_the_last_line_has_every_budget_of_both_tables(run_benchmark, tmp_path: Path):
    arguments = ("--seeds", "2", "--impressions", "6000", "--plots", str(tmp_path))
    record, _ = run_benchmark("memory_worth", *arguments)
    assert record["name"] == "memory_worth"
    rows = {(row["kind"], row["share"]): row for row in record["rows"]}
    assert set(rows) == {(kind, share) for kind in KINDS for share in SHARES}
    assert rows["scored", 1.0]["auc_lost"] == 0
    assert all(0.3 < row["auc"] < 1 for row in rows.values())
    assert (tmp_path / "memory_worth.svg").read_text().rstrip().endswith("</svg>")
