"""What a campaign says: a line a scenario, tables at the end, and one JSON object as the last line."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tests.chaos.runner import Outcome
from trainer.failpoints import FAILPOINTS


def say(text: str) -> None:
    """One line now, also where stdout is a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass
class Report:
    """Sums over the scenarios so far."""

    seed: int
    kills_wanted: int
    directory: Path
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count it and say its line; findings follow, with what replays them."""
        self.outcomes.append(outcome)
        plan = outcome.plan
        sizes = {life.world_size for life in plan.lives} | {plan.last_world_size}
        ranks = "/".join(map(str, sorted(sizes)))
        verdict = "ok" if not outcome.findings else "DIFFERS"
        lives = ", ".join([*map(str, plan.lives), *outcome.damages])
        say(
            f"[{self.num_kills:4d}/{self.kills_wanted}] {plan.name[:22]:22s} ranks {ranks}  "
            f"{verdict:8s}{outcome.seconds:6.1f} s  {lives}"
        )
        for finding in outcome.findings:
            say(f"      {finding}")
        if outcome.findings:
            say(f"      replay: python -m tests.chaos --seed {self.seed} --scenario '{plan.name}' --keep DIR")

    @property
    def num_kills(self) -> int:
        return sum(outcome.num_kills for outcome in self.outcomes)

    def fired(self) -> Counter[str]:
        """Failpoint → times fired; every name there is has an entry."""
        fired = Counter(dict.fromkeys(FAILPOINTS, 0))
        for outcome in self.outcomes:
            fired.update(outcome.fired)
        return fired

    def never_fired(self) -> list[str]:
        return [name for name, num in self.fired().items() if num == 0]

    def failures(self) -> list[str]:
        """Names of the scenarios that found something."""
        return [outcome.plan.name for outcome in self.outcomes if outcome.findings]

    def finish(self, *, seconds: float, needs_all_failpoints: bool) -> bool:
        """Say the tables and the last line; returns whether all was well."""
        say("\nfailpoint                         times fired")
        for name, num in self.fired().items():
            say(f"{name:34s}{num:11d}{'' if num else '   NEVER'}")
        say("\nfamily                scenarios   kills   stops   full disks   damaged   seconds")
        for family, outcomes in self._by_family().items():
            say(
                f"{family:22s}{len(outcomes):9d}{sum(one.num_kills for one in outcomes):8d}"
                f"{sum(one.num_stops for one in outcomes):8d}{sum(one.num_fills for one in outcomes):13d}"
                f"{sum(len(one.damages) for one in outcomes):10d}{sum(one.seconds for one in outcomes):10.1f}"
            )
        missing = self.never_fired() if needs_all_failpoints else []
        for name in missing:
            say(f"failpoint '{name}' never fired: nothing is proven about it")
        ok = not self.failures() and not missing
        say("")
        say(self._json(ok=ok, seconds=seconds))
        return ok

    def _by_family(self) -> dict[str, list[Outcome]]:
        families: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            families.setdefault(re.split("[#:]", outcome.plan.name)[0], []).append(outcome)
        return families

    def _json(self, *, ok: bool, seconds: float) -> str:
        last: dict[str, Any] = {
            "ok": ok,
            "seed": self.seed,
            "kills": self.num_kills,
            "stops": sum(one.num_stops for one in self.outcomes),
            "full_disks": sum(one.num_fills for one in self.outcomes),
            "damaged_checkpoints": sum(len(one.damages) for one in self.outcomes),
            "scenarios": len(self.outcomes),
            "failures": self.failures(),
            "failpoints": dict(self.fired()),
            "seconds": round(seconds, 1),
        }
        return msgspec.json.encode(last).decode()
