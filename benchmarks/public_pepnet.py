"""PEPNet beside a public implementation of it: mlgb 0.0.7, on the same stream, at the same sizes.

python -m benchmarks.public_pepnet [--quick] [--seeds N] [--impressions N] [--env DIR]

mlgb needs TensorFlow, so an environment of its own is made for it (in `.bench-envs`, or in --env; some 3 GB
with its torch and TensorFlow) and its side runs there; streams and predictions travel as files. Everyone
sees the same impressions in the same batches, predicts each before it learns it, has embeddings of 16, two
tower layers that end in 64, and room for every id; the later half is judged. The peer's first tower layer is
as wide as it must be for at least as many dense weights as ours has. Its ids are numbered beforehand, which
a stream does not allow, and its numbers come as our buckets.

mlgb           as its examples use it: the optimizer gets model.parameters()
mlgb_weights   the weights that parameters() lacks are handed to the optimizers by name, and the embeddings
               learn by AdaGrad at 0.05 as ours do
mlgb_inputs    mlgb_weights, and the gates also see the stopped embedding (gnu_if_concat_general_inputs)
mlgb_small     mlgb_inputs, and the embeddings begin as small as ours, not with a deviation of one

`hidden` in the last line counts, for mlgb as it comes, the tensors of the EPNet gate and of the embeddings
that are in parameters() and in state_dict(), those that got a gradient, and the largest change of a weight by
all of training. cpu_s is the process's own time for the whole stream, one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from benchmarks.memory_worth import Stream, bytes_for, distinct_keys, with_budget
from benchmarks.peer_environment import PeerMissingError, environment
from benchmarks.report import rounded, say, say_json, say_skipped, say_table
from benchmarks.served_quality import Floats, lost, means, quality
from trainer.collectives import Ranks, start_ranks
from trainer.config import Config, preset
from trainer.config.config import OptimizerConfig
from trainer.data.synthetic import SyntheticStream
from trainer.features import bucketise
from trainer.recommender import Recommender

REPOSITORY = Path(__file__).resolve().parents[1]
REQUIREMENTS = ("torch==2.13.0", "mlgb==0.0.7")
DEFAULT_ENVIRONMENT = REPOSITORY / ".bench-envs" / "mlgb"
OURS = "freshet"
DOMAIN_FEATURES = ("domain", "domain_click_rate")
PRIOR_FEATURES = ("user_id", "item_id", "author_id")
"""The peer takes its prior features out of the towers' input, so all of ours would leave it next to none."""
FIRST_VALUES = OptimizerConfig().embedding_init_scale
PEERS: dict[str, dict[str, Any]] = {
    "mlgb": {"all_weights": False, "options": {}},
    "mlgb_weights": {"all_weights": True, "options": {}},
    "mlgb_inputs": {"all_weights": True, "options": {"gnu_if_concat_general_inputs": True}},
    "mlgb_small": {
        "all_weights": True,
        "options": {"gnu_if_concat_general_inputs": True},
        "first_values": FIRST_VALUES,
    },
}
LAST_WIDTH = 64
PEER_LIMIT_S = 3_600
COLUMNS = (
    *("model", "dense_weights", "embedding_weights", "trained_weights", "cpu_s", "auc", "auc_lost", "auc_95"),
    *("gauc", "gauc_lost", "gauc_95", "true_gauc", "true_lost", "true_95"),
)


def write_stream(stream: Stream, config: Config, path: Path) -> dict[str, Any]:
    """The stream as the peer reads it: ids from 1 on, tags padded by 0. Returns: settings that follow."""
    columns, sizes = [], {}
    for feature in config.schema.features:
        if feature.kind == "multi":
            continue
        if feature.kind == "dense":
            numbers_N = np.concatenate([part.dense[feature.name] for part, _ in stream])
            ids_N = bucketise(numbers_N, edges=feature.bucket_edges)
        else:
            ids_N = np.concatenate([part.sparse[feature.name].ids_L for part, _ in stream])
        known_U, number_N = np.unique(ids_N, return_inverse=True)
        columns.append(number_N.astype(np.int32) + 1)
        sizes[feature.name] = len(known_U)
    tags = [part.sparse["tags"] for part, _ in stream]
    lengths_N = np.concatenate([one.lengths_N for one in tags])
    known_U, number_L = np.unique(np.concatenate([one.ids_L for one in tags]), return_inverse=True)
    tags_NL = np.zeros((len(lengths_N), int(lengths_N.max())), np.int32)
    tags_NL[np.arange(tags_NL.shape[1]) < lengths_N[:, None]] = number_L + 1
    np.savez(
        path,
        ids_NF=np.stack(columns, axis=1),
        tags_NL=tags_NL,
        labels_NT=np.concatenate([part.labels_NT for part, _ in stream]),
    )
    names = list(sizes)
    return {
        "stream": str(path),
        "features": sizes,
        "num_tags": len(known_U),
        "tags_max": tags_NL.shape[1],
        "num_tasks": len(config.schema.tasks),
        "domain_features": [names.index(name) for name in DOMAIN_FEATURES],
        "prior_features": [names.index(name) for name in PRIOR_FEATURES],
        "dim": config.tables[0].dim,
        "batch_size": config.train.batch_size,
        "seed": config.seed,
    }


def run_peer(
    python: Path, settings: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Floats], dict[str, dict[str, Any]]]:
    """Predictions [N, T], and what was found, by name. Raises: RuntimeError with the end of what it said."""
    scores, file = folder / "scores.npz", folder / "settings.json"
    file.write_text(json.dumps({**settings, "scores": str(scores)}))
    done = subprocess.run(
        [str(python), str(REPOSITORY / "benchmarks" / "public_pepnet_peer.py"), str(file)],
        capture_output=True,
        text=True,
        timeout=PEER_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the peer ended with {done.returncode}; it said:\n{done.stderr[-2000:]}")
    with np.load(scores, allow_pickle=False) as arrays:
        return dict(arrays), json.loads(done.stdout.splitlines()[-1])


def run_ours(config: Config, stream: Stream, *, ranks: Ranks) -> tuple[Floats, dict[str, Any]]:
    roomy = with_budget(config, bytes_for(distinct_keys(stream, config), config))
    recommender = Recommender(roomy, ranks=ranks)
    start_s = time.process_time()
    scores = [recommender.train(part, now_s=int(part.event_time_ms_N.max()) // 1000) for part, _ in stream]
    return np.concatenate(scores), {
        "cpu_s": time.process_time() - start_s,
        "parameters": sum(parameter.numel() for parameter in recommender.dense.parameters()),
    }


def of_seed(seed: int, *, impressions: int, python: Path | None, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Everyone on one stream, by name."""
    config = replace(preset("quickstart"), seed=seed, impressions=impressions)
    stream = list(SyntheticStream(config).batches(config.train.batch_size))
    judged = slice(impressions // 2, impressions)
    labels_NT = np.concatenate([part.labels_NT for part, _ in stream])[judged]
    truth_NT = np.concatenate([truth_NT for _, truth_NT in stream])[judged]
    users_N = np.concatenate([part.user_ids_N for part, _ in stream])[judged]

    def outcome(scores_NT: Floats) -> dict[str, Any]:
        return dict(quality(scores_NT[judged], labels_NT=labels_NT, truth_NT=truth_NT, users_N=users_N))

    scores_NT, said = run_ours(config, stream, ranks=ranks)
    embedded = distinct_keys(stream, config) * config.tables[0].dim
    weights = {"dense_weights": said["parameters"], "embedding_weights": embedded}
    weights["trained_weights"] = sum(weights.values())
    outcomes = {OURS: outcome(scores_NT) | weights | {"cpu_s": said["cpu_s"]}}
    if python is None:
        return outcomes
    with tempfile.TemporaryDirectory() as folder:
        settings = write_stream(stream, config, Path(folder) / "stream.npz")
        ways = {
            name: peer | {"tower_widths": (peer_width(settings, peer, wanted=said["parameters"]), LAST_WIDTH)}
            for name, peer in PEERS.items()
        }
        scores, told = run_peer(python, settings | {"ways": ways}, Path(folder))
    for name, way in ways.items():
        outcomes[name] = outcome(scores[name]) | peer_weights(told[name], all_weights=way["all_weights"])
        outcomes[name] |= {"cpu_s": told[name]["cpu_s"], "hidden": told[name]["hidden"]}
    return outcomes


def peer_width(settings: Mapping[str, Any], peer: Mapping[str, Any], *, wanted: int) -> int:
    """The first tower layer at which the peer has at least so many dense weights, by its own shapes."""
    dim, num_tasks, num_domain = settings["dim"], settings["num_tasks"], len(DOMAIN_FEATURES)
    # The tags are one more; what is neither domain nor prior goes through the towers, once a domain feature.
    num_general = len(settings["features"]) + 1 - num_domain - len(PRIOR_FEATURES)
    concat = peer["options"].get("gnu_if_concat_general_inputs", False)
    num_domain += num_general if concat else 0
    width_in = num_general * num_domain * dim
    prior_in = len(PRIOR_FEATURES) * dim + (width_in if concat else 0)
    width = 0
    while True:
        width += 4
        widths = (width, LAST_WIDTH, 1)
        towers, last = 0, width_in
        for one in widths:
            towers += (last + 1) * one
            last = one
        gates = sum((prior_in + 1) * one + (one + 1) * one for one in widths)
        if num_tasks * towers + gates >= wanted:
            return width


def peer_weights(told: Mapping[str, Any], *, all_weights: bool) -> dict[str, int]:
    gate, embeddings = (told["hidden"][name]["values"] for name in ("epnet_gate", "embeddings"))
    return {
        "dense_weights": told["parameters"] + gate,
        "embedding_weights": embeddings,
        "trained_weights": told["parameters"] + (gate + embeddings if all_weights else 0),
    }


def summary(of_seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each model; differences are ours less the row's own, paired by seed."""
    best = [one[OURS] for one in of_seeds]
    rows = []
    for name in of_seeds[0]:
        own = [one[name] for one in of_seeds]
        counted = ("dense_weights", "embedding_weights", "trained_weights")
        row: dict[str, Any] = {"model": name}
        row |= {column: round(float(np.mean([one[column] for one in own]))) for column in counted}
        row["cpu_s"] = rounded(float(np.mean([one["cpu_s"] for one in own])))
        rows.append(row | means(own) | lost(best, own))
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 seed, 20,000 impressions")
    parser.add_argument("--seeds", type=int, help="default 5, quick 1")
    parser.add_argument("--impressions", type=int, help="default 100,000")
    parser.add_argument("--env", type=Path, default=DEFAULT_ENVIRONMENT, help="the peer's environment")
    parser.add_argument("--no-install", action="store_true", help="without the peer if it is not there")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    impressions = options.impressions or (20_000 if options.quick else 100_000)
    python = None
    try:
        python = environment(options.env, REQUIREMENTS, install=not options.no_install)
    except PeerMissingError as error:
        say_skipped("mlgb", str(error))
    torch.set_num_threads(1)
    ranks = start_ranks()
    of_seeds = []
    for seed in range(1, 1 + (options.seeds or (1 if options.quick else 5))):
        of_seeds.append(of_seed(seed, impressions=impressions, python=python, ranks=ranks))
        aucs = ", ".join(f"{name} {one['auc']:.5f}" for name, one in of_seeds[-1].items())
        say(f"seed {seed}: AUC {aucs}")
    rows = summary(of_seeds)
    say_table(rows, COLUMNS)
    facts: dict[str, Any] = {"impressions": impressions, "seeds": len(of_seeds), "peer": list(REQUIREMENTS)}
    if "mlgb" in of_seeds[0]:
        facts["hidden"] = of_seeds[0]["mlgb"]["hidden"]
        for name, state in facts["hidden"].items():
            say(
                f"mlgb, {name}: {state['values']:,} weights in {state['tensors']} tensors; in parameters() "
                f"{state['in_parameters']}, in state_dict() {state['in_state_dict']}, with a gradient "
                f"{state['with_gradient']}; largest change by training {state['largest_change']:g}"
            )
    say_json("public_pepnet", rows=rows, facts=facts)


if __name__ == "__main__":
    main()
