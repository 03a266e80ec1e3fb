"""A batch that is not finite changes neither rows nor dense model, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as with_columns

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from trainer.checkpoint.capture import StateCopier, StateCopy
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.errors import NotFiniteError
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions

Spoil = Callable[[Recommender, Impressions], Impressions]


def event_time_s(batch: Impressions) -> int:
    return int(batch.event_time_ms_N.max()) // 1000


def without_a_label(recommender: Recommender, batch: Impressions) -> Impressions:
    """The loss is NaN, the logits are fine."""
    labels_NT = batch.labels_NT.copy()
    labels_NT[3, 1] = np.nan
    return with_columns(batch, labels_NT=labels_NT)


def with_an_enormous_row(recommender: Recommender, batch: Impressions) -> Impressions:
    """What an imported model may bring: a row that is finite, and a product with it that is not."""
    shard = recommender.shards["dim16"]
    table = recommender.keys.table_keys(batch, num_rows=len(batch))[0]
    slots_L = shard.ids.lookup(table.keys_L)
    shard.rows.rows_CD[int(slots_L[slots_L >= 0][0])] = 3e38
    return batch


def with_enormous_weights(recommender: Recommender, batch: Impressions) -> Impressions:
    with torch.no_grad():
        for parameter in recommender.dense.parameters():
            parameter.mul_(1e30)
    return batch


def with_a_gradient_whose_square_is_infinite(recommender: Recommender, batch: Impressions) -> Impressions:
    """Loss and logits are finite: a label of -1e25 where the rest of the loss is the usual."""
    labels_NT = batch.labels_NT.copy()
    labels_NT[0, 0] = -1e25
    return with_columns(batch, labels_NT=labels_NT)


SPOILERS: list[tuple[Spoil, str]] = [
    (without_a_label, "loss"),
    (with_an_enormous_row, "logits"),
    (with_enormous_weights, "logits"),
    (with_a_gradient_whose_square_is_infinite, "gradient"),
]


def copied(recommender: Recommender) -> StateCopy:
    return StateCopier().copy(recommender, parts={}, with_dense=True)


def assert_unchanged(recommender: Recommender, before: StateCopy) -> None:
    """Rows that were there by slot, as the batch may have admitted more; every dense number."""
    after = copied(recommender)
    assert before.dense is not None
    assert after.dense is not None
    assert after.dense.keys() == before.dense.keys()
    for name, value in before.dense.items():
        np.testing.assert_array_equal(after.dense[name], value, err_msg=name)
    (old,), (new,) = before.tables, after.tables
    rows = dict(zip(new.ids["key"].tolist(), range(len(new.rows_ND)), strict=True))
    at = [rows[key] for key in old.ids["key"].tolist()]
    np.testing.assert_array_equal(new.rows_ND[at], old.rows_ND)
    np.testing.assert_array_equal(new.state_N[at], old.state_N)
    fresh = np.setdiff1d(np.arange(len(new.rows_ND)), at)
    assert not new.state_N[fresh].any(), "a row that the batch brought in has learned something"


@pytest.mark.parametrize(("spoil", "what"), SPOILERS)
def test_a_batch_that_is_not_finite_is_not_applied(
    ranks: Ranks,
    make_config: Callable[..., Config],
    make_batches: Callable[..., list[Impressions]],
    spoil: Spoil,
    what: str,
) -> None:
    config = make_config()
    config = replace(config, train=replace(config.train, task_scaling="by_positives"))
    *batches, last = make_batches(config, 5)
    recommender = Recommender(config, ranks=ranks)
    for batch in batches:
        recommender.train(batch, now_s=event_time_s(batch))
    assert recommender.task_rates is not None
    scales_T = recommender.task_rates.scales()
    spoiled = spoil(recommender, last)
    before = copied(recommender)
    learned = recommender.learn(recommender.map(spoiled, now_s=event_time_s(spoiled)))
    assert learned.not_finite.startswith(what)
    assert_unchanged(recommender, before)
    np.testing.assert_array_equal(recommender.task_rates.scales(), scales_T)


def test_training_goes_on_after_a_skipped_batch_as_if_only_its_ids_had_been_seen(
    ranks: Ranks, make_config: Callable[..., Config], make_batches: Callable[..., list[Impressions]]
) -> None:
    config = make_config()
    batches = make_batches(config, 6)
    guarded, other = Recommender(config, ranks=ranks), Recommender(config, ranks=ranks)
    for index, batch in enumerate(batches):
        now_s = event_time_s(batch)
        if index != 3:
            guarded.train(batch, now_s=now_s)
            other.train(batch, now_s=now_s)
            continue
        with pytest.raises(NotFiniteError, match="was not learned: its loss is not finite"):
            guarded.train(without_a_label(guarded, batch), now_s=now_s)
        for table in other.map(without_a_label(other, batch), now_s=now_s).tables:
            other._apply_map(table)
    mine, theirs = copied(guarded), copied(other)
    assert mine.dense is not None
    assert theirs.dense is not None
    for name, value in theirs.dense.items():
        np.testing.assert_array_equal(mine.dense[name], value, err_msg=name)
    np.testing.assert_array_equal(mine.tables[0].rows_ND, theirs.tables[0].rows_ND)
    np.testing.assert_array_equal(mine.tables[0].state_N, theirs.tables[0].state_N)
