"""The training step against an obvious reference, and what a row may and may not remember."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from feature_eviction.policy import AdmissionConfig
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.features import KeyMaker
from trainer.model import multi_task_loss
from trainer.recommender import MappedTable, Recommender
from trainer.row_init import first_rows
from trainer.stream.columns import Impressions
from trainer.stream.slicing import slice_impressions

MakeConfig = Callable[..., Config]
MakeBatches = Callable[..., list[Impressions]]


def event_time_s(batch: Impressions) -> int:
    return int(batch.event_time_ms_N.max()) // 1000


class Reference:
    """A dict of rows, autograd and row-wise AdaGrad written out; nothing ever leaves it."""

    def __init__(self, config: Config, recommender: Recommender) -> None:
        self.config = config
        self.keys = KeyMaker(config.schema)
        self.dense = copy.deepcopy(recommender.dense)
        self.adam = torch.optim.Adam(self.dense.parameters(), lr=config.optimizer.dense_learning_rate)
        self.rows: dict[int, torch.Tensor] = {}
        self.state: dict[int, float] = {}

    def train(self, batch: Impressions) -> np.ndarray:
        optimizer = self.config.optimizer
        table = self.keys.table_keys(batch, num_rows=len(batch))[0]
        for key in dict.fromkeys(table.keys_L.tolist()):
            if key not in self.rows:
                first = first_rows(
                    np.array([key]), dim=16, scale=optimizer.embedding_init_scale, seed=self.config.seed
                )
                self.rows[key] = torch.from_numpy(first[0])
                self.state[key] = optimizer.embedding_initial_accumulator
        leaves = {key: self.rows[key].clone().requires_grad_(True) for key in set(table.keys_L.tolist())}
        columns, at = [], 0
        for lengths_B in table.lengths_FB:
            pooled = []
            for length in lengths_B.tolist():
                mine = [leaves[key] for key in table.keys_L[at : at + length].tolist()]
                pooled.append(torch.stack(mine).mean(0) if mine else torch.zeros(16))
                at += length
            columns.append(torch.stack(pooled))
        logits = self.dense(torch.cat(columns, 1))
        loss = multi_task_loss(
            logits,
            labels_BT=torch.from_numpy(batch.labels_NT),
            known_BT=torch.from_numpy(batch.known_NT.astype(np.float32)),
            weight_T=torch.ones(logits.shape[1]),
        )
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        for key, leaf in leaves.items():
            assert leaf.grad is not None
            self.state[key] += float((leaf.grad**2).mean())
            step = optimizer.embedding_learning_rate / (self.state[key] ** 0.5 + optimizer.embedding_eps)
            self.rows[key] = (leaf - step * leaf.grad).detach()
        return torch.sigmoid(logits.detach()).numpy()


@pytest.mark.parametrize("initial_accumulator", [0.0, 0.3])
def test_training_equals_the_reference(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches, initial_accumulator: float
) -> None:
    config = make_config(batch_size=32)
    config = replace(
        config, optimizer=replace(config.optimizer, embedding_initial_accumulator=initial_accumulator)
    )
    recommender = Recommender(config, ranks=ranks)
    reference = Reference(config, recommender)
    for batch in make_batches(config, 12):
        found = recommender.train(batch, now_s=event_time_s(batch))
        np.testing.assert_allclose(found, reference.train(batch), atol=2e-5)
    shard = recommender.shards["dim16"]
    rows = shard.ids.rows()
    assert sorted(rows.keys_N.tolist()) == sorted(reference.rows)
    expected = torch.stack([reference.rows[key] for key in rows.keys_N.tolist()])
    torch.testing.assert_close(shard.rows.rows_CD[rows.slots_N], expected, atol=2e-4, rtol=1e-3)
    state = torch.tensor([reference.state[key] for key in rows.keys_N.tolist()])
    torch.testing.assert_close(shard.rows.state_C[rows.slots_N], state, atol=1e-4, rtol=2e-3)


def test_padding_rows_change_nothing(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches
) -> None:
    """A batch that is not full trains as if it had just that size."""
    config = make_config(batch_size=64)
    part = slice_impressions(make_batches(config, 1)[0], 0, 20)
    padded = Recommender(config, ranks=ranks)
    exact = Recommender(make_config(batch_size=20), ranks=ranks)
    assert padded.batch_rows == 64
    for _ in range(3):
        a = padded.train(part, now_s=event_time_s(part))
        b = exact.train(part, now_s=event_time_s(part))
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_prediction_is_made_before_learning_and_changes_nothing(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches
) -> None:
    config = make_config()
    recommender = Recommender(config, ranks=ranks)
    first, second = make_batches(config, 2)
    recommender.train(first, now_s=event_time_s(first))
    rows_before = recommender.shards["dim16"].ids.num_rows
    predicted = recommender.predict(first)
    np.testing.assert_array_equal(predicted, recommender.predict(first))
    assert recommender.shards["dim16"].ids.num_rows == rows_before
    np.testing.assert_allclose(predicted, recommender.train(first, now_s=event_time_s(first)), atol=1e-6)
    assert not np.allclose(predicted, recommender.predict(first))
    assert recommender.predict(second).shape == (len(second), len(config.schema.tasks))


def test_default_row_is_never_trained(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches
) -> None:
    """With everything refused the tables stay zero and predictions do not depend on the ids."""
    config = make_config()
    never = AdmissionConfig(kind="count", min_count=255)
    features = tuple(replace(feature, admission=never) for feature in config.schema.features)
    config = replace(config, schema=replace(config.schema, features=features))
    recommender = Recommender(config, ranks=ranks)
    batch = make_batches(config, 1)[0]
    predicted = recommender.train(slice_impressions(batch, 0, 8), now_s=event_time_s(batch))
    assert recommender.shards["dim16"].ids.num_rows == 0
    assert recommender.shards["dim16"].rows.rows_CD.abs().sum() == 0
    assert recommender.shards["dim16"].rows.state_C.abs().sum() == 0
    np.testing.assert_array_equal(predicted, np.broadcast_to(predicted[:1], predicted.shape))


def test_evicted_row_never_serves_its_next_owner(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new owner of a slot finds its own first row and no optimizer state, before its first use."""
    config = make_config(bytes_limit=256 << 10)
    recommender = Recommender(config, ranks=ranks)
    shard = recommender.shards["dim16"]
    seen_new, reused = 0, 0
    owners: dict[int, int] = {}
    apply_map = recommender._apply_map

    def checked(table: MappedTable) -> None:
        nonlocal seen_new, reused
        apply_map(table)
        owned = table.owned
        expected = first_rows(
            owned.new_keys_M, dim=16, scale=config.optimizer.embedding_init_scale, seed=config.seed
        )
        np.testing.assert_array_equal(shard.rows.rows_CD[owned.new_slots_M].numpy(), expected)
        assert not shard.rows.state_C[owned.new_slots_M].any()
        for key, slot in zip(owned.new_keys_M.tolist(), owned.new_slots_M.tolist(), strict=True):
            seen_new += 1
            reused += slot in owners and owners[slot] != key
            owners[slot] = key

    monkeypatch.setattr(recommender, "_apply_map", checked)
    for batch in make_batches(config, 150):
        recommender.train(batch, now_s=event_time_s(batch))
        assert shard.bytes_used <= config.tables[0].bytes_limit
        live = shard.ids.rows()
        assert len(set(live.slots_N.tolist())) == len(set(live.keys_N.tolist())) == len(live.keys_N)
    assert seen_new > 1000
    assert reused > 500


def test_budget_too_small_for_a_row_is_refused(ranks: Ranks, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"table 'dim16': bytes_limit 64 over 1 ranks holds no row"):
        Recommender(make_config(bytes_limit=64), ranks=ranks)


def test_bytes_used_count_every_array(ranks: Ranks, make_config: MakeConfig) -> None:
    shard = Recommender(make_config(), ranks=ranks).shards["dim16"]
    record = sum(column.nbytes for column in vars(shard.changed).values() if isinstance(column, np.ndarray))
    rows = shard.rows.rows_CD.nbytes + shard.rows.state_C.nbytes
    assert shard.bytes_used == rows + shard.ids.bytes_used + record


def test_bfloat16_learns_otherwise_and_predicts_in_float32(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches
) -> None:
    """What serving is held against never sees the reduced precision, whatever training runs in."""
    config = make_config()
    reduced_config = replace(config, train=replace(config.train, precision="bfloat16"))
    full, reduced = (Recommender(one, ranks=ranks) for one in (config, reduced_config))
    first, second = make_batches(config, 2)
    np.testing.assert_array_equal(reduced.predict(first), full.predict(first))
    scores, expected = (one.train(first, now_s=event_time_s(first)) for one in (reduced, full))
    np.testing.assert_allclose(scores, expected, atol=0.02)
    assert not np.array_equal(scores, expected)
    assert all(parameter.dtype == torch.float32 for parameter in reduced.dense.parameters())
    # With the weights and rows made equal again, predictions are equal bit for bit.
    full.dense.load_state_dict(reduced.dense.state_dict())
    for table, shard in full.shards.items():
        shard.rows.rows_CD.copy_(reduced.shards[table].rows.rows_CD)
    np.testing.assert_array_equal(reduced.predict(second), full.predict(second))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_same_training(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches
) -> None:
    config = make_config(batch_size=32)
    compiled_config = replace(config, model=replace(config.model, compile=True))
    plain, compiled = (Recommender(one, ranks=ranks) for one in (config, compiled_config))
    for batch in make_batches(config, 5):
        expected = plain.train(batch, now_s=event_time_s(batch))
        found = compiled.train(batch, now_s=event_time_s(batch))
        np.testing.assert_allclose(found, expected, atol=2e-5)
