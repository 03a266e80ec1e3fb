"""The stages of a run between its first process and its last, without their conclusion."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from param_server.client import ParamServerError, Version
from trainer.config import Config
from trainer.errors import ChildError, DataError
from trainer.run.live_view import View
from trainer.run.observe import Observer, StatusLink, state_of
from trainer.run.plan import RunPlan, with_addresses
from trainer.run.run_directory import RunDirectory
from trainer.run.summary import ReplicaSummary
from trainer.run.supervisor import Supervisor
from trainer.run.verify import Predictor, compare, load_expected

log = logging.getLogger(__name__)


class ReplicaLink(StatusLink, Predictor, Protocol):
    """What the stages need of `param_server.client.ReplicaClient`."""

    def close(self) -> None: ...


Connect = Callable[[str], ReplicaLink]
"""address -> link."""

_LOOK_EVERY_S = 1.0
_TRAINER_START_S = 120.0
_STALL_S = 300.0
_CATCH_UP_S = 60.0


class Stages:
    """start, stream, drain and verify, each to be called once, in this order."""

    def __init__(
        self, config: Config, plan: RunPlan, directory: RunDirectory, *, observer: Observer, view: View
    ) -> None:
        self.replicas: list[ReplicaSummary] = []
        """What verify found, replica by replica."""
        self.time_was_up = False
        """The producer was stopped, as its seconds had passed."""
        self.phase = "starting"
        self._config = config
        self._plan = plan
        self._directory = directory
        self._observer = observer
        self._view = view
        self._links: dict[str, ReplicaLink] = {}
        self._began_s = time.monotonic()
        self._next_look_s = 0.0
        self._progress: tuple[int, int, int] = (0, 0, 0)
        self._progress_s = self._began_s

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def start(self, supervisor: Supervisor, connect: Connect) -> None:
        """Start every process; the producer last, once the trainer trains."""
        supervisor.on_tick(self.look_when_due)
        for spec in self._plan.services:
            self._enter(f"starting {spec.name}")
            self._directory.write_config(with_addresses(self._config, supervisor.facts))
            supervisor.start(spec)
        self._directory.write_config(with_addresses(self._config, supervisor.facts))
        self._enter("starting trainer")
        supervisor.start(self._plan.trainer)
        supervisor.need(self._plan.trainer.name)
        # A trainer that is slow to start may as well find a stream when it comes: no error.
        supervisor.wait_until(self._trainer_trains, timeout_s=_TRAINER_START_S)
        self._enter("starting producer")
        supervisor.start(self._plan.producer)
        # After the last start, as a link brings threads with it.
        for name in self._plan.replicas:
            self._links[name] = connect(str(supervisor.facts[name]["address"]))

    def stream(self, supervisor: Supervisor, *, seconds: float | None) -> None:
        """Until the producer has ended, or for so many seconds."""
        self._enter("training")
        producer = self._plan.producer.name
        if not supervisor.wait_until(lambda: supervisor.has_ended(producer), timeout_s=seconds):
            self._enter("stopping the producer")
            self.time_was_up = True
            supervisor.stop(producer)

    def drain(self, supervisor: Supervisor) -> None:
        """Let the trainer finish what is in the stream."""
        self._enter("draining: training to the end of the stream")
        trainer = self._plan.trainer.name
        supervisor.let_end(trainer)
        self._directory.drain.touch()
        supervisor.wait_until(lambda: supervisor.has_ended(trainer), timeout_s=None)

    def verify(self, supervisor: Supervisor) -> None:
        """Compare every replica with the trainer; what it finds is a check's matter, not an error."""
        self._enter("verifying the replicas")
        self.look()
        expected = load_expected(self._directory.verify)
        supervisor.wait_until(lambda: self._replicas_hold(expected.version), timeout_s=_CATCH_UP_S)
        self.look()
        for name, link in self._links.items():
            state = state_of(link)
            held = str(state.version or "") if state else ""
            try:
                found = compare(link, expected)
            except (DataError, ParamServerError) as error:
                log.error("%s: %s", name, error)
                self.replicas.append(ReplicaSummary(name=name, version=held))
                continue
            self.replicas.append(
                ReplicaSummary(
                    name=name,
                    version=str(found.version),
                    predictions_checked=found.predictions_checked,
                    max_abs_diff=found.max_abs_diff if np.isfinite(found.max_abs_diff) else None,
                )
            )

    def close(self) -> None:
        """Take a last look at the status files, which now say their last, and let go of the replicas."""
        links, self._links = self._links, {}
        self._observer.look(self.elapsed_s, {})
        for link in links.values():
            link.close()

    def look_when_due(self) -> None:
        """The supervisor's tick: one look a second, and the watch for a run that stands still.

        Raises: ChildError if neither trainer nor producer moved for five minutes.
        """
        if time.monotonic() < self._next_look_s:
            return
        self.look()
        self._watch_progress()
        self._next_look_s = time.monotonic() + _LOOK_EVERY_S

    def look(self) -> None:
        observation = self._observer.look(self.elapsed_s, self._links)
        self._view.show(observation, phase=self.phase)

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self._view.phase(phase)

    def _trainer_trains(self) -> bool:
        status = self._observer.latest.trainer
        return status is not None and status.state != "starting"

    def _replicas_hold(self, version: Version) -> bool:
        states = [state_of(link) for link in self._links.values()]
        return all(state is not None and state.version == version for state in states)

    def _watch_progress(self) -> None:
        trainer, producer = self._observer.latest.trainer, self._observer.latest.producer
        progress = (
            trainer.step if trainer else 0,
            producer.impressions_produced if producer else 0,
            len(self._links),
        )
        if progress != self._progress:
            self._progress, self._progress_s = progress, time.monotonic()
        elif time.monotonic() - self._progress_s > _STALL_S:
            raise ChildError(
                f"nothing was trained or produced for {_STALL_S:.0f} s while {self.phase}; "
                f"see the logs in {self._directory.logs}"
            )
