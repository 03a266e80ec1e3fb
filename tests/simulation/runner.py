"""Runs seeds and says what came of each; the logs of the parts are switched off meanwhile."""

from __future__ import annotations

import hashlib
import logging
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from tests.simulation.kernel import ViolationError
from tests.simulation.world import Parts, World


@dataclass(frozen=True, slots=True)
class Outcome:
    """violation: "" if every promise was kept."""

    seed: int
    violation: str
    digest: str
    """Of everything that happened."""
    recent: tuple[str, ...]
    counts: dict[str, int]

    def report(self) -> str:
        """The last events, what broke, and how to see it again."""
        events = "\n".join(self.recent)
        replay = f"python -m tests.simulation --seeds 1 --first-seed {self.seed}"
        return f"{events}\n\nseed {self.seed}: {self.violation}\nreplay: {replay}"


@dataclass(slots=True)
class Totals:
    """Over many seeds."""

    num_seeds: int = 0
    num_broken: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()[:16]

    def add(self, outcome: Outcome) -> None:
        self.num_seeds += 1
        self.num_broken += bool(outcome.violation)
        self.counts.update(outcome.counts)
        self._digest.update(outcome.digest.encode())


def simulate(seed: int, parts: Parts | None = None) -> Outcome:
    """Run one seed. An error that nobody expected is a violation, too."""
    world = World(seed, parts if parts is not None else Parts())
    violation = ""
    with _quiet_logs():
        try:
            world.run()
        except ViolationError as error:
            violation = str(error)
        except Exception as error:  # noqa: BLE001 - whatever escapes from a part ends its process in real life
            violation = f"an error that nobody expected: {error!r}\n{traceback.format_exc()}"
    return Outcome(seed, violation, world.kernel.digest, tuple(world.kernel.recent), world.counts())


def simulate_many(first_seed: int, num_seeds: int, parts: Parts | None = None) -> Iterator[Outcome]:
    for seed in range(first_seed, first_seed + num_seeds):
        yield simulate(seed, parts)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)
