"""What serving has not got yet, as a few numbers: how old it is, and when a version last got through.

They stay a few numbers however long the parameter server is away. Times are unix milliseconds of the
publishing clock.
"""

from __future__ import annotations


class Backlog:
    """The age of the oldest change that no acknowledged version has been taken for."""

    def __init__(self) -> None:
        self._since_ms: int | None = None
        """The first change after the last take."""
        self._taken_since_ms: int | None = None
        """The first change that the version on its way was taken for."""
        self._acked_ms: int | None = None

    @property
    def empty(self) -> bool:
        """Nothing has changed since the last take."""
        return self._since_ms is None

    def changed(self, *, now_ms: int) -> None:
        """A step of training is done."""
        if self._since_ms is None:
            self._since_ms = now_ms

    def take(self) -> None:
        self._taken_since_ms, self._since_ms = self._since_ms, None

    def ack(self, *, now_ms: int) -> None:
        self._taken_since_ms, self._acked_ms = None, now_ms

    def abandon(self) -> None:
        """What the version was to bring is pending as it was before."""
        if self._taken_since_ms is not None:
            self._since_ms, self._taken_since_ms = self._taken_since_ms, None

    def age_ms(self, *, now_ms: int) -> int:
        """0 = nothing has changed since."""
        oldest_ms = self._taken_since_ms if self._taken_since_ms is not None else self._since_ms
        return 0 if oldest_ms is None else max(0, now_ms - oldest_ms)

    def ack_age_s(self, *, now_ms: int) -> float:
        """Since a version last became durable; -1 = none has yet."""
        return -1.0 if self._acked_ms is None else max(0, now_ms - self._acked_ms) / 1000
