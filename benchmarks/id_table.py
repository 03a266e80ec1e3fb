"""How many million ids a second the id table looks up, maps, deletes and loads, beside others doing the same.

python -m benchmarks.id_table [--quick] [--rows N ...] [--peers NAME ...] [--rounds N] [--own-time]

Every figure is a pair: IdTable and one contestant do the same calls in turns, on one thread; a rate is the
median over rounds. `ratio` is ours over theirs, in speed. A call has 20,000 ids; every slot of a table is
taken, so a new id costs an eviction.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.id_table_goals import goals
from benchmarks.id_table_peers import CLASS_ID, PEERS, Keys, Ours, Peer, why_absent
from benchmarks.id_table_ranks import victim_ranks
from benchmarks.report import (
    Seconds,
    call_times_ms,
    in_turns,
    median_rate,
    rounded,
    say,
    say_json,
    say_skipped,
    say_table,
)
from benchmarks.zipf import zipf_ranks
from feature_eviction import make_keys

ROWS = (1_000_000, 10_000_000, 50_000_000)
IDS_PER_CALL = 20_000
MAP_CASES = {"map_hit": 0.0, "map_new5": 0.05, "map_new20": 0.20}
LOOKUP_STREAMS = ("zipf", "uniform", "all_new")

TIMED_ROUND = 50
"""Calls of one contestant in a row where single calls are looked at."""
DRIFT_MAX = 0.02
"""Share of a table's first ids that may be evicted before a round of hits begins."""

# An odd factor modulo 2^52 spreads the ranks over all raw ids, one to one.
_SPREAD = 0x9E3779B97F4A7
_ID_MASK = (1 << 52) - 1


@dataclass(frozen=True, kw_only=True)
class Effort:
    rounds: int
    calls_per_round: int
    limit_s: float
    """No further round of a case begins after so long."""
    timed_calls: int
    """Calls whose single times are looked at."""
    clock: Callable[[], float] = time.perf_counter
    rank_passes: int
    """Passes for victims whose ranks are looked at."""


FULL = Effort(rounds=9, calls_per_round=10, limit_s=3.0, timed_calls=3_000, rank_passes=256)
QUICK = Effort(rounds=5, calls_per_round=5, limit_s=0.4, timed_calls=1_000, rank_passes=64)


def keys_of(ranks_N: Keys) -> Keys:
    keys_N, _ = make_keys((ranks_N * _SPREAD) & _ID_MASK, class_id=CLASS_ID)
    return keys_N


class Streams:
    """Calls over the ids that a table was filled with (ranks below num_rows), and ids that are always new."""

    def __init__(self, num_rows: int, *, seed: int) -> None:
        self._num_rows = num_rows
        self._generator = np.random.default_rng(seed)
        self._next_new = num_rows

    def held(self, stream: str, num_ids: int) -> Keys:
        if stream == "uniform":
            return keys_of(self._generator.integers(0, self._num_rows, num_ids))
        return keys_of(zipf_ranks(self._generator, num_ids, num_ranks=self._num_rows))

    def new(self, num_ids: int) -> Keys:
        self._next_new += num_ids
        return keys_of(np.arange(self._next_new - num_ids, self._next_new))

    def calls(self, stream: str, *, new_share: float, num_calls: int) -> list[Keys]:
        if stream == "all_new":
            return [self.new(IDS_PER_CALL) for _ in range(num_calls)]
        calls = []
        for _ in range(num_calls):
            keys_N = self.held(stream, IDS_PER_CALL)
            is_new_N = self._generator.random(IDS_PER_CALL) < new_share
            keys_N[is_new_N] = self.new(int(is_new_N.sum()))
            calls.append(keys_N)
        return calls

    def distinct_held(self, num_calls: int) -> list[Keys]:
        """As far as they reach: a small table is empty before the last call."""
        order_N = self._generator.permutation(self._num_rows)[: num_calls * IDS_PER_CALL]
        return [keys_of(order_N[i : i + IDS_PER_CALL]) for i in range(0, len(order_N), IDS_PER_CALL)]


class Pairing:
    """IdTable and one contestant on tables of one size."""

    def __init__(self, name: str, num_rows: int, effort: Effort) -> None:
        self.name, self.num_rows, self.effort = name, num_rows, effort
        self.rows: list[dict[str, Any]] = []
        self._streams = Streams(num_rows, seed=num_rows)
        self._keys_S = keys_of(np.random.default_rng(0).permutation(num_rows))
        self._fill()

    def _fill(self) -> None:
        self._ours = Ours(self._keys_S)
        self._theirs: Peer = PEERS[self.name](self._keys_S)
        self._num_new_filled = self._ours.num_new

    def run(self) -> None:
        has = self._theirs.cases
        for stream in LOOKUP_STREAMS:
            self._calls(f"lookup_{stream}", stream)
        if "map" in has:
            for case, new_share in MAP_CASES.items():
                for stream in ("zipf", "uniform"):
                    self._calls(case, stream, new_share=new_share)
        if "delete" in has:
            self._delete()
            # Who deleted from its own table would find room where the other has to evict.
            self._refill()
        if "load" in has:
            self._load("load", self._ours.loader())
        if "load_rows" in has:
            self._load("load_rows", self._ours.row_loader())
        if "map" in has:
            self._calls("map_all_new", "all_new")

    def _refill(self) -> None:
        """Both tables anew, full of the first ids."""
        self.close()
        self._fill()

    def bytes_per_id(self) -> dict[str, float]:
        used = {"ours": self._ours.bytes_used(), self.name: self._theirs.bytes_used()}
        return {name: rounded(num_bytes / self.num_rows) for name, num_bytes in used.items()}

    def close(self) -> None:
        self._theirs.close()

    def _calls(self, case: str, stream: str, *, new_share: float = 0.0) -> None:
        act = "lookup" if case.startswith("lookup") else "map"
        num_calls = self._theirs.calls_per_round or self.effort.calls_per_round

        def next_round() -> list[Keys]:
            # Ids that left are no longer hits: the tables are made anew before many are gone.
            if stream != "all_new" and self._ours.num_new - self._num_new_filled > DRIFT_MAX * self.num_rows:
                self._refill()
            return self._streams.calls(stream, new_share=new_share, num_calls=num_calls)

        seconds = in_turns(
            {
                "ours": lambda keys_N: getattr(self._ours, act)(keys_N),
                "theirs": lambda keys_N: getattr(self._theirs, act)(keys_N),
            },
            next_round,
            rounds=self.effort.rounds,
            limit_s=self.effort.limit_s,
            clock=self.effort.clock,
        )
        self._row(case, stream, seconds, per_call=IDS_PER_CALL)

    def _delete(self) -> None:
        num_calls = self.effort.rounds * self.effort.calls_per_round
        calls = self._streams.distinct_held(num_calls)
        per_round = max(1, len(calls) // self.effort.rounds)
        rounds = [calls[i : i + per_round] for i in range(0, len(calls) - per_round + 1, per_round)]
        seconds = in_turns(
            {"ours": self._ours.deleter(), "theirs": self._theirs.deleter()},
            partial(next, iter(rounds)),
            rounds=len(rounds),
            limit_s=self.effort.limit_s,
            clock=self.effort.clock,
        )
        self._row("delete", "uniform", seconds, per_call=len(calls[0]))

    def _load(self, case: str, ours: Callable[[], object]) -> None:
        theirs = self._theirs.loader()
        seconds = in_turns(
            {"ours": lambda _: ours(), "theirs": lambda _: theirs()},
            lambda: [None],
            rounds=self.effort.rounds,
            limit_s=self.effort.limit_s,
            clock=self.effort.clock,
        )
        self._row(case, "all_rows", seconds, per_call=self.num_rows)

    def _row(self, case: str, stream: str, seconds: dict[str, Seconds], *, per_call: int) -> None:
        ours, theirs = (median_rate(seconds[name], per_call=per_call) for name in ("ours", "theirs"))
        self.rows.append(
            {
                "case": case,
                "stream": stream,
                "table_rows": self.num_rows,
                "peer": self.name,
                "ours": rounded(ours),
                "theirs": rounded(theirs),
                "ratio": rounded(ours / theirs),
                "rounds": len(seconds["ours"]),
            }
        )

    def call_times(self, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
        """Single calls with 5 % new ids, some thousand of them, both in turns."""
        # The cases before have pushed the first ids out: all calls would be of new ones.
        self._refill()
        seconds = in_turns(
            {"ours": self._ours.map, self.name: self._theirs.map},
            partial(self._streams.calls, "zipf", new_share=MAP_CASES["map_new5"], num_calls=TIMED_ROUND),
            rounds=max(1, self.effort.timed_calls // TIMED_ROUND),
            limit_s=60.0,
            clock=clock,
        )
        return {name: call_times_ms(times) for name, times in seconds.items()}


def measure(num_rows: int, peers: list[str], effort: Effort) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of all contestants at one size, and the facts of that size."""
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"table_rows": num_rows, "bytes_per_id": {}}
    for name in peers:
        absent = why_absent(name, num_rows)
        if absent:
            say_skipped(f"{name} at {num_rows:,} rows", absent)
            continue
        pairing = Pairing(name, num_rows, effort)
        facts["bytes_per_id"] |= pairing.bytes_per_id()
        pairing.run()
        if name == "native":
            facts["call_ms"] = pairing.call_times(time.perf_counter)
            facts["call_cpu_ms"] = pairing.call_times(time.thread_time)
        pairing.close()
        say_table(pairing.rows, ("case", "stream", "table_rows", "peer", "ours", "theirs", "ratio", "rounds"))
        rows += pairing.rows
        del pairing
        gc.collect()
    return rows, facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1M rows, short rounds: about a minute")
    parser.add_argument("--rows", type=int, nargs="+", help=f"table sizes (default {ROWS}, quick {ROWS[:1]})")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument(
        "--own-time",
        action="store_true",
        help="the process's own time instead of the wall's: for busy machines",
    )
    parser.add_argument("--rounds", type=int, help="at most so many of each case")
    options = parser.parse_args()
    effort = QUICK if options.quick else FULL
    if options.own_time:
        effort = replace(effort, clock=time.process_time)
    if options.rounds:
        timed_calls = min(effort.timed_calls, TIMED_ROUND * options.rounds)
        effort = replace(effort, rounds=options.rounds, timed_calls=timed_calls)
    sizes = options.rows or (ROWS[:1] if options.quick else ROWS)
    say(f"M ids a second, {IDS_PER_CALL:,} ids a call, one thread; ratio = ours / theirs")
    rows, by_size = [], []
    for num_rows in sizes:
        new_rows, facts = measure(num_rows, options.peers, effort)
        rows += new_rows
        by_size.append(facts)
    first = by_size[0]
    facts = {"bytes_per_id": first["bytes_per_id"].get("ours"), **first.get("call_ms", {}).get("ours", {})}
    ranks = victim_ranks(passes=effort.rank_passes)
    say(f"victims' true rank among all evictable rows: {ranks}")
    lines = goals(rows, by_size)
    for line in lines:
        say(line)
    say_json("id_table", rows=rows, facts={**facts, "victim_rank": ranks, "sizes": by_size, "lines": lines})


if __name__ == "__main__":
    main()
