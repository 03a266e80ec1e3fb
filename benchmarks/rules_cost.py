"""What the synchronisation rules save in bytes to serving, and what they cost in quality.

python -m benchmarks.rules_cost [--quick] [--seeds N] [--impressions N] [--ways NAME ...] [--plots DIR]

One training run a seed on the synthetic stream, as `make run` trains it; each way of synchronising has a
replica of its own, which gets what the way's rules let through and answers for each slice of the stream
before training sees it. `full` is the preset `everything`: every touched row as float32 in every pass; the
other presets go by their names. A pass is half a second, at 2,048 impressions a second of the publishing
clock. Bytes and quality are counted after the first quarter.
`fewer` is full's row bytes over the way's; `fewer_all` has the dense weights of each version in it.
GAUC and AUC are means over the tasks; `gauc_lost` is full's less the way's, paired by seed, with a 95 %
interval (Student's t). `true_lost` is the same of the GAUC against the stream's true probabilities, which is
free of the labels' noise (trainer/compare/expected.py). The first version is everything and is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace

from benchmarks.report import rounded, say, say_json, say_table
from benchmarks.rules_cost_plot import draw
from benchmarks.rules_cost_serving import ForAll, Model, Serving, Way
from benchmarks.served_quality import lost, means, quality
from param_server.client import RulesConfig
from param_server.rules_config import RULES_PRESETS, RowRules
from trainer.collectives import Ranks, start_ranks
from trainer.config import preset
from trainer.data.synthetic import EVENT_START_MS, SyntheticStream
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions
from trainer.stream.slicing import slice_impressions

SLICE = 1_024
PASSES_PER_S = 2
START_S = 1_790_000_000
GOAL_FEWER = 13.0
GOAL_GAUC_LOST = 0.0005
FULL = "full"

EVERYTHING = RulesConfig()
# Rows that change all the time can wait for many updates, items and authors cannot. Classes of quickstart.
BY_CLASS = RulesConfig(
    min_updates=32,
    by_class={
        "2": RowRules(min_updates=8),
        "4": RowRules(min_updates=2),
        "7": RowRules(min_updates=2),
    },
)
# Rows that change all the time and single updates of rare ones both wait. No preset: it misses the goal.
SPARING = RulesConfig(update_limit=1, update_limit_window_s=4, min_updates=5)
COLUMNS = (
    *("way", "row_mb", "fewer", "fewer_all", "auc", "auc_lost", "auc_95", "gauc", "gauc_lost", "gauc_95"),
    *("true_gauc", "true_lost", "true_95"),
)
WAYS = (
    Way(FULL, EVERYTHING),
    Way("float16", EVERYTHING, "float16"),
    Way("int8", EVERYTHING, "int8"),
    *(Way(name, rules) for name, rules in RULES_PRESETS.items() if name != "everything"),
    Way("min_updates_4_int8", RulesConfig(min_updates=4), "int8"),
    Way("by_class_int8", BY_CLASS, "int8"),
    Way("sparing_int8", SPARING, "int8"),
    Way("every8", EVERYTHING, "float32", 8),
    Way("sparing_int8_every8", SPARING, "int8", 8),
)


def learn(ways: Sequence[Way], *, seed: int, impressions: int, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """One training run; what each way sent and how well its replica answered."""
    config = preset("quickstart")
    config = replace(config, seed=seed, impressions=impressions)
    recommender = Recommender(config, ranks=ranks)
    servings = [Serving(way, recommender=recommender, config=config) for way in ways]
    for name, shard in recommender.shards.items():
        shard.changed = ForAll(shard.slots_per_rank, [serving.records[name] for serving in servings])
    model = Model.of(recommender, config)
    for serving in servings:
        serving.publish(model, now_s=START_S, event_time_s=EVENT_START_MS // 1_000)
    judged: list[Impressions] = []
    truths: list[npt.NDArray[np.float32]] = []
    scores: dict[str, list[npt.NDArray[np.float32]]] = {way.name: [] for way in ways}
    counted_from = impressions // 4 // SLICE
    for number, (part, truth_NT) in enumerate(SyntheticStream(config).batches(SLICE)):
        if number == counted_from:
            for serving in servings:
                serving.forget_totals()
        if number >= counted_from:
            judged.append(part)
            truths.append(truth_NT)
            for serving in servings:
                scores[serving.way.name].append(serving.judge(part))
        train(recommender, part, batch_size=config.train.batch_size)
        model = model.with_dense(recommender)
        event_time_s = int(part.event_time_ms_N[-1]) // 1_000
        for serving in servings:
            if (number + 1) % serving.way.every == 0:
                now_s = START_S + (number + 1) // PASSES_PER_S
                serving.publish(model, now_s=now_s, event_time_s=event_time_s)
    return {
        serving.way.name: outcome(
            serving,
            judged=judged,
            truth_NT=np.concatenate(truths),
            scores_NT=np.concatenate(scores[serving.way.name]),
        )
        for serving in servings
    }


def train(recommender: Recommender, impressions: Impressions, *, batch_size: int) -> None:
    for start in range(0, len(impressions), batch_size):
        batch = slice_impressions(impressions, start, min(start + batch_size, len(impressions)))
        recommender.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)


def outcome(
    serving: Serving,
    *,
    judged: Sequence[Impressions],
    truth_NT: npt.NDArray[np.float32],
    scores_NT: npt.NDArray[np.float32],
) -> dict[str, Any]:
    """Totals of one way over the part of the stream that counts."""
    values = quality(
        scores_NT,
        labels_NT=np.concatenate([part.labels_NT for part in judged]),
        truth_NT=truth_NT,
        users_N=np.concatenate([part.user_ids_N for part in judged]),
    )
    return values | {
        "row_bytes": serving.row_bytes,
        "all_bytes": serving.row_bytes + serving.dense_bytes,
        "rows": serving.rows_sent,
        "versions": serving.versions,
        "held_back": serving.held_back,
    }


def summary(outcomes: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each way; differences are paired by seed. Args: outcomes: of each seed, by way."""
    rows = []
    for name in outcomes[0]:
        best, own = [one[FULL] for one in outcomes], [one[name] for one in outcomes]
        pairs = list(zip(best, own, strict=True))
        fewer = float(np.mean([full["row_bytes"] / max(1, one["row_bytes"]) for full, one in pairs]))
        row: dict[str, Any] = {
            "way": name,
            "row_mb": rounded(float(np.mean([one["row_bytes"] for one in own])) / 1e6),
            "fewer": rounded(fewer),
            "fewer_all": rounded(
                float(np.mean([full["all_bytes"] / one["all_bytes"] for full, one in pairs]))
            ),
        }
        row |= means(own) | lost(best, own)
        rows.append(row | {"meets": bool(fewer >= GOAL_FEWER and row["true_lost"] <= GOAL_GAUC_LOST)})
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds, 40,000 impressions")
    parser.add_argument("--seeds", type=int, help="default 5, quick 2")
    parser.add_argument("--impressions", type=int, help="default 100,000")
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], help="beside full")
    parser.add_argument("--plots", type=Path, help="a folder for the figure (SVG)")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    impressions = options.impressions or (40_000 if options.quick else 100_000)
    if impressions < 4 * SLICE:
        raise SystemExit(f"--impressions must be at least {4 * SLICE}, found {impressions}")
    ways = []
    for way in WAYS:
        if way.name != FULL and options.ways and way.name not in options.ways:
            continue
        ways.append(way)
    torch.set_num_threads(1)
    ranks = start_ranks()
    outcomes = []
    for seed in range(1, 1 + (options.seeds or (2 if options.quick else 5))):
        outcomes.append(learn(ways, seed=seed, impressions=impressions, ranks=ranks))
        best = outcomes[-1][FULL]
        say(f"seed {seed}: full has GAUC {best['gauc']:.5f} and sent {best['row_bytes']:,} bytes of rows")
    rows = summary(outcomes)
    say_table(rows, COLUMNS)
    if options.plots:
        say(f"drawn: {draw(rows, options.plots, presets={FULL, *RULES_PRESETS})}")
    facts = {
        "impressions": impressions,
        "slice": SLICE,
        "goal": {"fewer": GOAL_FEWER, "gauc_lost": GOAL_GAUC_LOST},
        "seeds": outcomes,
    }
    say_json("rules_cost", rows=rows, facts=facts)


if __name__ == "__main__":
    main()
