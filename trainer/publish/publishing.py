"""When a run publishes: what is due, the gate's word before it, and the last version at the end.

The loop calls it at the same steps on every rank; what is told here is decided by values that are the same
on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from param_server.client import Version
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.metrics import QualityWindow
from trainer.publish.publisher import Phase, Publisher
from trainer.publish.quality_gate import QualityGate, joint_auc
from trainer.stream.columns import Position

NOT_PUBLISHED = (
    "the last version could not be published, so serving does not hold all that was trained. "
    "Nothing is lost: the state is saved, and the next start publishes it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The place in the stream that a version is taken at."""

    now_ms: int
    watermark_ms: int
    positions: list[Position]


def quality_gate(config: Config) -> QualityGate | None:
    """None: no gate is configured."""
    publish = config.publish
    if not publish.gate_auc_drop_max:
        return None
    return QualityGate(auc_drop_max=publish.gate_auc_drop_max, versions_max=publish.gate_window)


class Publishing:
    """One a rank: drives the publisher and keeps the gate's memory."""

    def __init__(
        self,
        publisher: Publisher,
        *,
        config: Config,
        window: QualityWindow,
        gate: QualityGate | None,
        ranks: Ranks,
    ) -> None:
        self.publisher = publisher
        self._config = config
        self._window = window
        self._gate = gate
        self._ranks = ranks
        self._begun_s: float | None = None
        """When a version was last begun or held, on the monotonic clock; only rank 0's is asked."""
        self._auc: float | None = None
        """Of the version on its way."""
        self._rolled_back = False
        """Serving was given the last good version again, in the hold that lasts."""

    @property
    def idle(self) -> bool:
        return self.publisher.phase is Phase.IDLE

    def due(self, *, now_s: float) -> bool:
        publish = self._config.publish
        interval_ms = publish.interval_ms
        if not self.publisher.has_news:
            # Versions of nothing would push those out of the log that one may want to go back to.
            interval_ms = max(interval_ms, publish.idle_interval_ms)
        interval_s = interval_ms / 1000
        return self.idle and (self._begun_s is None or now_s - self._begun_s >= interval_s)

    def trained(self, produced_ms_N: npt.NDArray[np.int64], *, now_ms: int) -> None:
        """A step is done. Args: produced_ms_N: when its impressions entered the stream."""
        self.publisher.produced.add(produced_ms_N)
        self.publisher.backlog.changed(now_ms=now_ms)

    def begin(self, moment: Moment, *, full: bool, now_s: float) -> None:
        """Begin the version that is due, unless the gate holds it. Collective."""
        self._begun_s = now_s
        publisher, gate = self.publisher, self._gate
        if gate is not None:
            publish = self._config.publish
            self._auc = joint_auc(
                self._window,
                task=publish.gate_task or self._config.schema.positive_task,
                num_min=publish.gate_impressions_min,
                ranks=self._ranks,
            )
            if because := gate.held_because(self._auc):
                publisher.hold(because, roll_back_to=self._roll_back_to(gate))
                return
            publisher.release()
            self._rolled_back = False
        publisher.begin(
            full=full, now_ms=moment.now_ms, watermark_ms=moment.watermark_ms, positions=moment.positions
        )

    def _roll_back_to(self, gate: QualityGate) -> Version | None:
        """Once in each hold: what serving is to get again, where it does not have it already."""
        if not self._config.publish.auto_rollback or self._rolled_back:
            return None
        self._rolled_back = True
        return gate.last_good()

    def advance(self, *, all_done: bool, any_failed: bool, now_ms: int) -> None:
        """Move the version on its way to its next phase if every rank can. Collective."""
        if self.publisher.phase is Phase.ROLLING_BACK and all_done and any_failed:
            self._rolled_back = False  # it is tried again when the next version is due
        self._note(self.publisher.advance(all_done=all_done, any_failed=any_failed, now_ms=now_ms))

    def _note(self, durable: Version | None) -> None:
        if durable is not None and self._gate is not None:
            self._gate.note_published(durable, self._auc)

    def publish_everything(self, moment: Moment, *, now_ms: Callable[[], int]) -> str:
        """The version on its way, then a last full one; a server that fails one is not asked again.

        Collective. Returns: what to tell the operator if the last version was not published, else "".
        """
        publisher = self.publisher
        failed_before = publisher.totals.failed
        self._finish(now_ms)
        # The second attempt only where the first was the way back into a new generation.
        for _ in range(2):
            if publisher.totals.failed > failed_before:
                return NOT_PUBLISHED
            reopening = publisher.must_reopen
            self.begin(moment, full=True, now_s=0.0)
            self._finish(now_ms)
            if publisher.held_because:
                return (
                    f"the quality gate held the last version: {publisher.held_because}. Nothing is lost: the "
                    "state is saved. Start again to train on, or with publish.gate_auc_drop_max = 0 to "
                    "publish it"
                )
            if not reopening:
                break
        return NOT_PUBLISHED if publisher.totals.failed > failed_before else ""

    def _finish(self, now_ms: Callable[[], int]) -> None:
        self._note(self.publisher.finish(self._flags, now_ms=now_ms))

    def _flags(self) -> tuple[bool, bool]:
        publisher = self.publisher
        sums = self._ranks.sum(np.array([not publisher.job_done, publisher.job_failed], np.int64))
        return sums[0] == 0, sums[1] > 0
