"""One rank of benchmarks.train_step: all contestants of one configuration in turns, in one process.

Started by torchrun, also for one rank. The last line that rank 0 writes is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from msgspec.structs import replace

from benchmarks.report import rounded, say
from benchmarks.train_step_ours import Ours
from benchmarks.train_step_parts import parts_of_a_step
from benchmarks.train_step_peers import ManagedCollision, Static
from benchmarks.train_step_stream import BATCH, Stream, config_for
from trainer.collectives import Ranks, start_ranks
from trainer.config import Config
from trainer.stream.columns import Impressions
from trainer.warm_up import compile_kernels

CHECKPOINT_EVERY_S = 60.0
CHECKPOINTS = 3
PEER_TURN_SHARE = 0.4
"""A contestant without a publishing interval needs no turn as long as one."""


class Contestant(Protocol):
    def step(self, impressions: Impressions) -> None: ...
    def begin_turn(self) -> None: ...
    def end_turn(self) -> None: ...


def contestants(
    config: Config, *, rows: int, ranks: Ranks, wanted: list[str], directory: Path
) -> dict[str, Contestant]:
    made: dict[str, Contestant] = {}
    for name in wanted:
        if name in ("ours", "ours_compiled"):
            address = (directory / f"{name}.address").read_text()
            own = replace(config, serving=replace(config.serving, shard_address=address))
            compiled = name == "ours_compiled"
            made[name] = Ours(own, rows=rows, ranks=ranks, directory=directory / name, compiled=compiled)
        elif name in ("static", "static_same_dense"):
            made[name] = Static(config, rows=rows, ranks=ranks, plain=name == "static")
        else:
            policy, interval = name.rsplit("_", 1)
            made[name] = ManagedCollision(
                config, rows=rows, ranks=ranks, policy=policy, interval=int(interval)
            )
    return made


class Turns:
    """The contestants' rates: impressions a second over all ranks, one value a turn."""

    def __init__(
        self, made: dict[str, Contestant], *, stream: Stream, ranks: Ranks, effort: argparse.Namespace
    ) -> None:
        self._made, self._stream, self._ranks = made, stream, ranks
        self._warm_steps = effort.warm_steps
        self.rates: dict[str, list[float]] = {name: [] for name in made}
        self.cpu_rates: dict[str, list[float]] = {name: [] for name in made}
        """Impressions a second of processor time, all threads of this rank together."""
        self._steps = {name: self._steps_in_a_turn(name, effort.turn_s) for name in made}

    def _steps_in_a_turn(self, name: str, turn_s: float) -> int:
        """The same on every rank; after some steps that warm the contestant up."""
        one = self._made[name]
        for batch in self._stream.batches(self._warm_steps):
            one.step(batch)
        began_s = time.perf_counter()
        batches = self._stream.batches(self._warm_steps)
        for batch in batches:
            one.step(batch)
        step_us = int(1e6 * (time.perf_counter() - began_s) / self._warm_steps)
        step_us = int(self._ranks.max(np.array([step_us], np.int64))[0])
        share = 1.0 if isinstance(one, Ours) else PEER_TURN_SHARE
        # MCH evicts every tenth batch: a turn has whole tens.
        return max(10, round(share * turn_s * 1e6 / step_us / 10) * 10)

    def round(self, turn: int) -> None:
        names = list(self._made)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            batches = self._stream.batches(self._steps[name])
            self._ranks.barrier()
            one = self._made[name]
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            one.begin_turn()
            for batch in batches:
                one.step(batch)
            one.end_turn()
            self._ranks.barrier()
            num = len(batches) * BATCH
            self.rates[name].append(num / (time.perf_counter() - began_s))
            own = num / self._ranks.world_size
            self.cpu_rates[name].append(own / (time.process_time() - began_cpu_s))


def measure(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    config = config_for(
        dim=options.dim,
        rows=options.rows,
        world_size=ranks.world_size,
        threads=options.threads,
    )
    compile_kernels(config)
    made = contestants(
        config, rows=options.rows, ranks=ranks, wanted=options.contestants, directory=options.directory
    )
    stream = Stream(config, rank=ranks.rank, world_size=ranks.world_size)
    turns = Turns(made, stream=stream, ranks=ranks, effort=options)
    for turn in range(options.rounds):
        turns.round(turn)
    ours = made["ours"]
    assert isinstance(ours, Ours)
    stalls_s = [ours.checkpoint_stall_s() for _ in range(CHECKPOINTS)]
    counters = next(iter(ours.recommender.shards.values())).ids.counters()
    facts = {
        "rates": _rounded(turns.rates),
        "cpu_rates": _rounded(turns.cpu_rates),
        "checkpoint_stall_ms": rounded(1e3 * float(np.median(stalls_s))),
        "checkpoint_share": float(np.median(stalls_s)) / CHECKPOINT_EVERY_S,
        "evicted": counters.evicted,
        "versions": ours.publisher.totals.delta,
        "rows_pushed": ours.publisher.totals.rows_pushed,
        "parts_ms": parts_of_a_step(ours, stream.batches(2 * options.warm_steps)),
    }
    for one in made.values():
        if isinstance(one, Ours):
            one.close()
    return facts


def _rounded(rates: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [rounded(rate) for rate in values] for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--turn-s", type=float, required=True)
    parser.add_argument("--warm-steps", type=int, required=True)
    parser.add_argument("--contestants", nargs="+", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ranks = start_ranks()
    facts = measure(options, ranks)
    if ranks.rank == 0:
        say(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
