"""A campaign: scenario after scenario until enough was killed, each judged against an unbroken run."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from tests.chaos import scenarios, services
from tests.chaos.processes import CampaignError, Zygote
from tests.chaos.report import Report, say
from tests.chaos.runner import Ground, Outcome, Run
from tests.chaos.scenarios import Plan
from tests.chaos.services import RealBroker
from tests.chaos.state import State, read_newest
from tests.chaos.stream import NUM_IMPRESSIONS, make_config, produced, write_config
from tests.chaos.verdict import judge

SLOW_FROM_KILLS = 20
"""A smaller campaign leaves out what is slow to start: torchrun's own workers, and the real broker."""
COVER_MAX = 12
"""Scenarios added at the end for failpoints that have not fired by then."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line decides."""

    kills: int
    seed: int
    directory: Path
    keep: bool
    """Leave the run directories of scenarios that were well; those of others always stay."""
    scenario: tuple[str, ...] = ()
    """Only these."""
    kafka_everywhere: bool = False


class Campaign:
    """Owns the zygote, the brokers with the stream in them, and the unbroken runs."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.report = Report(options.seed, options.kills, options.directory)
        self._cleanup = ExitStack()
        self._grounds: dict[bool, Ground] = {}
        self._references: dict[Plan, State] = {}
        self._kafka_home = os.environ.get("KAFKA_HOME", "")

    def run(self) -> bool:
        """Returns: whether everything held.

        Raises: CampaignError if the ground does not hold: no broker, no unbroken run.
        """
        started_s = time.monotonic()
        with self._cleanup:
            self._zygote = self._start_zygote()
            for plan in self._plans():
                self.report.add(self._carry_out(plan))
        return self.report.finish(
            seconds=time.monotonic() - started_s, needs_all_failpoints=not self._options.scenario
        )

    def _plans(self) -> Iterator[Plan]:
        """In their order; what comes next depends on what was killed so far."""
        seed, kills = self._options.seed, self._options.kills
        if self._options.scenario:
            for name in self._options.scenario:
                yield scenarios.replay(name, seed=seed)
            return
        number = 0
        while self.report.num_kills < kills:
            plan = scenarios.draw(seed, number)
            number += 1
            if not plan.small_disk or services.can_mount():
                yield plan
        for _ in range(COVER_MAX):
            if names := self.report.never_fired():
                yield scenarios.cover(names)
        if kills >= SLOW_FROM_KILLS:
            if self._kafka_home:
                yield scenarios.replay("kafka#0", seed=seed)
            yield scenarios.replay("torchrun#0", seed=seed)

    def _start_zygote(self) -> Zygote:
        directory = self._options.directory
        config = write_config(directory / "config.toml", make_config(self._options.seed))
        program = directory / "program.cache"
        zygote = self._cleanup.enter_context(Zygote(config, program, directory / "zygote.log"))
        exported = zygote.start(
            "program", "program", [str(config), str(program)], log=directory / "program.log"
        )
        if exported.wait(120.0):
            raise CampaignError(f"the dense model's program was not exported:\n{exported.tail()}")
        return zygote

    def _ground(self, *, kafka: bool) -> Ground:
        """The broker of that kind with the stream in its topic; made when first asked for."""
        if kafka in self._grounds:
            return self._grounds[kafka]
        directory = self._options.directory / ("kafka" if kafka else "embedded")
        directory.mkdir()
        config = make_config(self._options.seed)
        config_path = write_config(directory / "broker.toml", config)
        broker: services.Service
        if kafka:
            if not self._kafka_home:
                raise CampaignError("a real broker is needed: set KAFKA_HOME to a Kafka distribution")
            broker = RealBroker.create(Path(self._kafka_home), directory / "data")
            broker.start()
            self._cleanup.callback(broker.kill)
            address = broker.broker.bootstrap_servers
        else:
            broker = services.embedded_broker(self._zygote, config=config_path, directory=directory)
            broker.start()
            address = str(broker.facts()["bootstrap_servers"])
        config = replace(config, kafka=replace(config.kafka, bootstrap_servers=address))
        config_path = write_config(directory / "config.toml", config)
        argv = ["produce", "--config", str(config_path), "--run-dir", str(directory / "producer")]
        argv += ["--impressions", str(NUM_IMPRESSIONS)]
        producer = self._zygote.start("producer", "trainer", argv, log=directory / "producer.log")
        if producer.wait(120.0):
            raise CampaignError(f"the stream was not produced:\n{producer.tail()}")
        ground = Ground(self._zygote, config, broker, produced(config))
        self._grounds[kafka] = ground
        return ground

    def _reference(self, plan: Plan, *, kafka: bool) -> State:
        """The final state of a run like the plan's to which nothing happened; made when first asked for."""
        parts = ["unbroken", "kafka" if kafka else "embedded", str(plan.last_world_size)]
        name = "-".join([*parts, *(["roomy"] if plan.has_room else [])])
        unbroken = Plan(
            name=name, lives=(), last_world_size=plan.last_world_size, has_room=plan.has_room, kafka=kafka
        )
        if unbroken not in self._references:
            rng = np.random.default_rng(0)
            started_s = time.monotonic()
            directory = self._options.directory / name
            with Run(unbroken, ground=self._ground(kafka=kafka), directory=directory, rng=rng) as run:
                run.carry_out()
                self._references[unbroken] = read_newest(run.checkpoints)
            say(f"{name}: {time.monotonic() - started_s:.1f} s")
        return self._references[unbroken]

    def _carry_out(self, plan: Plan) -> Outcome:
        kafka = plan.kafka or self._options.kafka_everywhere
        ground = self._ground(kafka=kafka)
        reference = self._reference(plan, kafka=kafka)
        directory = self._options.directory / plan.name.replace("#", "-").replace(":", "-")[:80]
        rng = np.random.default_rng([self._options.seed, sum(plan.name.encode())])
        started_s = time.monotonic()
        run = Run(plan, ground=ground, directory=directory, rng=rng)
        try:
            with run:
                run.carry_out()
                run.outcome.findings += judge(run, ground=ground, reference=reference)
        except CampaignError as error:
            run.outcome.findings.append(str(error))
        run.outcome.seconds = time.monotonic() - started_s
        if not run.outcome.findings and not self._options.keep:
            shutil.rmtree(directory)
        return run.outcome
