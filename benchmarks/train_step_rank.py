"""One rank of benchmarks.train_step: all contestants of one configuration in turns, in one process.

Started by torchrun, also for one rank. The last line that rank 0 writes is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
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
from benchmarks.train_step_stalls import checkpoint_facts, version_stall_ms
from benchmarks.train_step_stream import BATCH, SECOND_SIGHT, Stream, config_for
from trainer.collectives import Ranks, start_ranks
from trainer.stream.columns import Impressions
from trainer.warm_up import compile_kernels

PEER_TURN_SHARE = 0.4
"""A contestant without a publishing interval needs no turn as long as one."""


class Contestant(Protocol):
    def run(self, batches: Sequence[Impressions]) -> None: ...
    def begin_turn(self) -> None: ...
    def end_turn(self) -> None: ...


def contestants(options: argparse.Namespace, *, ranks: Ranks) -> dict[str, Contestant]:
    made: dict[str, Contestant] = {}
    sizes = {"dim": options.dim, "rows": options.rows, "threads": options.threads}
    always = config_for(**sizes, world_size=ranks.world_size)
    second_sight = config_for(**sizes, world_size=ranks.world_size, admission=SECOND_SIGHT)
    for config in (always, second_sight):
        compile_kernels(config)
    for name in options.contestants:
        if name.startswith("ours"):
            config = always if name == "ours_always" else second_sight
            address = (options.directory / f"{name}.address").read_text()
            made[name] = Ours(
                replace(config, serving=replace(config.serving, shard_address=address)),
                rows=options.rows,
                ranks=ranks,
                directory=options.directory / name,
                compiled=name == "ours_compiled",
            )
        elif name.startswith("static"):
            made[name] = Static(always, rows=options.rows, ranks=ranks, plain=name == "static")
        else:
            policy, interval = name.rsplit("_", 1)
            made[name] = ManagedCollision(
                always, rows=options.rows, ranks=ranks, policy=policy, interval=int(interval)
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
        one.run(self._stream.batches(self._warm_steps))
        batches = self._stream.batches(self._warm_steps)
        began_s = time.perf_counter()
        one.run(batches)
        step_us = int(1e6 * (time.perf_counter() - began_s) / self._warm_steps)
        step_us = int(self._ranks.gather(np.array([step_us], np.int64)).max())
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
            one.run(batches)
            one.end_turn()
            self._ranks.barrier()
            num = len(batches) * BATCH
            self.rates[name].append(num / (time.perf_counter() - began_s))
            own = num / self._ranks.world_size
            self.cpu_rates[name].append(own / (time.process_time() - began_cpu_s))


def measure(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    made = contestants(options, ranks=ranks)
    stream = Stream(
        config_for(dim=options.dim, rows=options.rows, world_size=ranks.world_size, threads=options.threads),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    turns = Turns(made, stream=stream, ranks=ranks, effort=options)
    every_ours = {name: one for name, one in made.items() if isinstance(one, Ours)}
    before = {name: (_evicted(one), one.steps_done) for name, one in every_ours.items()}
    for turn in range(options.rounds):
        turns.round(turn)
    facts: dict[str, Any] = {"rates": _rounded(turns.rates), "cpu_rates": _rounded(turns.cpu_rates)}
    if not options.rates_only:
        facts["evicted_a_step"] = {
            name: rounded((_evicted(one) - before[name][0]) / (one.steps_done - before[name][1]))
            for name, one in every_ours.items()
        }
        facts |= _facts_of(every_ours, stream=stream, num_steps=2 * options.warm_steps)
    for one in every_ours.values():
        one.close()
    return facts


def _facts_of(every_ours: dict[str, Ours], *, stream: Stream, num_steps: int) -> dict[str, Any]:
    first = every_ours["ours"]
    totals = first.publisher.totals
    facts: dict[str, Any] = {"versions": totals.delta, "rows_pushed": totals.rows_pushed}
    facts |= checkpoint_facts(first, stream=stream, num_steps=num_steps)
    facts["version_stall_ms"] = version_stall_ms(first, stream=stream)
    facts["parts_ms"] = {
        name: parts_of_a_step(one, stream.batches(num_steps)) for name, one in every_ours.items()
    }
    return facts


def _evicted(ours: Ours) -> int:
    """Of this rank, so far."""
    return sum(sum(shard.ids.counters().evicted.values()) for shard in ours.recommender.shards.values())


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
    parser.add_argument("--rates-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ranks = start_ranks()
    facts = measure(options, ranks)
    if ranks.rank == 0:
        say(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
