"""Carries a plan out on real processes: lives of the trainer, and the events of each on their time."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from tests.chaos import services, state
from tests.chaos.processes import LOOK_S, CampaignError, Process, Zygote
from tests.chaos.ranks import Ranks, run_under_torchrun
from tests.chaos.scenarios import Event, Life, Plan
from tests.chaos.services import ForkedService, Service, SmallDisk
from tests.chaos.stream import Produced, with_room, write_config
from trainer.config import Config
from trainer.publish.program_cache import PROGRAM_FILE

LIFE_TIMEOUT_S = 90.0
TORCHRUN_TIMEOUT_S = 180.0
"""It waits up to 30 s for the ranks that a dead one leaves, and starts with all imports."""


@dataclass(frozen=True)
class Ground:
    """What all scenarios on one broker share."""

    zygote: Zygote
    config: Config
    broker: Service
    produced: Produced


@dataclass
class Outcome:
    """What was done, and what was found wrong."""

    plan: Plan
    fired: list[str] = field(default_factory=list)
    """Failpoints, a name for each firing."""
    num_kills: int = 0
    """SIGKILLs that ended a process, failpoints included."""
    num_stops: int = 0
    num_fills: int = 0
    damages: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Run:
    """One run directory and every process around it; a context manager: at its end no process is left."""

    def __init__(self, plan: Plan, *, ground: Ground, directory: Path, rng: np.random.Generator) -> None:
        self.directory = directory
        self.checkpoints = directory / "checkpoints"
        self.outcome = Outcome(plan)
        self.replicas: dict[str, str] = {}
        """Name → address."""
        self.shard_address = ""
        self._plan, self._ground, self._rng = plan, ground, rng
        self._services: dict[str, Service] = {"broker": ground.broker}
        self._forked: list[ForkedService] = []
        self._disk: SmallDisk | None = None
        self._fired_log = directory / "fired.log"
        self._num_lives = 0
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Run:
        (self.directory / "control").mkdir(parents=True)
        # From the start: every life trains what the topic holds and ends.
        (self.directory / "control" / "drain").touch()
        shutil.copyfile(self._ground.zygote.program, self.directory / PROGRAM_FILE)
        with contextlib.ExitStack() as started:
            if self._plan.small_disk:
                disk = services.small_disk(self.directory / self._plan.small_disk)
                self._disk = started.enter_context(disk)
            started.callback(self._kill_services)
            if self._plan.serving:
                self._start_serving()
            self._config = self._write_config()
            self._cleanup = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _start_serving(self) -> None:
        shard, self.shard_address = services.shard(
            self._ground.zygote, log_dir=self.directory / "log", directory=self.directory
        )
        self._services["shard"] = shard
        self._forked.append(shard)
        shard.start()
        self._services["replica"] = self.start_replica("replica")

    def start_replica(self, name: str) -> ForkedService:
        """One more replica of the run's shard."""
        replica, self.replicas[name] = services.replica(
            self._ground.zygote, name=name, shard_address=self.shard_address, directory=self.directory
        )
        self._forked.append(replica)
        replica.start()
        return replica

    def _kill_services(self) -> None:
        for service in self._forked:
            if service.process is not None and service.process.running():
                service.process.kill()

    def _write_config(self) -> Path:
        config = with_room(self._ground.config) if self._plan.has_room else self._ground.config
        config = replace(
            config,
            kafka=replace(config.kafka, group=self.directory.name),
            serving=replace(config.serving, shard_address=self.shard_address),
        )
        return write_config(self.directory / "config.toml", config)

    def carry_out(self) -> None:
        """All lives, then the last one, which must end well.

        Raises: CampaignError if a process hangs, or ends where nothing was done to it.
        """
        if self._plan.torchrun:
            self._live_under_torchrun(self._plan.lives[0])
            return
        for life in self._plan.lives:
            self._live(life)
        ranks = self._start_ranks(Life(world_size=self._plan.last_world_size))
        self._wait(ranks, Life(), begun_s=time.monotonic())
        if any(process.code != 0 for process in ranks.processes):
            raise CampaignError(f"the last start failed: {ranks.tail()}")

    def _live(self, life: Life) -> None:
        """Start the trainer, do to it what is planned, and see its end."""
        kills_before = self.outcome.num_kills
        names_before = state.names_of_checkpoints(self.checkpoints)
        ranks = self._start_ranks(life)
        self._wait(ranks, life, begun_s=time.monotonic(), names_before=names_before)
        self._count_fired()
        # A rank whose peer was killed ends with an error, as may one whose disk, shard or broker went away.
        was_killed = self.outcome.num_kills > kills_before
        may_fail = (was_killed and life.world_size > 1) or any(one.target != "rank" for one in life.events)
        for process in ranks.processes:
            if not may_fail and process.code not in (0, -signal.SIGKILL):
                raise CampaignError(f"after '{life}': {ranks.tail()}")

    def _start_ranks(self, life: Life) -> Ranks:
        self._num_lives += 1
        return Ranks.start(
            life,
            zygote=self._ground.zygote,
            config=self._config,
            run_dir=self.directory,
            fired_log=self._fired_log,
            name=f"life{self._num_lives}",
        )

    def _wait(
        self, ranks: Ranks, life: Life, *, begun_s: float, names_before: list[str] | None = None
    ) -> None:
        """Until every rank has ended, meeting the events on their time."""
        todo = timeline(life.events)
        while ranks.running():
            now_s = time.monotonic() - begun_s
            while todo and todo[0][0] <= now_s:
                _, begins, event = todo.pop(0)
                self._meet(event, ranks, begins=begins)
            if life.damage and self._damage(ranks, names_before or []):
                return
            if now_s > LIFE_TIMEOUT_S:
                ranks.kill()
                raise CampaignError(f"'{life}': still training after {LIFE_TIMEOUT_S:g} s: {ranks.tail()}")
            self._ground.zygote.look(LOOK_S)
        # The trainer's end may come first; what stands still or is dead or full must not stay so.
        not_begun = [event for _, begins, event in todo if begins]
        for _, begins, event in todo:
            if not begins and event not in not_begun:
                self._meet(event, ranks, begins=False)

    def _meet(self, event: Event, ranks: Ranks, *, begins: bool) -> None:
        """The event begins, or what it did is undone."""
        if event.target == "rank":
            self._meet_rank(event, ranks.processes[event.rank], begins=begins)
        elif event.action == "fill":
            assert self._disk is not None
            (self._disk.fill if begins else self._disk.empty)()
            self.outcome.num_fills += begins
        elif event.action == "kill":
            service = self._services[event.target]
            (service.kill if begins else service.start)()
            self.outcome.num_kills += begins
        else:
            service = self._services[event.target]
            (service.stop if begins else service.go_on)()
            self.outcome.num_stops += begins

    def _meet_rank(self, event: Event, process: Process, *, begins: bool) -> None:
        if not process.running():
            return
        if event.action == "stop":
            process.send(signal.SIGSTOP if begins else signal.SIGCONT)
            self.outcome.num_stops += begins
        elif begins:
            process.kill()
            self.outcome.num_kills += process.code == -signal.SIGKILL

    def _damage(self, ranks: Ranks, names_before: list[str]) -> bool:
        """Once this life has saved a checkpoint and there is one before it: kill, and damage the newest."""
        names = state.names_of_checkpoints(self.checkpoints)
        if len(names) < 2 or names[-1] in names_before:
            return False
        ranks.kill()
        names = state.names_of_checkpoints(self.checkpoints)
        self.outcome.num_kills += 1
        name, how = state.damage_newest(self.checkpoints, self._rng)
        self.outcome.damages.append(f"{name}: {how}")
        found = state.newest_whole(self.checkpoints)
        if found != names[-2]:
            self.outcome.findings.append(f"after {name} was damaged ({how}) '{found}' counts as the newest")
        return True

    def _live_under_torchrun(self, life: Life) -> None:
        code, num_kills = run_under_torchrun(
            life,
            config=self._config,
            run_dir=self.directory,
            log=self.directory / "torchrun.log",
            timeout_s=TORCHRUN_TIMEOUT_S,
        )
        self.outcome.num_kills += num_kills
        if code:
            raise CampaignError(f"torchrun: exit code {code}; log: {self.directory / 'torchrun.log'}")

    def _count_fired(self) -> None:
        """What the failpoint log says; each firing was a SIGKILL."""
        lines = self._fired_log.read_text().split() if self._fired_log.exists() else []
        for line in lines[len(self.outcome.fired) :]:
            self.outcome.fired.append(line.rpartition(":")[0])
            self.outcome.num_kills += 1


def timeline(events: tuple[Event, ...]) -> list[tuple[float, bool, Event]]:
    """(seconds, begins or is undone, event), in order; a killed rank is not undone, the next life is that."""
    moments = [(event.after_s, True, event) for event in events]
    moments += [
        (event.after_s + event.pause_s, False, event)
        for event in events
        if event.target != "rank" or event.action != "kill"
    ]
    return sorted(moments, key=lambda moment: (moment[0], not moment[1]))
