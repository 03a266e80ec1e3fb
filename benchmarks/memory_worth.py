"""What memory is worth: quality by table budget in the full system, beside a hashed table of the same bytes.

python -m benchmarks.memory_worth [--quick] [--seeds N] [--impressions N] [--plots DIR]

All of quickstart's memory in one number: 100 % is what it takes to hold every id that the stream ever shows
(rows, optimizer state, id table, record of changes), the other budgets are shares of it. `scored` is the
recommender as `make run` has it: Kraken's score, the items' lifetime, protected classes. In `unprotected`
users may leave as well. `hashed` spends the same bytes on rows, optimizer state and record of changes alone:
an id's row is a hash of it, ids share rows, and nothing ever leaves. Impressions are judged by the
predictions that were made before they were trained (Monolith's protocol), over the last three quarters of
the stream; values are means over the tasks. `_lost` is `scored` at 100 % less the row's own, paired by seed,
`_95` half of its 95 % interval (Student's t). `ids_left` counts evictions and expiries, `refused` the ids
that found every row taken by protected ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace as with_keys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace

from benchmarks.figures import draw_measures
from benchmarks.report import rounded, say, say_json, say_table
from benchmarks.served_quality import Floats, lost, means, quality
from feature_eviction import make_keys, owner_of, table_bytes
from trainer.collectives import Ranks, start_ranks
from trainer.config import Config, preset
from trainer.data.synthetic import SyntheticStream
from trainer.features import KeyMaker, TableKeys
from trainer.publish.changed_rows import BYTES_PER_SLOT
from trainer.recommender import Recommender, policy_of
from trainer.stream.columns import Impressions

SHARES = (1.0, 0.6, 0.3, 0.1)
COLUMNS = (
    *("kind", "share", "mib", "rows", "auc", "auc_lost", "auc_95", "gauc", "gauc_lost", "gauc_95"),
    *("true_lost", "true_95", "ids_left", "refused"),
)
Stream = Sequence[tuple[Impressions, Floats]]


class HashedKeys(KeyMaker):
    """Keys of a table without ids: equal where the hashes are, whatever the feature."""

    def __init__(self, config: Config, *, num_rows: int) -> None:
        super().__init__(config.schema)
        self._num_rows = num_rows
        # The rows of a class that may neither expire nor crowd others out.
        self._class_id = next(
            feature.class_id
            for feature in config.schema.features
            if feature.ttl_s is None and not feature.protected
        )

    def table_keys(self, impressions: Impressions, *, num_rows: int) -> list[TableKeys]:
        tables = super().table_keys(impressions, num_rows=num_rows)
        return [with_keys(table, keys_L=self._hashed(table.keys_L)) for table in tables]

    def _hashed(self, keys_L: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        rows_L = owner_of(keys_L, num_owners=self._num_rows).astype(np.int64)
        hashed_L, _ = make_keys(rows_L, class_id=self._class_id)
        return hashed_L


def distinct_keys(stream: Stream, config: Config) -> int:
    """How many rows a table needs that never lets go of an id."""
    maker = KeyMaker(config.schema)
    keys = [maker.table_keys(part, num_rows=len(part))[0].keys_L for part, _ in stream]
    return len(np.unique(np.concatenate(keys)))


def row_bytes(config: Config) -> int:
    """Row, optimizer state and record of changes of one slot."""
    return config.tables[0].dim * 4 + 4 + BYTES_PER_SLOT


def bytes_for(num_slots: int, config: Config) -> int:
    """The budget at which the table has so many rows."""
    policy = policy_of(config.tables[0], num_slots=1, config=config)
    return table_bytes(num_slots, policy=policy) + num_slots * row_bytes(config)


def with_budget(config: Config, bytes_limit: int) -> Config:
    return replace(config, tables=(replace(config.tables[0], bytes_limit=bytes_limit),))


def scored(config: Config, *, bytes_limit: int, ranks: Ranks) -> Recommender:
    return Recommender(with_budget(config, bytes_limit), ranks=ranks)


def hashed(config: Config, *, bytes_limit: int, ranks: Ranks) -> Recommender:
    """Every row that the bytes can buy; what stands below is an id table that never has to choose."""
    num_rows = bytes_limit // row_bytes(config)
    recommender = scored(config, bytes_limit=bytes_for(num_rows, config), ranks=ranks)
    recommender.keys = HashedKeys(config, num_rows=num_rows)
    return recommender


def unprotected(config: Config, *, bytes_limit: int, ranks: Ranks) -> Recommender:
    """As `scored`, and every class may be evicted."""
    features = tuple(replace(feature, protected=False) for feature in config.schema.features)
    config = replace(config, schema=replace(config.schema, features=features))
    return scored(config, bytes_limit=bytes_limit, ranks=ranks)


KINDS = {"scored": scored, "unprotected": unprotected, "hashed": hashed}


def learn(recommender: Recommender, stream: Stream) -> dict[str, float]:
    """Predict, then train, the whole stream. Returns: quality of the counted part, rows, what left."""
    counted_from = len(stream) // 4
    scores = []
    evicted = refused = 0
    for part, _ in stream:
        mapped = recommender.map(part, now_s=int(part.event_time_ms_N.max()) // 1000)
        evicted += sum(len(table.owned.evicted_keys_K) for table in mapped.tables)
        refused += sum(int((table.owned.slots_N < 0).sum()) for table in mapped.tables)
        scores.append(recommender.learn(mapped).probabilities_NT)
    judged = [part for part, _ in stream[counted_from:]]
    return quality(
        np.concatenate(scores[counted_from:]),
        labels_NT=np.concatenate([part.labels_NT for part in judged]),
        truth_NT=np.concatenate([truth_NT for _, truth_NT in stream[counted_from:]]),
        users_N=np.concatenate([part.user_ids_N for part in judged]),
    ) | {
        "rows": next(iter(recommender.shards.values())).slots_per_rank,
        "ids_left": evicted,
        "refused": refused,
    }


def of_seed(seed: int, *, impressions: int, ranks: Ranks) -> dict[tuple[str, float], dict[str, float]]:
    """All tables on one stream, by kind and share."""
    config = replace(preset("quickstart"), seed=seed, impressions=impressions)
    stream = list(SyntheticStream(config).batches(config.train.batch_size))
    num_ids = distinct_keys(stream, config)
    outcomes = {}
    for share in SHARES:
        bytes_limit = int(share * bytes_for(num_ids, config))
        for kind, make in KINDS.items():
            outcome = learn(make(config, bytes_limit=bytes_limit, ranks=ranks), stream)
            outcomes[kind, share] = outcome | {"mib": bytes_limit / 2**20, "ids": num_ids}
            say(f"seed {seed}: {kind} at {share:.0%} of {num_ids:,} ids has AUC {outcome['auc']:.5f}")
    return outcomes


def summary(of_seeds: Sequence[dict[tuple[str, float], dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each table; differences are to `scored` at 100 %, paired by seed."""
    best = [one["scored", 1.0] for one in of_seeds]
    rows = []
    for kind, share in of_seeds[0]:
        own = [one[kind, share] for one in of_seeds]
        counts = {
            name: rounded(float(np.mean([one[name] for one in own])))
            for name in ("mib", "rows", "ids", "ids_left", "refused")
        }
        rows.append({"kind": kind, "share": share} | counts | means(own) | lost(best, own))
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds, 20,000 impressions")
    parser.add_argument("--seeds", type=int, help="default 5, quick 2")
    parser.add_argument("--impressions", type=int, help="default 200,000")
    parser.add_argument("--plots", type=Path, help="a folder for the figure (SVG)")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    impressions = options.impressions or (20_000 if options.quick else 200_000)
    torch.set_num_threads(1)
    ranks = start_ranks()
    seeds = range(1, 1 + (options.seeds or (2 if options.quick else 5)))
    of_seeds = [of_seed(seed, impressions=impressions, ranks=ranks) for seed in seeds]
    rows = summary(of_seeds)
    say_table(rows, COLUMNS)
    if options.plots:
        places = {share: f"{share:.0%}" for share in SHARES}
        path = options.plots / "memory_worth.svg"
        label = "table, % of the bytes that hold every id"
        draw_measures(rows, path, place="share", places=places, label=label, line="kind")
        say(f"drawn: {path}")
    facts = {"impressions": impressions, "seeds": len(of_seeds), "shares": list(SHARES)}
    say_json("memory_worth", rows=rows, facts=facts)


if __name__ == "__main__":
    main()
