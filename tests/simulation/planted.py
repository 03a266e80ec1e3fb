"""Bugs that are planted on purpose: each is a mistake that a system of this kind has been shipped with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import numpy.typing as npt

from feature_eviction import TableRows
from param_server.receive import ReceivedVersion
from param_server.replica import Plan, Replica
from param_server.rules_config import RulesConfig
from param_server.segment_log import SegmentLog
from tests.simulation.world import Parts
from trainer.publish.changed_rows import ChangedRows, Clocks, Taken

Keys = npt.NDArray[np.int64]


class ClearedOnRead(ChangedRows):
    """Reading what changed also marks it as sent."""

    def take(self, rows_of: Callable[[Keys], TableRows], *, rules: RulesConfig, clocks: Clocks) -> Taken:
        taken = super().take(rows_of, rules=rules, clocks=clocks)
        self._updates_C[:] = 0
        taken.updates_N[:] = 0
        return taken


class ForgottenDeletes(ChangedRows):
    """An evicted row is simply no longer trained."""

    def evict(self, keys_K: Keys, slots_K: Keys) -> None:
        super().evict(keys_K, slots_K)
        for key in keys_K.tolist():
            self._deleted_keys.pop(key, None)
            self._deleted_since_take.pop(key, None)


class SkippedGap(Replica):
    """Whatever comes next is applied to what is live."""

    def apply(self, received: ReceivedVersion, plan: Plan | None = None) -> bool:
        manifest, live = received.manifest, self.store.version
        if manifest.kind == "delta" and live is not None and live < manifest.version:
            manifest = msgspec.structs.replace(manifest, parent=live)
        return super().apply(ReceivedVersion(manifest, received.blobs), plan)


@contextmanager
def ack_before_fsync() -> Iterator[Parts]:
    """An append counts as durable."""
    with mock.patch.object(SegmentLog, "sync"):
        yield Parts()


@contextmanager
def zombie_generation() -> Iterator[Parts]:
    """A writer of an older generation is not turned away."""
    import param_server.version_log as version_log

    def anyone(*arguments: Any, **options: Any) -> None:
        return None

    with mock.patch.object(version_log, "check_generation", anyone):
        yield Parts()


@contextmanager
def _replaced(parts: Parts) -> Iterator[Parts]:
    yield parts


PLANTED: dict[str, Callable[[], Any]] = {
    "ack before fsync": ack_before_fsync,
    "cleared on read": lambda: _replaced(Parts(changed_rows=ClearedOnRead)),
    "skipped gap": lambda: _replaced(Parts(replica=SkippedGap)),
    "delete forgotten": lambda: _replaced(Parts(changed_rows=ForgottenDeletes)),
    "zombie generation": zombie_generation,
}
