"""A producer's mistakes are named before they become bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trainer.config import preset
from trainer.data.synthetic import SyntheticStream
from trainer.stream.columns import Impressions, Jagged
from trainer.stream.record import encode_record

CONFIG = preset("quickstart")
NUM = 8


@pytest.fixture(scope="module")
def impressions() -> Impressions:
    found, _ = next(iter(SyntheticStream(CONFIG).batches(NUM)))
    return found


def _label(value: float, *, known: bool = True) -> Callable[[Impressions], Impressions]:
    def change(one: Impressions) -> Impressions:
        labels_NT, known_NT = one.labels_NT.copy(), one.known_NT.copy()
        labels_NT[3, 1], known_NT[3, 1] = value, known
        return replace(one, labels_NT=labels_NT, known_NT=known_NT)

    return change


def _without(columns: str, name: str) -> Callable[[Impressions], Impressions]:
    def change(one: Impressions) -> Impressions:
        held: dict[str, Any] = dict(getattr(one, columns))
        held[f"{name}_misspelt"] = held.pop(name)
        return replace(one, **{columns: held})

    return change


def _sparse(ids_L: Any, lengths_N: Any) -> Callable[[Impressions], Impressions]:
    return lambda one: replace(one, sparse={**one.sparse, "item_id": Jagged(ids_L, lengths_N)})


ONES_N = np.ones(NUM, np.int32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_label(0.5), r"labels_NT: impression 3 has 0\.5 for task 'follow'; a known label is 0 or 1"),
        (_label(256.0), "labels_NT: impression 3 has 256 for task 'follow'"),
        (_label(-1.0), "labels_NT: impression 3 has -1 for task 'follow'"),
        (_label(np.nan), "labels_NT: impression 3 has nan for task 'follow'"),
        (_without("sparse", "item_id"), r"sparse\['item_id'\] is missing; .*item_id_misspelt"),
        (_without("dense", "item_age_h"), r"dense\['item_age_h'\] is missing; .*item_age_h_misspelt"),
        (lambda one: replace(one, labels_NT=one.labels_NT[:, :5]), r"labels_NT: expected shape \(8, 6\)"),
        (lambda one: replace(one, known_NT=one.known_NT[:7]), r"known_NT: expected shape \(8, 6\)"),
        (lambda one: replace(one, user_ids_N=one.user_ids_N[:7]), r"user_ids_N: expected shape \(8,\)"),
        (lambda one: replace(one, user_ids_N=one.user_ids_N * 1.0), "user_ids_N: expected integers, .*float"),
        (
            lambda one: replace(one, domain_N=np.full(NUM, 9, np.uint8)),
            "domain_N: impression 0 has 9, expected an index into the schema's 3 domains",
        ),
        (_sparse(np.ones(NUM - 1, np.int64), ONES_N), r"sparse\['item_id'\]\.ids_L: expected shape \(8,\)"),
        (_sparse(np.ones(7, np.int64), ONES_N[:7]), r"sparse\['item_id'\]\.lengths_N: expected shape \(8,\)"),
        (_sparse(np.full(NUM, 1.5), ONES_N), r"sparse\['item_id'\]\.ids_L: expected integers"),
        (
            lambda one: replace(one, dense={**one.dense, "item_age_h": np.ones((NUM, 1), np.float32)}),
            r"dense\['item_age_h'\]: expected shape \(8,\), found \(8, 1\)",
        ),
    ],
)
def test_a_mistake_is_named_with_its_column(
    impressions: Impressions, change: Callable[[Impressions], Impressions], named: str
) -> None:
    assert encode_record(impressions, CONFIG.schema)
    with pytest.raises(ValueError, match=named):
        encode_record(change(impressions), CONFIG.schema)


def test_an_unknown_label_may_hold_anything(impressions: Impressions) -> None:
    unknown = encode_record(_label(0.0, known=False)(impressions), CONFIG.schema)
    assert encode_record(_label(np.nan, known=False)(impressions), CONFIG.schema) == unknown
