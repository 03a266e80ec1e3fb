"""Replicas as processes: the real Replica, led by the loop of follower.py in events."""

from __future__ import annotations

from collections import deque

from param_server.errors import ParamServerError, UnavailableError
from param_server.follower import REFUSALS
from param_server.manifest import Version
from param_server.receive import receive_versions
from param_server.replica import APPLIED_MAX, Plan, Replica
from tests.simulation.kernel import Kernel, Process, Signal, SimulatedCrashError, Steps, ViolationError
from tests.simulation.network import Network, Parts
from tests.simulation.oracle import Oracle
from tests.simulation.shards import ShardProcess, Stream

BACKOFF_MIN_MS, BACKOFF_MAX_MS = 50, 2000
LOOK_MS = 300


class ReplicaProcess(Process):
    """One replica; `replica` is of its current life."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        number: int,
        shards: list[ShardProcess],
        network: Network,
        oracle: Oracle,
        replica_class: type[Replica] = Replica,
    ) -> None:
        super().__init__(kernel, f"replica-{number}")
        self.replica: Replica
        self.crash_rate = 0.0
        """Of each version that is applied."""
        self.num_applied = 0
        self.num_refused = 0
        self._shards = shards
        self._network = network
        self._oracle = oracle
        self._replica_class = replica_class
        self._stream: Stream | None = None
        self._inbox: deque[tuple[list[Parts], ParamServerError | None]] = deque()
        self._arrived = Signal(kernel)
        self._seen: Version | None = None

    def start(self) -> None:
        self.replica = self._replica_class(clock_ms=lambda: self.kernel.now_ms)
        self._seen = None
        self.up = True
        self.kernel.note(f"{self.name} is up")
        self.spawn(self._follow())

    def end(self) -> None:
        super().end()
        self._close()
        self.restart_later(self.start)

    def pin(self, version: Version | None) -> None:
        self.replica.pin(version)
        self._close()

    def _follow(self) -> Steps:
        backoff_ms = BACKOFF_MIN_MS
        while True:
            before = self.replica.store.version
            plan = self.replica.plan()
            if plan.kind == "hold":
                yield LOOK_MS
                continue
            yield from self._run(plan)
            if self.replica.store.version != before:
                backoff_ms = BACKOFF_MIN_MS
            if self.replica.is_current(plan):
                yield backoff_ms
            backoff_ms = min(2 * backoff_ms, BACKOFF_MAX_MS)

    def _run(self, plan: Plan) -> Steps:
        shared = self.replica.begin(plan)
        try:
            stream = yield from self._open(plan)
            yield from self._apply_all(stream, plan, shared)
            self.replica.settle()
        except REFUSALS as error:
            self.num_refused += 1
            self.replica.refuse(error, plan)
            self.kernel.note(f"{self.name} refuses: {type(error).__name__}: {error}")
        except ParamServerError as error:
            self.kernel.note(f"{self.name}: stream ended: {type(error).__name__}")
        finally:
            self._close()

    def _open(self, plan: Plan) -> Steps:
        server = self.kernel.random.choice(self._shards)
        inbox: deque[tuple[list[Parts], ParamServerError | None]] = deque()

        def take(versions: list[Parts], error: ParamServerError | None) -> None:
            inbox.append((versions, error))
            self._arrived.fire()

        stream = Stream(server, self, self._network, take=take)
        self._inbox, self._stream = inbox, stream

        def begin() -> None:
            # A request that comes twice, or after its sender gave up, opens nothing.
            if stream.begin():
                server.spawn(
                    stream.follow(plan.held) if plan.kind == "follow" else stream.replay(_until(plan))
                )

        yield self._network.call(self, server, begin, what=f"{plan.kind} {plan.held or plan.until}")
        return stream

    def _apply_all(self, stream: Stream, plan: Plan, shared: dict[str, bytes]) -> Steps:
        """Until the stream ends or the rest of it is not wanted."""
        waiting: Parts = []
        while True:
            while not self._inbox:
                if not stream.alive or not self.replica.is_current(plan):
                    raise UnavailableError("the stream ended")
                yield self._arrived.wait(LOOK_MS)
            versions, error = self._inbox.popleft()
            if error is not None:
                raise error
            stream.took(len(versions))
            for parts in versions:
                for part in parts:
                    waiting.append(part)
                    if part.WhichOneof("part") != "end":
                        continue
                    whole, waiting = waiting, []
                    for received in receive_versions(whole, shared=shared):
                        shared = received.shared
                        self._step("before apply")
                        wanted = self.replica.apply(received, plan)
                        self._check(plan)
                        yield self.kernel.random.randint(1, 10)
                        self._step("after apply")
                        if not wanted:
                            return

    def _check(self, plan: Plan) -> None:
        """After each version that came, taken or not."""
        version = self.replica.store.version
        if version != self._seen:
            self.num_applied += 1
            self.kernel.note(f"{self.name} answers from {version}")
            if self._seen is not None and plan.kind != "replay" and (version is None or version < self._seen):
                raise ViolationError(f"{self.name} went back from {self._seen} to {version}")
            self._seen = version
        self._oracle.check_replica(self.replica, name=self.name)
        if len(self.replica.applied) > APPLIED_MAX:
            raise ViolationError(f"{self.name}: {len(self.replica.applied)} entries about what was applied")

    def _step(self, name: str) -> None:
        if self.kernel.chance(self.crash_rate):
            raise SimulatedCrashError(name)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _until(plan: Plan) -> Version:
    assert plan.until is not None
    return plan.until
