"""How long an impression takes from entering the stream to being visible in a replica's answers.

A version's trace says when its impressions were produced; a replica says when each version became
visible. An impression is visible at a replica from the first applied version that is the trace's own
or a later one (a replica that loads a full version has the ones before it too).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import accumulate

from param_server.client import Version
from trainer.run.status import VersionTrace

_EXACT_BITS = 14
_PENDING_MAX = 20_000
_RECENT_BATCHES = 20


class Histogram:
    """Weighted whole milliseconds: exact below 16384 ms, within 1/8192 above, and so of bounded size."""

    def __init__(self) -> None:
        self._weights: Counter[int] = Counter()

    def add(self, value_ms: int, weight: int) -> None:
        spare_bits = max(0, value_ms.bit_length() - _EXACT_BITS)
        self._weights[(value_ms >> spare_bits) << spare_bits] += weight

    def merge(self, other: Histogram) -> None:
        self._weights.update(other._weights)

    @property
    def total(self) -> int:
        return self._weights.total()

    def quantile(self, share: float) -> int | None:
        """The smallest value that at least `share` of the weight does not exceed; None when empty."""
        values = sorted(self._weights)
        reached = list(accumulate(self._weights[value] for value in values))
        return values[bisect_left(reached, share * reached[-1])] if reached else None

    def shares(self) -> list[tuple[int, float]]:
        """(value, share of the weight at or below it), ascending."""
        values = sorted(self._weights)
        reached = accumulate(self._weights[value] for value in values)
        total = self.total
        return [(value, part / total) for value, part in zip(values, reached, strict=True)]


class FreshnessJoin:
    """Joins traces with what the replicas have applied, as both grow. Memory is bounded."""

    def __init__(self, replicas: Sequence[str], *, steady_from_ms: int) -> None:
        """Args: steady_from_ms: impressions produced from then on count as the steady state."""
        self.overall = Histogram()
        self.steady = Histogram()
        self.steady_from_ms = steady_from_ms
        self.num_unmatched = 0
        """Traces that were given up: too many waiting, or applied before the replica's memory begins."""
        self._pending: dict[str, deque[VersionTrace]] = {name: deque() for name in replicas}
        self._recent: deque[Histogram] = deque(maxlen=_RECENT_BATCHES)

    def add_traces(self, traces: Iterable[VersionTrace]) -> None:
        """In the order in which they were committed."""
        for trace in traces:
            for pending in self._pending.values():
                pending.append(trace)
                if len(pending) > _PENDING_MAX:
                    pending.popleft()
                    self.num_unmatched += 1

    def add_applied(
        self, replica: str, applied: Sequence[tuple[Version, int]], *, is_truncated: bool = False
    ) -> None:
        """Match what a replica says it has applied.

        Args: applied: (version, unix ms at which it became visible), oldest first.
              is_truncated: the replica has forgotten older ones, so the first says nothing about them.
        """
        pending, batch = self._pending[replica], Histogram()
        versions = [version for version, _ in applied]
        while pending:
            wanted = Version(pending[0].generation, pending[0].sequence)
            index = bisect_left(versions, wanted)
            if index == len(versions):
                break
            trace = pending.popleft()
            if index == 0 and is_truncated and versions[0] != wanted:
                self.num_unmatched += 1
                continue
            self._add(trace, visible_ms=applied[index][1], batch=batch)
        self.overall.merge(batch)
        if batch.total:
            self._recent.append(batch)

    def recent(self) -> Histogram:
        """The last few batches of matches: what a live display shows."""
        merged = Histogram()
        for batch in self._recent:
            merged.merge(batch)
        return merged

    def _add(self, trace: VersionTrace, *, visible_ms: int, batch: Histogram) -> None:
        for produced_ms, weight in trace.produced_ms:
            # The clocks of another machine's broker may run ahead; below zero means nothing.
            late_ms = max(0, visible_ms - produced_ms)
            batch.add(late_ms, weight)
            if produced_ms >= self.steady_from_ms:
                self.steady.add(late_ms, weight)
