"""What freshness is worth: quality on the next slice of the stream by how often serving is synchronised.

python -m benchmarks.freshness_worth [--quick] [--seeds N] [--hours H] [--pace N] [--plots DIR]

Monolith's protocol (arXiv 2209.07663): the stream is cut into slices of ten seconds of event time; for each,
serving is synchronised if its interval is over, answers for the slice, and only then training sees the slice,
as one batch. One training run a seed, quickstart's, with a real replica (without its socket) for each
interval: it holds the rows, deletes and dense weights of its last synchronisation. Training has seen
`--warm-up` hours before the first slice that is judged; all replicas are synchronised there, and `never` is
not again. One minute of seven is judged, so that it meets every age that an interval can have. The pace
(impressions an hour of event time) decides how much an interval can bring, so it is said with the result.

AUC is each slice's own, averaged: pairs of impressions of one moment, as serving ranks them. GAUC is each
user's own over all that was judged, so it also compares answers of different moments. Values are means over
the tasks; `_lost` is the ten seconds' value less the row's own, paired by seed, `_95` half of its 95 %
interval (Student's t). `true` is judged by the stream's true probabilities, free of the labels' noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from benchmarks.figures import draw_measures
from benchmarks.report import say, say_json, say_table
from benchmarks.rules_cost import EVERYTHING, train
from benchmarks.rules_cost_serving import ForAll, Model, Serving, Way
from benchmarks.served_quality import Floats, lost, means, quality
from trainer.collectives import Ranks, start_ranks
from trainer.config import Config, preset
from trainer.data.synthetic import SyntheticStream
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions
from trainer.stream.slicing import concat_impressions

SLICE_S = 10
INTERVALS_S = {
    "never": 0,
    "5 h": 18_000,
    "1 h": 3_600,
    "30 min": 1_800,
    "5 min": 300,
    "1 min": 60,
    "10 s": SLICE_S,
}
"""0 = never after the first time."""
FRESHEST = "10 s"
ANSWERED_AT_ONCE = 1_024
JUDGED = 6
"""Slices of a minute, ..."""
JUDGED_OF = 42
"""... the first of each seven minutes; seven divides none of the intervals."""
COLUMNS = (
    *("interval", "auc", "auc_lost", "auc_95", "true_auc", "true_auc_lost", "true_auc_95"),
    *("gauc", "gauc_lost", "gauc_95", "true_gauc", "true_lost", "true_95"),
)


def is_judged(number: int) -> bool:
    return number % JUDGED_OF < JUDGED


class Replicated:
    """Serving at one interval. It answers late, but always by what it held when the slice came."""

    def __init__(self, interval_s: int, *, recommender: Recommender, config: Config) -> None:
        self._every = interval_s // SLICE_S
        self.serving = Serving(Way("", EVERYTHING), recommender=recommender, config=config)
        self.scores: list[Floats] = []
        self._waiting: list[Impressions] = []

    def due(self, number: int) -> bool:
        """Whether it is synchronised before this slice; not where the next one comes before anyone looks."""
        if number == 0 or not self._every:
            return number == 0
        return number % self._every == 0 and (is_judged(number) or self._every > JUDGED)

    def synchronise(self, model: Model, *, event_time_s: int) -> None:
        self.answer()
        self.serving.publish(model, now_s=event_time_s, event_time_s=event_time_s)

    def see(self, part: Impressions) -> None:
        self._waiting.append(part)
        if sum(len(one) for one in self._waiting) >= ANSWERED_AT_ONCE:
            self.answer()

    def answer(self) -> None:
        if self._waiting:
            self.scores.append(self.serving.judge(concat_impressions(self._waiting)))
            self._waiting = []


def learn(*, seed: int, hours: float, warm_up: float, pace: int, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """One training run; the outcome of each interval over what is judged of the hours after the warm-up."""
    per_slice = pace * SLICE_S // 3_600
    num_warm_up, num_slices = (int(part * 3_600) // SLICE_S for part in (warm_up, warm_up + hours))
    config = preset("quickstart")
    config = replace(
        config,
        seed=seed,
        impressions=num_slices * per_slice,
        produce=replace(config.produce, event_days=num_slices * SLICE_S / 86_400),
        train=replace(config.train, batch_size=per_slice),
    )
    recommender = Recommender(config, ranks=ranks)
    replicas = {
        name: Replicated(interval_s, recommender=recommender, config=config)
        for name, interval_s in INTERVALS_S.items()
    }
    for name, shard in recommender.shards.items():
        records = [one.serving.records[name] for one in replicas.values()]
        shard.changed = ForAll(shard.slots_per_rank, records)
    slices = SyntheticStream(config).batches(per_slice)
    for part, _ in islice(slices, num_warm_up):
        train(recommender, part, batch_size=per_slice)
    model = Model.of(recommender, config)
    judged, truths = [], []
    for number, (part, truth_NT) in enumerate(slices):
        due = [one for one in replicas.values() if one.due(number)]
        if due:
            model = model.with_dense(recommender)
        for one in due:
            one.synchronise(model, event_time_s=int(part.event_time_ms_N[0]) // 1_000)
        if is_judged(number):
            for one in replicas.values():
                one.see(part)
            judged.append(part)
            truths.append(truth_NT)
        train(recommender, part, batch_size=per_slice)
    return {name: outcome(one, judged=judged, truths=truths) for name, one in replicas.items()}


def outcome(
    replicated: Replicated, *, judged: Sequence[Impressions], truths: Sequence[Floats]
) -> dict[str, float]:
    """The quality of all answers: AUC by slice, GAUC by user."""
    replicated.answer()
    scores_NT = np.concatenate(replicated.scores)
    labels_NT = np.concatenate([part.labels_NT for part in judged])
    truth_NT = np.concatenate(truths)
    users_N = np.concatenate([part.user_ids_N for part in judged])
    slices_N = np.repeat(np.arange(len(judged)), [len(part) for part in judged])
    of_users, of_slices = (
        quality(scores_NT, labels_NT=labels_NT, truth_NT=truth_NT, users_N=groups_N)
        for groups_N in (users_N, slices_N)
    )
    return {
        "gauc": of_users["gauc"],
        "true_gauc": of_users["true_gauc"],
        "auc": of_slices["gauc"],
        "true_auc": of_slices["true_gauc"],
    }


def summary(outcomes: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """A row for each interval; differences are to the shortest one, paired by seed."""
    best = [one[FRESHEST] for one in outcomes]
    rows = []
    for name in outcomes[0]:
        own = [one[name] for one in outcomes]
        row: dict[str, Any] = {"interval": name}
        rows.append(row | means(own) | lost(best, own))
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 seed, 1 hour, 9,216 impressions an hour")
    parser.add_argument("--seeds", type=int, help="default 3, quick 1")
    parser.add_argument("--hours", type=float, help="event time after the warm-up; default 10, quick 1")
    parser.add_argument("--warm-up", type=float, help="hours of event time; default 2, quick 0.5")
    parser.add_argument("--pace", type=int, help="impressions an hour of event time; default 46,080")
    parser.add_argument("--plots", type=Path, help="a folder for the figure (SVG)")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    hours = options.hours or (1.0 if options.quick else 10.0)
    warm_up = options.warm_up or (0.5 if options.quick else 2.0)
    pace = options.pace or (9_216 if options.quick else 46_080)
    if pace < 3_600 // SLICE_S:
        raise SystemExit(f"--pace must be at least {3_600 // SLICE_S}, found {pace}")
    torch.set_num_threads(1)
    ranks = start_ranks()
    outcomes = []
    for seed in range(1, 1 + (options.seeds or (1 if options.quick else 3))):
        outcomes.append(learn(seed=seed, hours=hours, warm_up=warm_up, pace=pace, ranks=ranks))
        aucs = ", ".join(f"{name} {one['true_auc']:.5f}" for name, one in outcomes[-1].items())
        say(f"seed {seed}: AUC by true probabilities: {aucs}")
    rows = summary(outcomes)
    say_table(rows, COLUMNS)
    if options.plots:
        path = options.plots / "freshness_worth.svg"
        places = {name: name for name in INTERVALS_S}
        draw_measures(rows, path, place="interval", places=places, label="synchronised each (event time)")
        say(f"drawn: {path}")
    facts = {
        "hours": hours,
        "warm_up_hours": warm_up,
        "impressions_per_h": pace,
        "slice_s": SLICE_S,
        "seeds": outcomes,
    }
    say_json("freshness_worth", rows=rows, facts=facts)


if __name__ == "__main__":
    main()
