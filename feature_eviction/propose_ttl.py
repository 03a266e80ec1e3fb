"""Lifetimes from a stream: for each class the 99.9th percentile of the gaps between an id's sightings.

A row that lives so long is, for all but one gap in a thousand, still there when its id comes back. Source:
Kraken (SC 2020), "duration based eviction". A gap is measured where it ends: of an id that never comes
back nothing is learned, and no gap is longer than the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from feature_eviction.event_file import Events
from feature_eviction.keys import Int64Array, class_of

QUANTILE = 0.999
GAPS_MAX = 1_000_000
"""Gaps kept of a class; beyond it a seeded sample, each gap with the same chance."""
IDS_MAX = 5_000_000
"""Ids followed; those that appear first are taken."""


class Proposal(NamedTuple):
    """What one class's gaps say."""

    class_id: int
    num_gaps: int
    num_ids: int
    ttl_s: int | None
    """None where no id came twice."""
    share_longer: float
    """Of the gaps kept, those that this lifetime would cut."""


class _Sample:
    """A uniform sample of a stream of numbers (Vitter's reservoir, by pieces)."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._kept = np.empty(0, np.int64)
        self.num_seen = 0

    def add(self, values: Int64Array) -> None:
        room = GAPS_MAX - len(self._kept)
        self._kept = np.append(self._kept, values[:room])
        rest = values[room:] if room < len(values) else values[:0]
        ordinals = self.num_seen + len(values) - len(rest) + np.arange(len(rest))
        places = (self._generator.random(len(rest)) * (ordinals + 1)).astype(np.int64)
        enters = places < GAPS_MAX
        self._kept[places[enters]] = rest[enters]
        self.num_seen += len(values)

    @property
    def kept(self) -> Int64Array:
        return self._kept


def propose_ttls(
    pieces: Iterable[Events], *, num_classes: int, quantile: float = QUANTILE, seed: int = 0
) -> list[Proposal]:
    """One proposal a class. A stream whose time runs back counts those gaps as 0."""
    generator = np.random.default_rng(seed)
    samples = [_Sample(generator) for _ in range(num_classes)]
    last_seen_s: dict[int, int] = {}
    ids = [0] * num_classes
    for piece in pieces:
        gaps: list[list[int]] = [[] for _ in range(num_classes)]
        columns = (piece.keys_N, class_of(piece.keys_N), piece.times_s_N)
        for key, class_id, now_s in zip(*(column.tolist() for column in columns), strict=True):
            last_s = last_seen_s.get(key)
            if last_s is not None:
                gaps[class_id].append(max(0, now_s - last_s))
            elif len(last_seen_s) >= IDS_MAX:
                continue
            else:
                ids[class_id] += 1
            last_seen_s[key] = now_s
        for sample, found in zip(samples, gaps, strict=True):
            sample.add(np.array(found, np.int64))
    return [
        _proposal(class_id, sample, num_ids=ids[class_id], quantile=quantile)
        for class_id, sample in enumerate(samples)
    ]


def _proposal(class_id: int, sample: _Sample, *, num_ids: int, quantile: float) -> Proposal:
    if not len(sample.kept):
        return Proposal(class_id, 0, num_ids, None, 0.0)
    ttl_s = max(1, int(np.quantile(sample.kept, quantile, method="higher")))
    return Proposal(class_id, sample.num_seen, num_ids, ttl_s, float((sample.kept > ttl_s).mean()))
