"""One seed: shards, trainers and replicas under one clock, first with faults, then without, then compared."""

from __future__ import annotations

from dataclasses import dataclass

from param_server.log_order import chain_to
from param_server.log_recovery import recover
from param_server.replica import Replica
from param_server.rules_config import RulesConfig
from param_server.version_content import rows_of_chain
from param_server.version_log import VersionLog
from tests.simulation.disk import SimulatedDisk, SimulatedStore
from tests.simulation.kernel import Kernel, ViolationError
from tests.simulation.nemesis import Nemesis
from tests.simulation.network import Network
from tests.simulation.oracle import Content, Oracle
from tests.simulation.replicas import ReplicaProcess
from tests.simulation.shards import ShardOptions, ShardProcess
from tests.simulation.trainers import Checkpoint, TrainerOptions, TrainerProcess
from tests.simulation.universe import index_of
from trainer.publish.changed_rows import ChangedRows

FAULTS_MS = 12_000
QUIET_STEP_MS = 500
QUIET_MAX_MS = 60_000
OBJECTS_MAX = 400

RULES = (
    RulesConfig(),
    RulesConfig(update_limit=2, update_limit_window_s=3),
    RulesConfig(min_updates=3, min_updates_window_s=4, refresh_after_s=5),
    RulesConfig(update_limit=1, update_limit_window_s=2, min_updates=2, refresh_after_s=3),
)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a test may replace by something broken, to see that it is found."""

    changed_rows: type[ChangedRows] = ChangedRows
    replica: type[Replica] = Replica


class World:
    """Everything that one seed decides."""

    def __init__(self, seed: int, parts: Parts) -> None:
        self.kernel = kernel = Kernel(seed)
        choose = kernel.random
        self.disk = SimulatedDisk(seed)
        self.network = Network(kernel)
        self.oracle = Oracle(kernel, self.disk, num_ids=choose.randint(20, 60))
        self.trainer_crash_rate = 0.0
        self.trainers: list[TrainerProcess] = []
        self._parts = parts
        self._shard_options = ShardOptions(
            num_shards=choose.choice((1, 1, 2)),
            keep_full=choose.choice((1, 2)),
            snapshot_every=choose.choice((0, 3, 6)),
            segment_bytes_max=choose.choice((600, 2000, 20_000)),
            backlog_versions_max=choose.choice((3, 8, 100)),
        )
        self._trainer_options = TrainerOptions(
            num_slots=self.oracle.num_ids * choose.choice((5, 8, 10)) // 10,
            rules=choose.choice(RULES),
            full_every=choose.choice((4, 8, 1000)),
            publish_ms=choose.choice((150, 300, 600)),
            num_ranks=choose.choice((1, 2)),
            has_model=kernel.chance(0.3),
        )
        options = self._shard_options
        self.shards = [
            ShardProcess(kernel, self.disk, number=number, options=options, oracle=self.oracle)
            for number in range(options.num_shards)
        ]
        self.replicas = [
            ReplicaProcess(
                kernel,
                number=number,
                shards=self.shards,
                network=self.network,
                oracle=self.oracle,
                replica_class=parts.replica,
            )
            for number in range(2)
        ]
        self.nemesis = Nemesis(self)

    @property
    def trainer(self) -> TrainerProcess:
        """The newest one."""
        return self.trainers[-1]

    def start_trainer(self) -> None:
        """From the newest checkpoint of the one before."""
        options = self._trainer_options
        checkpoint = self.trainer.checkpoint if self.trainers else Checkpoint.first(options.num_slots)
        one = TrainerProcess(
            self.kernel,
            number=len(self.trainers),
            options=options,
            checkpoint=checkpoint,
            shards=self.shards,
            network=self.network,
            oracle=self.oracle,
            changed_rows=self._parts.changed_rows,
        )
        one.crash_rate = self.trainer_crash_rate
        self.trainers.append(one)
        one.start()

    def supervise(self) -> None:
        """A trainer that ended is started again from its checkpoint."""
        if not self.trainers or not (self.trainer.up or self.trainer.finished):
            self.start_trainer()
        self.kernel.after(300, self.supervise)

    def run(self) -> None:
        """Raises: ViolationError."""
        for process in (*self.shards, *self.replicas):
            process.start()
        self.supervise()
        self.nemesis.start()
        self.kernel.run(FAULTS_MS)
        self.nemesis.heal()
        self._become_quiet()
        self._check_everyone()
        self._check_after_power_loss()

    def _become_quiet(self) -> None:
        """Training stops, the newest trainer publishes a last full version, everybody takes it."""
        deadline_ms = self.kernel.now_ms + QUIET_MAX_MS
        while self.kernel.now_ms < deadline_ms:
            self.kernel.run(self.kernel.now_ms + QUIET_STEP_MS)
            newest = self.trainer
            newest.training, newest.final = False, True
            head = self.oracle.acked
            if newest.finished and all(one.up and one.replica.store.version == head for one in self.replicas):
                return
        behind = [str(one.replica.store.version) for one in self.replicas]
        raise ViolationError(
            f"{QUIET_MAX_MS} ms without faults were not enough: acknowledged is {self.oracle.acked}, "
            f"the replicas answer from {behind}, the trainer has finished: {self.trainer.finished}"
        )

    def _check_everyone(self) -> None:
        """Every replica equals the trainer, bit for bit, and what is kept is bounded."""
        wanted = self.trainer.content
        for one in self.replicas:
            found, version = self.oracle.replica_content(one.replica)
            if found.differing_U(wanted).any() or found.answer != wanted.answer:
                raise ViolationError(f"{one.name} at version {version} is not what the trainer has")
        for shard in self.shards:
            shard.shard.take_over()
            self.oracle.check_shard(shard.shard)
        bases = sum(entry.base is not None for entry in self.shards[0].shard.log.entries)
        if bases > self._shard_options.keep_full:
            raise ViolationError(f"{bases} full versions are kept, not {self._shard_options.keep_full}")
        if self.disk.num_objects > OBJECTS_MAX:
            raise ViolationError(f"the log keeps {self.disk.num_objects} objects")

    def _check_after_power_loss(self) -> None:
        """All machines lose power at once: what was acknowledged is in the log, and nothing else is."""
        for process in (*self.shards, *self.replicas, *self.trainers):
            process.end()
        for shard in self.shards:
            self.disk.lose_power(shard.name)
        store = SimulatedStore(self.disk, owner="shard-0")
        recovered = recover(store, repair=False)
        head = recovered.entries[-1].manifest.version if recovered.entries else None
        if head != self.oracle.acked:
            raise ViolationError(f"after a power loss of all the head is {head}, not {self.oracle.acked}")
        assert head is not None
        log = VersionLog(store, num_shards=self._shard_options.num_shards)
        found = Content.empty(self.oracle.num_ids)
        for segment in rows_of_chain(chain_to(log.entries, head), log.read_blob):
            at = index_of(segment.ids_N)
            found.present_U[at], found.rows_UD[at] = True, segment.rows_ND
        if found.differing_U(self.trainer.content).any():
            raise ViolationError(f"the log's version {head} is not what the trainer had")

    def counts(self) -> dict[str, int]:
        """What happened, so that a run that tests nothing shows."""
        return {
            "events": self.kernel.num_events,
            "versions": len(self.oracle.contents),
            "acknowledged": self.oracle.num_acked,
            "applied": sum(one.num_applied for one in self.replicas),
            "refused": sum(one.num_refused for one in self.replicas),
            "publishes_failed": sum(one.num_failed for one in self.trainers),
            "trainers": len(self.trainers),
            "shard_starts": sum(one.num_starts for one in self.shards),
            "messages_lost": self.network.num_lost,
            "messages_doubled": self.network.num_doubled,
            "versions_damaged": self.network.num_damaged,
            "bits_flipped": self.disk.num_flips,
            "segments_torn": self.disk.num_torn,
            "changes_undone": self.disk.num_undone,
            "disk_errors": self.disk.num_errors,
            "checks": self.oracle.num_checks,
            **{f"strike: {name}": num for name, num in self.nemesis.num_strikes.items()},
        }
