"""The streams of benchmarks.eviction_quality: who saw which item when, and whether it was positive.

Four synthetic ones over ten days, each with one thing that a policy can get wrong, and any trace file with
user, item, time and label columns. Users and items become dense numbers of one space (users first), so that
arrays by id are small. Legend: N events, V distinct ids.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.zipf import zipf_ranks

DAY_S = 86_400
SPAN_S = 10 * DAY_S
START_S = 1_750_000_000
NUM_USERS = 3_000
NUM_ITEMS = 20_000
FACTOR_DIM = 4
POPULAR_IS_LIKED = 0.4
"""How much the logit rises with the popularity of an item, in its standard deviations: a recommender shows
what was liked. Zero would make positives worthless as a hint for what comes back."""

Int64Array = npt.NDArray[np.int64]


class Stream(NamedTuple):
    """In time order."""

    name: str
    users_N: Int64Array
    """In [0, num_ids), and never an item."""
    items_N: Int64Array
    time_s_N: Int64Array
    """Unix seconds."""
    positives_N: npt.NDArray[np.int32]
    num_ids: int
    """V, users and items together."""


def steady_zipf(num_events: int, generator: np.random.Generator) -> Stream:
    """The same popularities from the first event to the last."""
    items_N = zipf_ranks(generator, num_events, num_ranks=NUM_ITEMS)
    return _labelled("steady_zipf", items_N, -np.log1p(np.arange(NUM_ITEMS)), generator)


def item_churn(num_events: int, generator: np.random.Generator) -> Stream:
    """A quarter of the items lives at a time; after three days another one takes an item's place."""
    places = NUM_ITEMS // 4
    place_of_rank = generator.permutation(places)
    ranks_N = zipf_ranks(generator, num_events, num_ranks=places)
    newest_N = np.linspace(places, NUM_ITEMS - 1, num_events).astype(np.int64)
    # The newest item whose number modulo `places` is the place that the rank has.
    items_N = newest_N - (newest_N - place_of_rank[ranks_N]) % places
    rank_of_place = np.argsort(place_of_rank)
    popularity_I = -np.log1p(rank_of_place[np.arange(NUM_ITEMS) % places])
    return _labelled("item_churn", items_N, popularity_I, generator)


def bursts(num_events: int, generator: np.random.Generator) -> Stream:
    """A third of the traffic goes to twenty items of the tail for two hours, then to other twenty."""
    items_N = zipf_ranks(generator, num_events, num_ranks=NUM_ITEMS)
    num_bursts, items_each = SPAN_S // 7_200, 20
    of_burst_BI = generator.integers(NUM_ITEMS // 10, NUM_ITEMS, (num_bursts, items_each))
    burst_N = np.linspace(0, num_bursts - 1e-9, num_events).astype(np.int64)
    in_burst_N = generator.random(num_events) < 1 / 3
    chosen_N = of_burst_BI[burst_N, generator.integers(0, items_each, num_events)]
    items_N = np.where(in_burst_N, chosen_N, items_N)
    return _labelled("bursts", items_N, -np.log1p(np.arange(NUM_ITEMS)), generator)


def one_hit_floods(num_events: int, generator: np.random.Generator) -> Stream:
    """Steady traffic, and in one hour of six four events of five are of items that are never seen again."""
    items_N = zipf_ranks(generator, num_events, num_ranks=NUM_ITEMS)
    hour_N = np.linspace(0, SPAN_S // 3_600, num_events, endpoint=False).astype(np.int64)
    once_N = (hour_N % 6 == 5) & (generator.random(num_events) < 0.8)
    num_once = int(once_N.sum())
    items_N[once_N] = NUM_ITEMS + np.arange(num_once)
    popularity_I = np.concatenate([-np.log1p(np.arange(NUM_ITEMS)), np.full(num_once, -np.log(NUM_ITEMS))])
    return _labelled("one_hit_floods", items_N, popularity_I, generator)


SYNTHETIC: dict[str, Callable[[int, np.random.Generator], Stream]] = {
    "steady_zipf": steady_zipf,
    "item_churn": item_churn,
    "bursts": bursts,
    "one_hit_floods": one_hit_floods,
}


def _labelled(
    name: str, items_N: Int64Array, popularity_I: npt.NDArray[np.float64], generator: np.random.Generator
) -> Stream:
    """Users, and labels from biases and factors that only the generator knows."""
    num_events, num_items = len(items_N), len(popularity_I)
    users_N = zipf_ranks(generator, num_events, num_ranks=NUM_USERS, exponent=0.7)
    liked_I = POPULAR_IS_LIKED * (popularity_I - popularity_I.mean()) / popularity_I.std()
    bias_I = liked_I + generator.standard_normal(num_items)
    bias_U = 0.7 * generator.standard_normal(NUM_USERS)
    factors_ID = 0.7 * generator.standard_normal((num_items, FACTOR_DIM))
    factors_UD = 0.7 * generator.standard_normal((NUM_USERS, FACTOR_DIM))
    logit_N = bias_U[users_N] + bias_I[items_N] - 0.5
    logit_N += np.einsum("nd,nd->n", factors_UD[users_N], factors_ID[items_N])
    positives_N = generator.random(num_events) < 1.0 / (1.0 + np.exp(-logit_N))
    time_s_N = START_S + np.linspace(0, SPAN_S - 1, num_events).astype(np.int64)
    return _dense(name, users_N, items_N, time_s_N, positives_N.astype(np.int32))


def read_trace(path: Path, *, user: str, item: str, time: str, label: str) -> Stream:
    """A CSV file (.csv or .csv.gz) with a header. Times above 10^11 are milliseconds.

    Raises: ValueError naming the columns that the file lacks, or the line that does not parse.
    """
    with path.open("rb") as raw:
        unpacked = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        lines = csv.DictReader(io.TextIOWrapper(unpacked, encoding="utf-8", newline=""))
        missing = {user, item, time, label} - set(lines.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path.name}: columns {sorted(missing)} are missing; it has {lines.fieldnames}. "
                "Name others by --user, --item, --time, --label."
            )
        columns: list[tuple[str, str, float, bool]] = []
        for number, line in enumerate(lines, start=2):
            try:
                columns.append((line[user], line[item], float(line[time]), float(line[label]) > 0.5))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path.name}: line {number}: numbers expected in {time} and {label}"
                ) from error
    if not columns:
        raise ValueError(f"{path.name}: no events; at least one line below the header is needed")
    users, items, times, positives = (np.array(column) for column in zip(*columns, strict=True))
    time_s_N = (times / 1_000.0 if times.max() > 1e11 else times).astype(np.int64)
    order_N = np.argsort(time_s_N, kind="stable")
    _, users_N = np.unique(users[order_N], return_inverse=True)
    _, items_N = np.unique(items[order_N], return_inverse=True)
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    return _dense(name, users_N, items_N, time_s_N[order_N], positives[order_N].astype(np.int32))


def _dense(
    name: str,
    users_N: Int64Array,
    items_N: Int64Array,
    time_s_N: Int64Array,
    positives_N: npt.NDArray[np.int32],
) -> Stream:
    seen_users, users_N = np.unique(users_N, return_inverse=True)
    seen_items, items_N = np.unique(items_N, return_inverse=True)
    items_N = items_N + len(seen_users)
    return Stream(name, users_N, items_N, time_s_N, positives_N, len(seen_users) + len(seen_items))
