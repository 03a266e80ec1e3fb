"""Does the dense network's form cost quality? Predict-then-train AUC of its forms on the synthetic stream.

python -m benchmarks.dense_quality [--quick] [--seeds N] [--impressions N]

Each seed makes a stream and the first weights; all forms begin with the same weights, see the same
impressions and differ in nothing else. `plain` is PEPNet as one writes it down, the others are what
training offers. The AUC is over the later half of the stream, the mean of all tasks; differences are
paired by seed.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from benchmarks.plain_pepnet import PlainPEPNet, copy_weights
from benchmarks.report import say, say_json, say_table
from trainer.collectives import Ranks, start_ranks
from trainer.compare.statistics import half_width
from trainer.config import Config, preset
from trainer.data.synthetic import SyntheticStream
from trainer.metrics import auc
from trainer.model import PEPNet
from trainer.recommender import Recommender

FORMS = ("plain", "float32", "bfloat16")


class PlainRecommender(Recommender):
    """The recommender with the plain dense network, from the same first weights, and Adam as it comes."""

    def __init__(self, config: Config, *, ranks: Ranks) -> None:
        super().__init__(config, ranks=ranks)
        plain = PlainPEPNet(self.layout, num_tasks=len(config.schema.tasks), config=config.model)
        assert isinstance(self.dense, PEPNet)
        copy_weights(self.dense, plain)
        self._learn = lambda embedding_BE, _: plain(embedding_BE)
        rate = config.optimizer.dense_learning_rate
        self.dense_optimizer = torch.optim.Adam(plain.parameters(), lr=rate)


def mean_auc(form: str, *, seed: int, impressions: int, ranks: Ranks) -> float:
    config = preset("quickstart")
    precision = "bfloat16" if form == "bfloat16" else "float32"
    train = replace(config.train, precision=precision)
    config = replace(config, seed=seed, impressions=impressions, train=train)
    recommender = (PlainRecommender if form == "plain" else Recommender)(config, ranks=ranks)
    scores, labels, known = [], [], []
    seen = 0
    for batch, _ in SyntheticStream(config).batches(config.train.batch_size):
        scores_NT = recommender.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
        seen += len(batch)
        if seen > impressions // 2:
            scores.append(scores_NT)
            labels.append(batch.labels_NT)
            known.append(batch.known_NT)
        if seen >= impressions:
            break
    scores_MT, labels_MT, known_MT = (np.concatenate(parts) for parts in (scores, labels, known))
    aucs = [
        auc(scores_MT[known_M, task], labels_MT[known_M, task]) for task, known_M in enumerate(known_MT.T)
    ]
    return float(np.mean([value for value in aucs if value is not None]))


def summary(aucs: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Each form's mean, and its difference to `plain` with the 95 % interval of the paired mean."""
    rows = []
    for form, values in aucs.items():
        differences = np.array(values) - np.array(aucs["plain"])
        rows.append(
            {
                "form": form,
                "auc": round(float(np.mean(values)), 5),
                "minus_plain": round(float(differences.mean()), 6),
                "interval": half_width(differences.tolist()),
                "seeds": len(values),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds, 20,000 impressions")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--impressions", type=int)
    options = parser.parse_args()
    seeds = options.seeds or (2 if options.quick else 5)
    impressions = options.impressions or (20_000 if options.quick else 100_000)
    torch.set_num_threads(1)
    ranks = start_ranks()
    aucs: dict[str, list[float]] = {form: [] for form in FORMS}
    for seed in range(1, seeds + 1):
        for form in FORMS:
            aucs[form].append(mean_auc(form, seed=seed, impressions=impressions, ranks=ranks))
        say(f"seed {seed}: " + ", ".join(f"{form} {values[-1]:.5f}" for form, values in aucs.items()))
    rows = summary(aucs)
    say_table(rows, ("form", "auc", "minus_plain", "interval", "seeds"))
    say_json("dense_quality", rows=rows, facts={"impressions": impressions, "aucs": aucs})


if __name__ == "__main__":
    main()
