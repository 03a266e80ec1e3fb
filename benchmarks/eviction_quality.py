"""Which policy keeps the better rows: a small model, predict-then-train, with a table too small for its ids.

python -m benchmarks.eviction_quality [--quick] [--plots DIR] [--trace FILE.csv --user C --item C ...]

Every stream is learned once a seed, policy and table size (10, 30, 60 and 100 % of its distinct ids). A seed
makes the synthetic stream and the model's first weights; for a trace, the weights alone. Without --trace, the
KuaiRand trace is taken from the folder that KUAIRAND_DIR names, if any. `gap` is kraken's AUC less the
policy's, paired by seed, with a 95 % interval (Student's t); `hit_rate` is the share of sightings whose id
had a row before the call; `re_entries` are ids that left and came back.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.eviction_policies import (
    ITEM_CLASS,
    USER_CLASS,
    MakeTable,
    PolicyTable,
    Setting,
    known_policies,
)
from benchmarks.factorisation import Factorisation, auc, initial_factors, log_loss
from benchmarks.quality_streams import SYNTHETIC, Stream, read_trace
from benchmarks.quality_summary import goals, summarised
from benchmarks.report import say, say_json, say_skipped, say_table
from feature_eviction import UniqueKeys, deduplicate, make_keys

SHARES = (0.1, 0.3, 0.6, 1.0)
EVENTS_PER_CALL = 64
SEEDS = 5
EVENTS, QUICK_EVENTS = 200_000, 20_000
ID_MASK = (1 << 52) - 1


class Call(NamedTuple):
    """A few events: what the id table is told, and where each event's user and item stand in it."""

    unique: UniqueKeys
    users_N: npt.NDArray[np.int32]
    items_N: npt.NDArray[np.int32]
    labels_N: npt.NDArray[np.int32]
    now_s: int


class Outcome(NamedTuple):
    auc: float
    log_loss: float
    hit_rate: float
    """NaN for a table that does not know what it holds."""
    re_entries: int
    num_bytes: int


def calls_of(stream: Stream) -> list[Call]:
    keys_U, _ = make_keys(stream.users_N, class_id=USER_CLASS)
    keys_I, _ = make_keys(stream.items_N, class_id=ITEM_CLASS)
    calls = []
    for start in range(0, len(stream.users_N), EVENTS_PER_CALL):
        of_call = slice(start, start + EVENTS_PER_CALL)
        labels_N = stream.positives_N[of_call]
        unique = deduplicate(
            np.concatenate([keys_U[of_call], keys_I[of_call]]), np.concatenate([labels_N, labels_N])
        )
        users_N, items_N = np.split(unique.inverse_N, 2)
        calls.append(Call(unique, users_N, items_N, labels_N, int(stream.time_s_N[of_call][-1])))
    return calls


def learn(stream: Stream, calls: list[Call], table: PolicyTable, *, seed: int) -> Outcome:
    """Each call is mapped, predicted with what was learned before it, then trained on."""
    generator = np.random.default_rng(seed)
    factors_VD = initial_factors(stream.num_ids, generator)
    model = Factorisation(table.num_slots, generator)
    has_left_V = np.zeros(stream.num_ids, np.bool_)
    logits = []
    num_missed = re_entries = 0
    for call in calls:
        mapped = table.map(call.unique, call.now_s)
        new_ids_M = mapped.new_keys_M & ID_MASK
        model.reset(mapped.new_slots_M, factors_VD[new_ids_M])
        num_missed += len(new_ids_M) + int((mapped.slots_U < 0).sum())
        re_entries += int(has_left_V[new_ids_M].sum())
        has_left_V[mapped.evicted_keys_K & ID_MASK] = True
        users_N, items_N = mapped.slots_U[call.users_N], mapped.slots_U[call.items_N]
        logits.append(model.predict(users_N, items_N))
        model.train(users_N, items_N, call.labels_N)
    logits_N = np.concatenate(logits)
    num_distinct = sum(len(call.unique.keys_U) for call in calls)
    return Outcome(
        auc=auc(logits_N, stream.positives_N),
        log_loss=log_loss(logits_N, stream.positives_N),
        hit_rate=1.0 - num_missed / num_distinct if table.counts_hits else float("nan"),
        re_entries=re_entries,
        num_bytes=table.num_bytes,
    )


MakeStream = Callable[[int], Stream]


def streams_of(options: argparse.Namespace) -> Iterator[tuple[str, MakeStream]]:
    """Name and how a seed makes it."""
    names = {"user": options.user, "item": options.item, "time": options.time, "label": options.label}
    trace = options.trace or _kuairand_trace()
    if trace is None:
        say_skipped("the KuaiRand trace", "set KUAIRAND_DIR to a folder with trace_*.csv.gz, or give --trace")
    else:
        read = read_trace(trace, **names)
        yield read.name, lambda seed: read
    if options.trace:
        return
    num_events = options.events or (QUICK_EVENTS if options.quick else EVENTS)
    for name, make in SYNTHETIC.items():
        yield name, partial(_synthetic, make, num_events)


def _synthetic(make: Callable[[int, np.random.Generator], Stream], num_events: int, seed: int) -> Stream:
    return make(num_events, np.random.default_rng(seed))


def _kuairand_trace() -> Path | None:
    folder = os.environ.get("KUAIRAND_DIR")
    found = sorted(Path(folder).glob("trace_*.csv*")) if folder else []
    return found[0] if found else None


def outcomes_of(
    make: MakeStream, policies: dict[str, MakeTable], *, seeds: int
) -> dict[tuple[float, str], list[Outcome]]:
    """By (share of the distinct ids, policy), one for each seed."""
    outcomes: dict[tuple[float, str], list[Outcome]] = {}
    for seed in range(seeds):
        stream = make(seed)
        calls = calls_of(stream)
        span_s = int(stream.time_s_N[-1] - stream.time_s_N[0])
        # A call must fit: its own rows cannot leave for one another.
        smallest = max(len(call.unique.keys_U) for call in calls)
        for share in SHARES:
            num_slots = max(smallest, int(share * stream.num_ids))
            setting = Setting(num_slots, span_s, seed, [call.unique.keys_U for call in calls])
            for policy, make_table in policies.items():
                table = make_table(setting)
                outcomes.setdefault((share, policy), []).append(learn(stream, calls, table, seed=seed))
    return outcomes


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, short synthetic streams")
    parser.add_argument("--trace", type=Path, help="a CSV file instead of all other streams")
    parser.add_argument("--user", default="user_id")
    parser.add_argument("--item", default="video_id")
    parser.add_argument("--time", default="time_ms")
    parser.add_argument("--label", default="is_like_or_hate", help="positive above 0.5")
    parser.add_argument("--events", type=int, help=f"of a synthetic stream (default {EVENTS:,})")
    parser.add_argument("--seeds", type=int, help=f"default {SEEDS}, quick 2")
    parser.add_argument("--plots", type=Path, help="a folder for the figures (SVG)")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    policies, unknown = known_policies()
    for kind in unknown:
        say_skipped(kind, "the id table here has no score of this name")
    rows: list[dict[str, Any]] = []
    for name, make in streams_of(options):
        outcomes = outcomes_of(make, policies, seeds=options.seeds or (2 if options.quick else SEEDS))
        of_stream = summarised(name, {key: [one._asdict() for one in all_] for key, all_ in outcomes.items()})
        say_table(of_stream, [column for column in of_stream[0] if column != "stream"] + ["stream"])
        rows += of_stream
    for line in (facts := goals(rows))["lines"]:
        say(line)
    if options.plots:
        from benchmarks.quality_plots import draw

        draw(rows, options.plots)
    say_json("eviction_quality", rows=rows, facts=facts)


if __name__ == "__main__":
    main()
