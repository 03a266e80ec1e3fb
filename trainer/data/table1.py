"""The figures of PEPNet's Table 1 (arXiv 2302.01115) that the synthetic stream imitates.

D domains in the order of DOMAINS, T tasks in the order of TASKS. Users and items are in thousands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DOMAINS = ("discovery", "featured_video", "slide")
TASKS = ("like", "follow", "forward", "hate", "click", "effective_view")

USERS_K = (76.0, 110.0, 88.0)
ITEMS_K = (9_474.0, 5_205.0, 5_588.0)
INSTANCES_K = (48_037.0, 68_348.0, 78_197.0)

RATES_DT = np.array(
    [
        [0.0368, 0.0048, 0.0021, 0.0020, 0.1466, 0.4557],
        [0.0291, 0.0033, 0.0021, 0.0006, 0.5838, 0.4458],
        [0.0282, 0.0035, 0.0028, 0.0008, 0.5733, 0.4848],
    ]
)

USER_OVERLAPS = {
    (0, 1): 0.9211,
    (0, 2): 0.0789,
    (1, 0): 0.6364,
    (1, 2): 0.0727,
    (2, 0): 0.0682,
    (2, 1): 0.0909,
}
"""(row domain, other domain) → share of the row's users that the other domain has too."""
ITEM_OVERLAPS = {
    (0, 1): 0.2117,
    (0, 2): 0.2257,
    (1, 0): 0.3854,
    (1, 2): 0.4343,
    (2, 0): 0.3826,
    (2, 1): 0.4046,
}


def domain_shares() -> npt.NDArray[np.float64]:
    """Share of the instances that each domain has: float64 [D], sum 1."""
    instances_D = np.array(INSTANCES_K)
    shares_D: npt.NDArray[np.float64] = instances_D / instances_D.sum()
    return shares_D


@dataclass(frozen=True, slots=True)
class Regions:
    """How many entities belong to each combination of domains; the index is a bit mask of domains."""

    counts: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        return int(self.counts.sum())


def regions(sizes_k: tuple[float, ...], overlaps: dict[tuple[int, int], float], *, scale: float) -> Regions:
    """Cut three overlapping sets into their seven disjoint regions.

    The table gives both directions of each overlap (they agree within rounding, so their mean is
    taken) but not how many are in all three; that is half of what the pairs allow.
    Args: scale: share of the table's populations; each region keeps at least one entity.
    """
    both = {
        (a, b): (overlaps[a, b] * sizes_k[a] + overlaps[b, a] * sizes_k[b]) / 2
        for a, b in ((0, 1), (0, 2), (1, 2))
    }
    triple_least = max(
        0.0,
        both[0, 1] + both[0, 2] - sizes_k[0],
        both[0, 1] + both[1, 2] - sizes_k[1],
        both[0, 2] + both[1, 2] - sizes_k[2],
    )
    triple = (triple_least + min(both.values())) / 2
    thousands = np.zeros(8)
    thousands[0b111] = triple
    for (a, b), size in both.items():
        thousands[1 << a | 1 << b] = size - triple
    for domain, size in enumerate(sizes_k):
        shared = sum(value for pair, value in both.items() if domain in pair)
        thousands[1 << domain] = size - shared + triple
    counts = np.maximum(1, np.rint(thousands * 1000 * scale)).astype(np.int64)
    counts[0] = 0
    return Regions(counts)
