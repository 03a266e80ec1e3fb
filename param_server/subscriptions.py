"""Who follows a shard or replays its versions, how many they may be, and how far behind each may fall.

A subscription is a cursor into the log. Its queue is the log itself, so nothing is copied for it and a
slow one costs nobody else anything; the bound is a number of versions. One that passes it, after it has
once been at the head, is cut off: it comes again and loads whatever is fewer bytes by then. So is one that
does not take what is sent, a replay included: each occupies one of the server's threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from param_server.errors import LimitError
from param_server.manifest import Manifest, Version
from param_server.version_log import VersionLog
from proto import param_server_pb2

SUBSCRIBERS_MAX = 96
REPLAYS_MAX = 8
"""Each reads a whole chain of versions. A replica that finds no place tries again until there is one."""
BACKLOG_VERSIONS_MAX = 256
UNREAD_S = 600.0
"""One that does not take its next part for so long is cut off. While a replica applies a version it reads
nothing, and the largest versions take minutes."""
STUCK_S = 10.0
"""A subscriber that was cut off and does not even read that is cancelled after so long."""
NAME_CHARS_MAX = 100


@dataclass(slots=True, eq=False)
class Subscription:
    """One replica's place in the log, which it follows or replays; only its own thread moves the cursor."""

    name: str
    cursor: Version | None
    shards: frozenset[int]
    """Whose rows it wants; empty: of all shards."""
    cancel: Callable[[], object]
    """Ends the call from another thread."""
    live: bool = False
    """It has been at the head: from then on its backlog is bounded."""
    cut: str = ""
    """Why it is cut off; empty: it is not."""
    cut_at_s: float | None = field(default=None)
    unread: bool = False
    """A part is on its way to it, or waits to be taken."""
    unread_since_s: float | None = field(default=None)

    def send(self, parts: Iterable[param_server_pb2.VersionPart]) -> Iterator[param_server_pb2.VersionPart]:
        """Pass the parts on, and note whether each is taken. Raises: LimitError if it was cut off."""
        for part in parts:
            self.check()
            self.unread_since_s, self.unread = None, True
            yield part
            self.unread = False

    def check(self) -> None:
        """Raises: LimitError if it was cut off."""
        if self.cut:
            raise LimitError(self.cut)


class Subscriptions:
    """Safe for many threads."""

    def __init__(self, log: VersionLog, *, backlog_versions_max: int = BACKLOG_VERSIONS_MAX) -> None:
        self._log = log
        self._backlog_versions_max = backlog_versions_max
        self._news = threading.Condition()
        self._all: list[Subscription] = []
        self._replays: list[Subscription] = []
        self._stopping = False
        self.num_cut_off = 0

    @property
    def stopping(self) -> bool:
        return self._stopping

    def names(self) -> list[str]:
        with self._news:
            return sorted(one.name for one in self._all)

    def add(
        self, name: str, held: Version | None, *, shards: frozenset[int], cancel: Callable[[], object]
    ) -> Subscription:
        """Raises: LimitError if there are too many."""
        with self._news:
            if len(self._all) >= SUBSCRIBERS_MAX:
                raise LimitError(f"at most {SUBSCRIBERS_MAX} replicas can subscribe to one shard")
            self._all.append(Subscription(name[:NAME_CHARS_MAX], held, shards, cancel))
            return self._all[-1]

    def add_replay(self, name: str, *, cancel: Callable[[], object]) -> Subscription:
        """A replay ends by itself: nothing is announced to it, and it may be any number of versions behind.

        Raises: LimitError if there are too many.
        """
        with self._news:
            if len(self._replays) >= REPLAYS_MAX:
                raise LimitError(f"at most {REPLAYS_MAX} replicas can replay versions at once: try again")
            self._replays.append(Subscription(name[:NAME_CHARS_MAX], None, frozenset(), cancel))
            return self._replays[-1]

    def remove(self, one: Subscription) -> None:
        with self._news:
            (self._replays if one in self._replays else self._all).remove(one)

    def take(self, one: Subscription, *, timeout_s: float) -> list[Manifest]:
        """What a subscriber must load next, in order; empty after the time is up or at the end.

        Raises: LimitError if it was cut off.
        """
        with self._news:
            one.check()
            plan = self._log.plan_after(one.cursor)
            if not plan and not self._stopping:
                one.live = True
                self._news.wait(timeout=timeout_s)
                plan = self._log.plan_after(one.cursor)
            return plan

    def announce(self) -> None:
        """A version came: wake those who wait, cut off those who are too far behind."""
        with self._news:
            for one in self._all:
                if one.live and not one.cut:
                    behind = self._log.num_after(one.cursor)
                    if behind > self._backlog_versions_max:
                        self.num_cut_off += 1
                        one.cut = (
                            f"replica '{one.name}' is {behind} versions behind, "
                            f"{self._backlog_versions_max} are allowed: it is cut off. Subscribe again: "
                            "the newest full version or snapshot comes first where that is fewer bytes."
                        )
            self._news.notify_all()

    def cancel_stuck(self, *, now_s: float) -> None:
        """Cut off those who do not take what is sent; end the calls of those who were and still do not."""
        with self._news:
            for one in (*self._all, *self._replays):
                if one.unread and not one.cut:
                    self._cut_unread(one, now_s=now_s)
                if one.cut and one.cut_at_s is None:
                    one.cut_at_s = now_s
                elif one.cut_at_s is not None and now_s - one.cut_at_s > STUCK_S:
                    one.cancel()

    def _cut_unread(self, one: Subscription, *, now_s: float) -> None:
        since_s = one.unread_since_s
        if since_s is None:
            one.unread_since_s = now_s
        elif now_s - since_s > UNREAD_S:
            self.num_cut_off += 1
            one.cut = f"replica '{one.name}' took nothing for {UNREAD_S:g} s: it is cut off. Ask again."

    def stop(self) -> None:
        """Let every `take` return."""
        with self._news:
            self._stopping = True
            self._news.notify_all()
