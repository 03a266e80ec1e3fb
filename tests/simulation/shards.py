"""Shards as processes: the real log, rows and subscriptions on the simulated disk, without sockets.

What shard_process.py does in a process is done here in events: open the log, serve, maintain, end, start
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from param_server.errors import LogError, ManifestError, ParamServerError
from param_server.manifest import SHARED_KINDS, Manifest, Version
from param_server.shard import Shard
from param_server.shard_service import ShardServicer
from param_server.staged_blobs import STAGED_VERSIONS_MAX
from param_server.subscriptions import Subscription
from param_server.version_log import VersionLog
from tests.simulation.disk import SimulatedDisk, SimulatedStore
from tests.simulation.kernel import Kernel, Process, Signal, SimulatedCrashError, Steps, ViolationError
from tests.simulation.network import Network, Parts
from tests.simulation.oracle import Oracle

MAINTAIN_MS = 500
STREAM_MS = 300
"""How often a stream looks for news that nobody told it of."""
STREAM_VERSIONS_MAX = 4
"""On their way to one replica and not taken yet: what flow control lets through."""


@dataclass(frozen=True, slots=True)
class ShardOptions:
    num_shards: int
    keep_full: int
    snapshot_every: int
    segment_bytes_max: int
    backlog_versions_max: int


class ShardProcess(Process):
    """One shard; `shard` is of its current life."""

    def __init__(
        self,
        kernel: Kernel,
        disk: SimulatedDisk,
        *,
        number: int,
        options: ShardOptions,
        oracle: Oracle,
    ) -> None:
        super().__init__(kernel, f"shard-{number}")
        self.shard: Shard
        self.news = Signal(kernel)
        self.num_starts = 0
        self._disk = disk
        self._number = number
        self._options = options
        self._oracle = oracle
        self._servicer: ShardServicer

    def start(self) -> None:
        """Recover and serve; what cannot start now tries again, as its supervisor would have it."""
        options = self._options
        try:
            log = VersionLog(
                SimulatedStore(self._disk, owner=self.name),
                shard=self._number,
                num_shards=options.num_shards,
                keep_full=options.keep_full,
                segment_bytes_max=options.segment_bytes_max,
            )
            self.shard = Shard(
                log,
                num_shards=options.num_shards,
                snapshot_every=options.snapshot_every,
                backlog_versions_max=options.backlog_versions_max,
            )
        except SimulatedCrashError as crash:
            self.kernel.note(f"{self.name} ends while it starts, at {crash}")
            self.end()
            return
        except ParamServerError as error:
            self.kernel.note(f"{self.name} cannot start: {type(error).__name__}")
            self.end()
            return
        self._servicer = ShardServicer(self.shard, clock_ms=lambda: self.kernel.now_ms)
        self.up = True
        self.num_starts += 1
        self.kernel.note(f"{self.name} is up at {log.head}, damage {len(log.damage)}")
        if self._number == 0:
            self._oracle.check_recovered(self.shard)
        self.spawn(self._maintain())

    def end(self) -> None:
        """The process is gone; half of the times the machine with it. It comes back."""
        super().end()
        self._disk.faults.crash_after.pop(self.name, None)
        if self.kernel.chance(0.6):
            self._disk.lose_power(self.name)
            self.kernel.note(f"{self.name} lost power")
        else:
            self._disk.keep_all(self.name)
            self.kernel.note(f"{self.name} was killed")
        self.restart_later(self.start)

    def handle(self, work: Callable[[Shard], object]) -> Callable[[], object]:
        """What a request does here, with the checks that follow it."""

        def run() -> object:
            try:
                return work(self.shard)
            finally:
                self.check_bounds()
                self.news.fire()

        return run

    def check_bounds(self) -> None:
        log = self.shard.log
        if len(log._staging._staged._blobs) > STAGED_VERSIONS_MAX:
            raise ViolationError(f"{self.name}: more than {STAGED_VERSIONS_MAX} versions are staged")
        if len(self.shard.subscriptions.names()) > 64:
            raise ViolationError(f"{self.name}: {len(self.shard.subscriptions.names())} subscribers")

    def _maintain(self) -> Steps:
        while True:
            yield MAINTAIN_MS
            try:
                self.shard.maintain(now_s=self.kernel.now_ms / 1000)
                self.news.fire()
                if self.kernel.chance(0.2):
                    self._oracle.check_shard(self.shard)
            except SimulatedCrashError as crash:
                self.kernel.note(f"{self.name} ends in its work beside, at {crash}")
                self.end()
                return
            except (LogError, ManifestError) as error:
                self.kernel.note(f"{self.name} cannot maintain: {type(error).__name__}")
            except ParamServerError as error:
                # shard_process.maintain expects no other; the process ends and starts again.
                self.kernel.note(f"{self.name} ends: {type(error).__name__}")
                self.end()
                return

    def shared_names(self, version: Version | None) -> set[str]:
        return self._servicer._shared_names(version)

    def parts_of(self, manifest: Manifest, known: set[str]) -> Parts:
        return list(self._servicer._version_parts(manifest, known))


class Stream:
    """One answer to Subscribe or Replay: whole versions in order, until one of the two sides ends."""

    def __init__(
        self,
        server: ShardProcess,
        client: Process,
        network: Network,
        *,
        take: Callable[[list[Parts], ParamServerError | None], None],
    ) -> None:
        self._server = server
        self._client = client
        self._network = network
        self._take = take
        self._ready_ms = 0
        self._life = -1
        self._num_on_their_way = 0
        self._taken = Signal(server.kernel)
        self.open = True

    def begin(self) -> bool:
        """The request has arrived; False: it is not the first, or nobody waits for it any more."""
        first = self.open and self._life < 0
        if first:
            self._life = self._server.num_starts
        return first

    @property
    def alive(self) -> bool:
        return self.open and self._server.up and self._server.num_starts == self._life

    def close(self) -> None:
        self.open = False
        self._server.news.fire()
        self._taken.fire()

    def took(self, num_versions: int) -> None:
        """The client has room again."""
        self._num_on_their_way -= num_versions
        self._taken.fire()

    def follow(self, held: Version | None) -> Steps:
        """A task of the server's."""
        server = self._server
        try:
            subscription = server.shard.subscriptions.add(
                self._client.name, held, shards=frozenset(), cancel=self.close
            )
        except ParamServerError as error:
            self._send([], error)
            return
        shard = server.shard
        try:
            known = server.shared_names(held)
            while self.open:
                known = yield from self._send_news(subscription, known)
        except ParamServerError as error:
            self._send([], error)
        finally:
            shard.subscriptions.remove(subscription)

    def _send_news(self, subscription: Subscription, known: set[str]) -> Steps:
        """Returns: the programs and signatures that the client has then."""
        for manifest in self._server.shard.subscriptions.take(subscription, timeout_s=0):
            while self._num_on_their_way >= STREAM_VERSIONS_MAX:
                yield self._taken.wait(STREAM_MS)
                subscription.check()
                if not self.open:
                    return known
            parts = self._server.parts_of(manifest, known)
            subscription.check()
            self._send([self._network.damaged(parts)], None)
            subscription.cursor = manifest.version
            known = {blob.name for blob in manifest.blobs if blob.kind in SHARED_KINDS}
        yield self._server.news.wait(STREAM_MS)
        return known

    def replay(self, until: Version) -> Steps:
        try:
            for manifest in self._server.shard.log.chain_to(until):
                self._send([self._server.parts_of(manifest, set())], None)
                yield 1
        except ParamServerError as error:
            self._send([], error)

    def _send(self, versions: list[Parts], error: ParamServerError | None) -> None:
        """In order: what was sent before arrives before. A link that is cut, or a loss, ends the stream."""
        kernel = self._server.kernel
        lost = kernel.chance(self._network.faults.drop_rate)
        if lost or not self._network.reaches(self._server, self._client):
            self._network.num_lost += 1
            self.open = False
            return
        self._ready_ms = max(self._ready_ms, kernel.now_ms + self._network.delay_ms())
        self._num_on_their_way += len(versions)
        kernel.after(self._ready_ms - kernel.now_ms, lambda: self._take(versions, error))
