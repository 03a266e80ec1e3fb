"""What happens to a run, as data drawn from a seed: lives of the trainer, and the events of each.

A plan is a pure function of (seed, number), so that one scenario can be replayed alone. Failpoints come from
trainer.failpoints.FAILPOINTS, in turn; nothing here knows their names but for two rules: a name with a dot
belongs to something slower than the step, and one that begins with "publish" needs a shard to publish to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.failpoints import FAILPOINTS

Target = Literal["rank", "shard", "replica", "broker", "checkpoints", "log"]
Action = Literal["kill", "stop", "fill"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that is done to a process or a disk while the trainer runs."""

    after_s: float
    """Since the trainer was started."""
    target: Target
    action: Action
    """kill: SIGKILL; services come back after pause_s. stop: SIGSTOP, SIGCONT after pause_s. fill: the disk
    of the target is full for pause_s."""
    pause_s: float = 0.0
    rank: int = 0

    def __str__(self) -> str:
        who = f"rank{self.rank}" if self.target == "rank" else self.target
        return f"{self.action}-{who}@{self.after_s:.1f}s"


@dataclass(frozen=True, kw_only=True)
class Life:
    """One start of the trainer and what happens to it."""

    world_size: int = 1
    failpoint: str = ""
    hit: int = 0
    rank: int = 0
    events: tuple[Event, ...] = ()
    damage: bool = False
    """Once two checkpoints are there the trainer is killed and the newest one damaged."""

    def __str__(self) -> str:
        parts = [f"{self.failpoint}:{self.hit}"] if self.failpoint else []
        parts += ["damage"] if self.damage else []
        return "+".join([*parts, *map(str, self.events)]) or "nothing"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run: its lives one after the other, then a last one to which nothing happens."""

    name: str
    """family#number: what --scenario takes."""
    lives: tuple[Life, ...]
    last_world_size: int = 1
    serving: bool = False
    kafka: bool = False
    """On a real broker, which keeps its data when it is killed."""
    small_disk: Literal["", "checkpoints", "log"] = ""
    """Which directory lies on a disk of its own."""
    has_room: bool = False
    """No row has to leave its table."""
    torchrun: bool = False
    """torchrun starts the ranks anew; the events of the first life are met while it does."""

    @property
    def changes_world_size(self) -> bool:
        return any(life.world_size != self.last_world_size for life in self.lives)


CYCLE = (
    "failpoints",
    "failpoints-serving",
    "kills",
    "failpoints-ranks",
    "services",
    "damage",
    "failpoints-serving",
    "disk-full",
    "failpoints",
    "world-size",
    "stops",
    "log-full",
)
"""Families in the order in which a campaign goes through them, again and again."""

COVER = "cover:"
"""Begins the name of a plan that is made for failpoints which no other has met."""
LIVES = 6
LIVES_RANKS = 4
"""Two ranks on two cores start and train at a third of the speed."""
STEP_HITS_MAX = 150
"""Later than the first checkpoint, earlier than the end of the stream."""
RARE_HITS_MAX = 3


def draw(seed: int, number: int) -> Plan:
    """Scenario `number` of a campaign."""
    family = CYCLE[number % len(CYCLE)]
    round_number = number // len(CYCLE)
    ordinal = round_number * CYCLE.count(family) + CYCLE[: number % len(CYCLE)].count(family)
    return draw_family(family, seed=seed, number=number, ordinal=ordinal)


def draw_family(family: str, *, seed: int, number: int, ordinal: int) -> Plan:
    """Args: ordinal: how many of the family were before; failpoints are taken in turn by it.

    Raises: KeyError for a family that does not exist.
    """
    rng = np.random.default_rng([seed, number])
    return FAMILIES[family](f"{family}#{number}", rng, ordinal)


def parse_name(name: str) -> tuple[str, int]:
    """(family, number) of "family#number"; a family alone is its first scenario.

    Raises: ValueError if there is no such family.
    """
    family, _, number = name.partition("#")
    if family not in FAMILIES or not (number.isdigit() or name == family):
        raise ValueError(f"no scenario '{name}'; families: {', '.join(FAMILIES)} (with #number to replay)")
    if number:
        return family, int(number)
    return family, CYCLE.index(family) if family in CYCLE else 0


def replay(name: str, *, seed: int) -> Plan:
    """The plan of that name in the campaign of that seed. Raises: ValueError if there is no such plan."""
    if name.startswith(COVER):
        names = name.removeprefix(COVER).split(",")
        unknown = sorted(set(names) - set(FAILPOINTS))
        if unknown:
            raise ValueError(f"no failpoint '{unknown[0]}'; there are: {', '.join(FAILPOINTS)}")
        return cover(names)
    family, number = parse_name(name)
    if family in CYCLE and CYCLE[number % len(CYCLE)] == family:
        return draw(seed, number)
    return draw_family(family, seed=seed, number=number, ordinal=number)


def hits_max(failpoint: str) -> int:
    """Up to which of its passes a failpoint may fire."""
    return RARE_HITS_MAX if "." in failpoint else STEP_HITS_MAX


def in_turn(names: list[str], *, ordinal: int, num: int) -> list[str]:
    """`num` names, going on where the scenario before left off."""
    return [names[(ordinal * num + index) % len(names)] for index in range(num)]


def needs_shard(failpoint: str) -> bool:
    return failpoint.startswith("publish")


def _failpoint_lives(rng: np.random.Generator, names: list[str], *, world_size: int = 1) -> tuple[Life, ...]:
    return tuple(
        Life(
            world_size=world_size,
            failpoint=name,
            hit=int(rng.integers(1, hits_max(name) + 1)),
            rank=int(rng.integers(world_size)),
        )
        for name in names
    )


def _failpoints(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    """Kills at the names that need no shard."""
    names = in_turn([one for one in FAILPOINTS if not needs_shard(one)], ordinal=ordinal, num=LIVES)
    return Plan(name=name, lives=_failpoint_lives(rng, names))


def _failpoints_serving(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    """Kills while versions are published: first the names of publishing, then all others."""
    ordered = sorted(FAILPOINTS, key=lambda one: not needs_shard(one))
    names = in_turn(ordered, ordinal=ordinal, num=LIVES)
    return Plan(name=name, lives=_failpoint_lives(rng, names), serving=True)


def _failpoints_ranks(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    """Kills of one of two ranks."""
    names = in_turn([one for one in FAILPOINTS if not needs_shard(one)], ordinal=ordinal, num=LIVES_RANKS)
    lives = _failpoint_lives(rng, names, world_size=2)
    return Plan(name=name, lives=lives, last_world_size=2)


def _kills(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    """Kills of the trainer at any moment, from its very start on."""
    times_s = rng.uniform(0.0, 2.0, LIVES)
    lives = tuple(
        Life(events=(Event(after_s=float(time_s), target="rank", action="kill"),)) for time_s in times_s
    )
    return Plan(name=name, lives=lives, serving=ordinal % 2 == 0)


def _services(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    """Shard and replica die and come back while the trainer publishes; the trainer dies as well."""
    lives = []
    for _ in range(3):
        events = [
            Event(
                after_s=float(rng.uniform(0.2, 1.5)),
                target=target,
                action="kill",
                pause_s=float(rng.uniform(0.0, 0.5)),
            )
            for target in ("shard", "replica")
        ]
        events.append(Event(after_s=float(rng.uniform(1.5, 2.2)), target="rank", action="kill"))
        lives.append(Life(events=tuple(events)))
    return Plan(name=name, lives=tuple(lives), serving=True)


def _stops(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    """Everything stands still for a while and goes on; with a kill at the end of each life."""
    world_size = 1 + ordinal % 2
    targets: list[Target] = ["rank", "shard", "replica", "broker"]
    lives = []
    for index in range(2):
        events = [
            Event(
                after_s=float(rng.uniform(0.2, 1.2)),
                target=target,
                action="stop",
                pause_s=float(rng.uniform(0.2, 1.0)),
                rank=int(rng.integers(world_size)) if target == "rank" else 0,
            )
            for target in targets[index * 2 : index * 2 + 2]
        ]
        events.append(Event(after_s=2.4, target="rank", action="kill", rank=int(rng.integers(world_size))))
        lives.append(Life(world_size=world_size, events=tuple(events)))
    return Plan(name=name, lives=tuple(lives), last_world_size=world_size, serving=True)


def _damage(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    """The newest checkpoint is torn or its bits flip between a kill and the restart."""
    return Plan(name=name, lives=(Life(damage=True), Life(damage=True)))


def _disk(name: str, rng: np.random.Generator, which: Literal["checkpoints", "log"]) -> Plan:
    """The disk of the checkpoints, or of the version log, is full for a while; then the trainer dies."""
    lives = tuple(
        Life(
            events=(
                Event(
                    after_s=float(rng.uniform(0.1, 0.9)),
                    target=which,
                    action="fill",
                    pause_s=float(rng.uniform(0.8, 1.6)),
                ),
                Event(after_s=float(rng.uniform(1.7, 2.6)), target="rank", action="kill"),
            )
        )
        for _ in range(2)
    )
    return Plan(name=name, lives=lives, serving=which == "log", small_disk=which)


def _disk_full(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    return _disk(name, rng, "checkpoints")


def _log_full(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    return _disk(name, rng, "log")


def _world_size(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    """Killed with one rank, gone on with two, and back (or the other way round)."""
    sizes = (1, 2, 1) if ordinal % 2 == 0 else (2, 1, 2)
    kills_s = {1: (0.9, 1.8), 2: (1.5, 3.5)}
    lives = tuple(
        Life(
            world_size=size,
            events=(
                Event(
                    after_s=float(rng.uniform(*kills_s[size])),
                    target="rank",
                    action="kill",
                    rank=int(rng.integers(size)),
                ),
            ),
        )
        for size in sizes
    )
    return Plan(name=name, lives=lives, last_world_size=3 - sizes[-1], has_room=True)


def _kafka(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    """A real broker dies and comes back with its data, while the trainer reads from it and dies too."""
    lives = tuple(
        Life(
            events=(
                Event(after_s=float(rng.uniform(0.1, 1.0)), target="broker", action="kill", pause_s=0.3),
                Event(after_s=float(rng.uniform(1.2, 2.0)), target="rank", action="kill"),
            )
        )
        for _ in range(2)
    )
    return Plan(name=name, lives=lives, kafka=True)


def _torchrun(name: str, rng: np.random.Generator, ordinal: int) -> Plan:
    """Two ranks under torchrun, which starts both again whenever one of them dies."""
    after_s, rank = float(rng.uniform(1.0, 3.0)), int(rng.integers(2))
    events = (Event(after_s=after_s, target="rank", action="kill", rank=rank),)
    return Plan(name=name, lives=(Life(world_size=2, events=events),), last_world_size=2, torchrun=True)


FAMILIES = {
    "failpoints": _failpoints,
    "failpoints-serving": _failpoints_serving,
    "failpoints-ranks": _failpoints_ranks,
    "kills": _kills,
    "services": _services,
    "stops": _stops,
    "damage": _damage,
    "disk-full": _disk_full,
    "log-full": _log_full,
    "world-size": _world_size,
    "kafka": _kafka,
    "torchrun": _torchrun,
}


def cover(names: list[str]) -> Plan:
    """A plan for names that have not fired yet: each at its first pass, those of publishing first.

    So a life begins where the one before it died, and the stream is not trained to its end before all
    of them had their turn.
    """
    names = sorted(names[:LIVES], key=lambda name: not needs_shard(name))
    lives = tuple(Life(failpoint=name, hit=1) for name in names)
    return Plan(name=f"{COVER}{','.join(names)}", lives=lives, serving=any(map(needs_shard, names)))
