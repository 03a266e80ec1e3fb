"""How many million ids a second the id table maps, beside a plain Python dict on the same ids.

python benchmarks/id_table.py [--quick]: a table of figures, then the same as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from feature_eviction import ClassPolicy, IdTable, TablePolicy, make_keys

CLASS_ID = 7
START_S = 1_750_000_000
NEW_SHARES = (0.0, 0.05, 0.20)

Batch = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Figure:
    num_slots: int
    what: str
    table_mids_s: float
    """Million ids a second."""
    dict_mids_s: float


def full_table(num_slots: int) -> IdTable:
    """All slots taken by the ids 0 .. num_slots-1, in random order."""
    classes = (ClassPolicy(class_id=CLASS_ID, ttl_s=86_400),)
    table = IdTable(TablePolicy(num_slots=num_slots, classes=classes))
    keys_N, _ = make_keys(np.random.default_rng(0).permutation(num_slots), class_id=CLASS_ID)
    map_batch(table, keys_N, now_s=START_S)
    return table


def map_batch(table: IdTable, keys_N: Batch, *, now_s: int) -> None:
    ones_N = np.ones(len(keys_N), np.int32)
    result = table.map(keys_N, shows_N=ones_N, positives_N=ones_N, now_s=now_s)
    table.release(result.batch)


def batches_of(
    table: IdTable, *, new_share: float, num_batches: int, batch_size: int, generator: np.random.Generator
) -> list[Batch]:
    """Held ids, with a share of ids that no table has seen."""
    held_N = table.rows().keys_N
    batches = []
    for _ in range(num_batches):
        keys_N = generator.choice(held_N, batch_size)
        is_new_N = generator.random(batch_size) < new_share
        fresh_N, _ = make_keys(generator.integers(1 << 40, 1 << 52, int(is_new_N.sum())), class_id=CLASS_ID)
        keys_N[is_new_N] = fresh_N
        batches.append(keys_N)
    return batches


def mids_s(act: Callable[[Batch], object], batches: list[Batch]) -> float:
    start_s = time.perf_counter()
    for keys_N in batches:
        act(keys_N)
    return sum(map(len, batches)) / (time.perf_counter() - start_s) / 1e6


class DictTable:
    """The least a dict can do for the same answer: no score, no budget check, the oldest id leaves."""

    def __init__(self, table: IdTable) -> None:
        rows = table.rows()
        self.slots = dict(zip(rows.keys_N.tolist(), rows.slots_N.tolist(), strict=True))
        self.oldest = deque(self.slots)

    def lookup(self, keys_N: Batch) -> list[int]:
        return [self.slots.get(key, -1) for key in keys_N.tolist()]

    def map(self, keys_N: Batch) -> None:
        slots, oldest = self.slots, self.oldest
        for key in keys_N.tolist():
            if key not in slots:
                slots[key] = slots.pop(oldest.popleft())
                oldest.append(key)


def measure(num_slots: int, *, num_batches: int, batch_size: int) -> list[Figure]:
    generator = np.random.default_rng(num_slots)
    figures = []
    for new_share in NEW_SHARES:
        table = full_table(num_slots)
        plain = DictTable(table)
        batches = batches_of(
            table, new_share=new_share, num_batches=num_batches, batch_size=batch_size, generator=generator
        )
        if new_share == 0.0:
            reads = mids_s(table.lookup, batches)
            dict_reads = mids_s(plain.lookup, batches)
            figures.append(
                Figure(num_slots=num_slots, what="lookup", table_mids_s=reads, dict_mids_s=dict_reads)
            )
        maps = mids_s(partial(map_batch, table, now_s=START_S + 60), batches)
        dict_maps = mids_s(plain.map, batches)
        what = f"map, {new_share:.0%} new" if new_share else "map, all held"
        figures.append(Figure(num_slots=num_slots, what=what, table_mids_s=maps, dict_mids_s=dict_maps))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds: fewer batches")
    quick = parser.parse_args().quick
    num_batches, batch_size = (8 if quick else 60), 20_000
    measure(1_000, num_batches=1, batch_size=1_000)  # compiles the kernels
    figures = []
    for num_slots in (100_000, 1_000_000):
        figures += measure(num_slots, num_batches=num_batches, batch_size=batch_size)
    sys.stdout.write(f"{'slots':>10}  {'what':<16}{'IdTable M ids/s':>17}{'dict M ids/s':>15}\n")
    for one in figures:
        sys.stdout.write(
            f"{one.num_slots:>10,}  {one.what:<16}{one.table_mids_s:>17.2f}{one.dict_mids_s:>15.2f}\n"
        )
    record = {
        "benchmark": "id_table",
        "machine": platform.machine(),
        "batch_size": batch_size,
        "figures": [vars(one) for one in figures],
    }
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
