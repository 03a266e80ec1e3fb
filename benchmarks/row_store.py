"""How many million rows a second the row store reads and replaces, beside other stores doing the same.

python -m benchmarks.row_store [--quick] [--rows N ...] [--peers NAME ...] [--rounds N]

Every figure is a pair: RowStore and one contestant do the same calls in turns, on one thread (Redis: its
server is a second one); a rate is the median over rounds, `ratio` is ours over theirs. A call has 4,096 ids:
Zipf 1.05 or uniform for `get`, distinct ones that are all held for `upsert`, which for RowStore is a whole
version, prepared and switched to. Before it is timed, each contestant must give back the rows it was given.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import in_turns, median_rate, rounded, say, say_json, say_skipped, say_table
from benchmarks.row_store_peers import PEERS, Keys, Ours, Peer, why_absent
from benchmarks.zipf import zipf_ranks

DIMS = (16, 40)
ROWS, QUICK_ROWS = 1_000_000, 100_000
IDS_PER_CALL = 4_096
CALLS_PER_ROUND = 10

Call = tuple[Keys, npt.NDArray[np.float32]]


class Pairing:
    """RowStore and one contestant, filled with the same rows."""

    def __init__(self, name: str, num_rows: int, dim: int, folder: Path) -> None:
        self.name, self._num_rows, self._dim = name, num_rows, dim
        self._generator = np.random.default_rng(dim)
        keys_N = self._generator.permutation(num_rows)
        rows_ND = self._generator.standard_normal((num_rows, dim), np.float32)
        self._ours: Peer = Ours(folder)
        self._theirs = PEERS[name](folder)
        sample_N = self._generator.integers(0, num_rows, 1_000)
        for who, store in (("row store", self._ours), (name, self._theirs)):
            store.fill(keys_N, rows_ND)
            if not np.array_equal(store.get(keys_N[sample_N]), rows_ND[sample_N]):
                raise RuntimeError(f"{who}: the rows read are not the rows written; nothing is measured")

    def run(self, *, rounds: int, limit_s: float) -> list[dict[str, Any]]:
        rows = []
        for case, stream in (("get", "zipf"), ("get", "uniform"), ("upsert", "distinct")):
            seconds = in_turns(
                {"ours": partial(_act, self._ours, case), "theirs": partial(_act, self._theirs, case)},
                partial(self._calls, stream),
                rounds=rounds,
                limit_s=limit_s,
            )
            rates = {who: median_rate(taken, per_call=self._per_call) for who, taken in seconds.items()}
            rows.append(
                {
                    "case": case,
                    "stream": stream,
                    "dim": self._dim,
                    "table_rows": self._num_rows,
                    "peer": self.name,
                    "ours": rounded(rates["ours"]),
                    "theirs": rounded(rates["theirs"]),
                    "ratio": rounded(rates["ours"] / rates["theirs"]),
                    "rounds": len(seconds["ours"]),
                }
            )
        return rows

    @property
    def _per_call(self) -> int:
        return min(IDS_PER_CALL, self._num_rows)

    def _calls(self, stream: str) -> list[Call]:
        return [(self._keys(stream), self._values()) for _ in range(CALLS_PER_ROUND)]

    def _keys(self, stream: str) -> Keys:
        if stream == "distinct":
            return self._generator.choice(self._num_rows, self._per_call, replace=False, shuffle=False)
        if stream == "zipf":
            return zipf_ranks(self._generator, self._per_call, num_ranks=self._num_rows)
        return self._generator.integers(0, self._num_rows, self._per_call)

    def _values(self) -> npt.NDArray[np.float32]:
        return self._generator.standard_normal((self._per_call, self._dim), np.float32)

    def close(self) -> None:
        self._theirs.close()


def _act(store: Peer, case: str, call: Call) -> None:
    keys_N, rows_ND = call
    if case == "get":
        store.get(keys_N)
    else:
        store.upsert(keys_N, rows_ND)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS:,} rows, short rounds")
    parser.add_argument("--rows", type=int, nargs="+", help=f"rows held (default {ROWS:,})")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument("--rounds", type=int, help="at most so many of each case")
    options = parser.parse_args()
    rounds, limit_s = (5, 0.5) if options.quick else (15, 6.0)
    rounds = options.rounds or rounds
    say(f"M rows a second, {IDS_PER_CALL:,} ids a call; ratio = ours / theirs")
    rows: list[dict[str, Any]] = []
    for name in options.peers:
        absent = why_absent(name)
        if absent:
            say_skipped(name, absent)
            continue
        for num_rows in options.rows or [QUICK_ROWS if options.quick else ROWS]:
            for dim in DIMS:
                with tempfile.TemporaryDirectory() as folder:
                    pairing = Pairing(name, num_rows, dim, Path(folder))
                    try:
                        rows += pairing.run(rounds=rounds, limit_s=limit_s)
                    finally:
                        pairing.close()
    say_table(rows, ("case", "stream", "dim", "table_rows", "peer", "ours", "theirs", "ratio", "rounds"))
    say_json("row_store", rows=rows, facts={"ids_per_call": IDS_PER_CALL, "calls_per_round": CALLS_PER_ROUND})


if __name__ == "__main__":
    main()
