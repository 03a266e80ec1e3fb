"""Prints the synthetic stream beside PEPNet's Table 1: `python -m trainer.data.calibration`.

Shapes: N impressions, D domains, T tasks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.config import Config, preset
from trainer.data import table1
from trainer.data.synthetic import SyntheticStream
from trainer.metrics import auc


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one pass over the stream gives; rates are means of the true probabilities."""

    shares_D: npt.NDArray[np.float64]
    rates_DT: npt.NDArray[np.float64]
    best_auc_DT: npt.NDArray[np.float64]
    """NaN where a domain has no positives or no negatives."""
    user_overlaps: dict[tuple[int, int], float]
    item_overlaps: dict[tuple[int, int], float]
    num_distinct: dict[str, int]
    """Distinct ids that the stream showed, by feature."""


def measure(config: Config) -> Calibration:
    """Read the whole stream; the schema has Table 1's domains and tasks in their order."""
    stream = SyntheticStream(config)
    parts = list(stream.batches(4_096))
    truth_NT = np.concatenate([part_NT for _, part_NT in parts])
    labels_NT = np.concatenate([impressions.labels_NT for impressions, _ in parts])
    domain_N = np.concatenate([impressions.domain_N for impressions, _ in parts])
    num_domains, num_tasks = table1.RATES_DT.shape
    rates_DT = np.full((num_domains, num_tasks), np.nan)
    best_auc_DT = np.full((num_domains, num_tasks), np.nan)
    for domain in np.unique(domain_N):
        row_M = domain_N == domain
        rates_DT[domain] = truth_NT[row_M].mean(axis=0)
        for task in range(num_tasks):
            value = auc(truth_NT[row_M, task], labels_NT[row_M, task])
            best_auc_DT[domain, task] = np.nan if value is None else value
    return Calibration(
        shares_D=np.bincount(domain_N, minlength=num_domains) / len(domain_N),
        rates_DT=rates_DT,
        best_auc_DT=best_auc_DT,
        user_overlaps=_overlaps(stream.users.regions_U),
        item_overlaps=_overlaps(stream.items.regions_I),
        num_distinct={
            name: len(np.unique(np.concatenate([part.sparse[name].ids_L for part, _ in parts])))
            for name in parts[0][0].sparse
        },
    )


def _overlaps(regions: npt.NDArray[np.uint8]) -> dict[tuple[int, int], float]:
    """Of the whole population; a short stream meets only its popular part."""
    overlaps = {}
    for a, b in table1.USER_OVERLAPS:
        in_a = regions >> a & 1 > 0
        overlaps[a, b] = float((regions[in_a] >> b & 1 > 0).mean())
    return overlaps


def report(found: Calibration) -> str:
    """A table: each cell as stream / Table 1."""
    lines = [f"{'':18}" + "".join(f"{name:>22}" for name in table1.DOMAINS)]

    def row(name: str, found_D: npt.NDArray[np.float64], table_D: npt.NDArray[np.float64]) -> None:
        cells = (f"{100 * f:.2f} % / {100 * t:.2f} %" for f, t in zip(found_D, table_D, strict=True))
        lines.append(f"{name:18}" + "".join(f"{cell:>22}" for cell in cells))

    row("instances", found.shares_D, table1.domain_shares())
    for index, task in enumerate(table1.TASKS):
        row(task, found.rates_DT[:, index], table1.RATES_DT[:, index])
    for index, task in enumerate(table1.TASKS):
        cells = "".join(f"{value:>22.3f}" for value in found.best_auc_DT[:, index])
        lines.append(f"{'best AUC ' + task:18}"[:18] + cells)
    for name, overlaps, table in (
        ("users", found.user_overlaps, table1.USER_OVERLAPS),
        ("items", found.item_overlaps, table1.ITEM_OVERLAPS),
    ):
        for (a, b), value in overlaps.items():
            pair = f"{table1.DOMAINS[a]} in {table1.DOMAINS[b]}"
            lines.append(f"{name} of {pair}: {100 * value:.2f} % / {100 * table[a, b]:.2f} %")
    distinct = ", ".join(f"{name} {num}" for name, num in found.num_distinct.items())
    lines.append(f"distinct ids shown: {distinct}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(report(measure(preset("quickstart"))))
