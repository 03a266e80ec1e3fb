"""The nemesis: what goes wrong, when. Each seed has its own kinds of faults, so some runs are all of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from param_server.errors import ParamServerError
from tests.simulation.kernel import Process, Steps

if TYPE_CHECKING:
    from tests.simulation.world import World

EVERY_MS = 400
"""On average, between two strikes."""


class Nemesis(Process):
    """Strikes until it is told to stop, then heals everything."""

    def __init__(self, world: World) -> None:
        super().__init__(world.kernel, "nemesis")
        self.num_strikes: Counter[str] = Counter()
        self._world = world
        chosen = {name: act for name, act in KINDS.items() if self.kernel.chance(0.4)}
        # Without checkpoints every restart would begin at nothing.
        self.kinds = {"checkpoint": KINDS["checkpoint"], **chosen}

    def start(self) -> None:
        self.up = True
        self.kernel.note(f"faults: {', '.join(sorted(self.kinds))}")
        world = self._world
        if "trainer crash" in self.kinds and self.kernel.chance(0.5):
            world.trainer_crash_rate = world.trainer.crash_rate = 0.02
        if "replica crash" in self.kinds and self.kernel.chance(0.5):
            for replica in world.replicas:
                replica.crash_rate = 0.02
        self.spawn(self._strike())

    def heal(self) -> None:
        """From now on nothing goes wrong any more."""
        self.end()
        world = self._world
        self.kernel.note("healed")
        world.network.heal()
        faults = world.network.faults
        faults.drop_rate = faults.duplicate_rate = faults.slow_rate = faults.damage_rate = 0.0
        world.disk.faults.full, world.disk.faults.error_rate = False, 0.0
        world.disk.faults.crash_after.clear()
        world.trainer_crash_rate = world.trainer.crash_rate = 0.0
        for replica in world.replicas:
            replica.crash_rate = 0.0
            if replica.up and replica.replica.pinned is not None:
                replica.pin(None)
        for zombie in world.trainers[:-1]:
            zombie.end()
        for process in (*world.shards, *world.replicas, world.trainer):
            process.paused_until_ms = 0

    def _strike(self) -> Steps:
        while True:
            yield self.kernel.random.randint(1, 2 * EVERY_MS)
            name = self.kernel.random.choice(sorted(self.kinds))
            self.kernel.note(f"strikes: {name}")
            self.num_strikes[name] += 1
            self.kinds[name](self)

    def _shard_pause(self) -> None:
        self._pause(self._choose(self._world.shards))

    def _replica_crash(self) -> None:
        self._choose(self._world.replicas).end()

    def _replica_pause(self) -> None:
        self._pause(self._choose(self._world.replicas))

    def _trainer_pause(self) -> None:
        self._pause(self._world.trainer)

    def _checkpoint(self) -> None:
        self._world.trainer.save()

    def _choose(self, processes: list[Any]) -> Any:
        return self.kernel.random.choice(processes)

    def _later(self, act: Callable[[], None]) -> None:
        self.kernel.after(self.kernel.random.randint(50, 2500), act)

    def _pause(self, process: Process) -> None:
        process.paused_until_ms = self.kernel.now_ms + self.kernel.random.randint(20, 3000)

    def _shard_crash(self) -> None:
        process = self._choose(self._world.shards)
        if process.up:
            process.end()

    def _shard_crash_inside(self) -> None:
        """At one of its next calls that change the disk, or while it starts."""
        process = self._choose(self._world.shards)
        self._world.disk.faults.crash_after[process.name] = self.kernel.random.randint(0, 25)

    def _all_down(self) -> None:
        for process in (*self._world.shards, *self._world.replicas):
            if process.up:
                process.end()

    def _trainer_crash(self) -> None:
        self._world.trainer.end()

    def _zombie(self) -> None:
        """A new trainer starts while the old one goes on, at once or after a pause."""
        if self.kernel.chance(0.5):
            self._pause(self._world.trainer)
        self._world.start_trainer()

    def _partition(self) -> None:
        world = self._world
        everyone = [*world.shards, *world.replicas, world.trainer]
        one, other = self.kernel.random.sample(everyone, 2)
        world.network.cut(one.name, other.name)
        if self.kernel.chance(0.7):
            world.network.cut(other.name, one.name)
        self._later(world.network.heal)

    def _losses(self) -> None:
        faults, choose = self._world.network.faults, self.kernel.random
        faults.drop_rate = choose.choice((0.0, 0.02, 0.2))
        faults.duplicate_rate = choose.choice((0.0, 0.05, 0.3))
        faults.slow_rate = choose.choice((0.0, 0.05, 0.4))

    def _stream_damage(self) -> None:
        self._world.network.faults.damage_rate = self.kernel.random.choice((0.0, 0.1, 0.4))

    def _disk_full(self) -> None:
        faults = self._world.disk.faults
        faults.full = True

        def room_again() -> None:
            faults.full = False

        self._later(room_again)

    def _disk_errors(self) -> None:
        self._world.disk.faults.error_rate = self.kernel.random.choice((0.0, 0.01, 0.1))

    def _rot(self) -> None:
        prefix = self.kernel.random.choice(("segments/", "segments/", "manifests/", "snapshots/", "content/"))
        self.kernel.note(f"a bit flips in '{self._world.disk.flip_bit(prefix)}'")

    def _rollback(self) -> None:
        """An operator's call; whoever trains learns of it at its next version."""
        shard = self._world.shards[0]
        if not shard.up or shard.pause_left_ms or len(shard.shard.log.entries) < 2:
            return
        version = self.kernel.random.choice(shard.shard.log.entries[:-1]).manifest.version

        def operate() -> Steps:
            work = shard.handle(lambda one: one.rollback(version, now_ms=self.kernel.now_ms))
            try:
                yield self._world.network.call(self, shard, work, what=f"roll back to {version}")
            except ParamServerError as error:
                self.kernel.note(f"no rollback: {type(error).__name__}")

        self.spawn(operate())

    def _pin(self) -> None:
        """A replica stays at, or goes to, a version of the log, and is let go later."""
        replica, shard = self._choose(self._world.replicas), self._world.shards[0]
        if not replica.up or not shard.up or not shard.shard.log.entries:
            return
        replica.pin(self.kernel.random.choice(shard.shard.log.entries).manifest.version)
        self._later(lambda: replica.pin(None) if replica.up else None)


KINDS: dict[str, Callable[[Nemesis], None]] = {
    "shard crash": Nemesis._shard_crash,
    "shard crash inside": Nemesis._shard_crash_inside,
    "shard pause": Nemesis._shard_pause,
    "replica crash": Nemesis._replica_crash,
    "replica pause": Nemesis._replica_pause,
    "trainer crash": Nemesis._trainer_crash,
    "trainer pause": Nemesis._trainer_pause,
    "zombie": Nemesis._zombie,
    "checkpoint": Nemesis._checkpoint,
    "partition": Nemesis._partition,
    "losses": Nemesis._losses,
    "stream damage": Nemesis._stream_damage,
    "disk full": Nemesis._disk_full,
    "disk errors": Nemesis._disk_errors,
    "rot": Nemesis._rot,
    "rollback": Nemesis._rollback,
    "pin": Nemesis._pin,
    "all down": Nemesis._all_down,
}
