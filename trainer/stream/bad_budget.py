"""How much of the stream may be bad before training stops rather than learn from what is left.

A stream that is suddenly bad in part is no longer the stream that the model learns: what remains of it is
chosen by the fault. So the share of refused impressions among the newest is bounded: of those that cannot be
read (kafka.bad_share_max, of kafka.bad_window), and of those in batches that were skipped
(trainer/skipped.py).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config.config import KafkaConfig
from trainer.errors import FreshetError, StreamError

REASONS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How much may be bad, and what is said where it is more."""

    share_max: float
    window: int
    option: str
    """The option's name that sets share_max."""
    where: str
    advice: str
    error: type[FreshetError]


def allowance_of_stream(kafka: KafkaConfig) -> Allowance:
    """For impressions that cannot be read."""
    return Allowance(
        share_max=kafka.bad_share_max,
        window=kafka.bad_window,
        option="kafka.bad_share_max",
        where=f"topic '{kafka.topic}'",
        advice="Training stops rather than learn from what is left; the refused records are in "
        f"'{kafka.dead_letter_topic}'. Mend the producer, or the schema where the records are right. "
        "The bad records stay in the log: to train past them, start once with a higher "
        "kafka.bad_share_max (1 = never stop)",
        error=StreamError,
    )


class BadBudget:
    """Counts as records are decoded, on each rank for its own partitions; or as batches are trained.

    A record that does not tell how many impressions it holds counts as many as the newest that did (1 before
    there was one): otherwise the larger records are, the less their loss would weigh.
    """

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._records: deque[tuple[int, Mapping[str, int]]] = deque()
        """(impressions, bad ones by reason) of the newest records; together at least the window."""
        self._num = 0
        self._bad: Counter[str] = Counter()
        self._origins: dict[str, str] = {}
        """Reason → where it was met last; as many as the schema has reasons."""
        self._num_usual = 1

    def add(self, num: int | None, bad: Mapping[str, int], *, origin: str) -> None:
        """Count one record, or one batch.

        Args: num: its impressions, good and bad; None where it does not tell. bad: the bad ones by reason;
        one of them stands for all where num is None. origin: topic/partition/kafka_offset, or the batch.
        """
        if num is None:
            bad = dict.fromkeys(bad, self._num_usual)
        else:
            self._num_usual = num
        self._records.append((self._num_usual, bad))
        self._num += self._num_usual
        self._bad.update(bad)
        self._origins.update(dict.fromkeys(bad, origin))
        while self._num - self._records[0][0] >= self._allowance.window:
            num_old, bad_old = self._records.popleft()
            self._num -= num_old
            self._bad.subtract(bad_old)

    def check(self) -> None:
        """What was not seen yet counts as good, so a window begins to judge with its first record.

        Raises: the allowance's error if more than share_max of the newest `window` are bad.
        """
        allowance = self._allowance
        num_newest = max(self._num, allowance.window)
        num_bad = self._bad.total()
        if num_bad <= allowance.share_max * num_newest:
            return
        reasons = ", ".join(
            f"{reason} {num} (the last at {self._origins[reason]})"
            for reason, num in self._bad.most_common(REASONS_SHOWN)
        )
        raise allowance.error(
            f"{allowance.where}: {num_bad} of the newest {num_newest} impressions cannot be trained "
            f"({num_bad / num_newest:.1%}; {allowance.option} allows {allowance.share_max:.1%}). Most "
            f"often: {reasons}. {allowance.advice}"
        )
