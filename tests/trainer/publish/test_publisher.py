"""The publisher on real shards: after outages, rollbacks and bad rows serving has what training has."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from feature_eviction import owner_of
from param_server.client import (
    AccessError,
    ClientSecurity,
    FencedError,
    ParamServerClient,
    ParamServerClients,
    RulesConfig,
    Version,
)
from trainer.__main__ import _shard_security
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.metrics import QualityWindow
from trainer.publish.publisher import Phase, Publisher
from trainer.publish.publishing import Moment, Publishing, quality_gate
from trainer.recommender import Recommender
from trainer.run.status import TrainerStatus
from trainer.status_report import tell_of_publishing
from trainer.stream.columns import Impressions

REPOSITORY = Path(__file__).resolve().parents[3]
TABLE = "dim16"
BYTES_LIMIT = 256 << 10
TOKEN = "correct-horse-battery"
START_TIMEOUT_S = 60


class Shards:
    """Shard processes of one log, which may be killed and come back at their addresses."""

    def __init__(self, directory: Path, free_port: Callable[[], int]) -> None:
        self._directory = directory
        self._free_port = free_port
        self._arguments: list[list[str]] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.addresses: list[str] = []

    def start(self, *more: str, num_shards: int = 1) -> None:
        for number in range(num_shards):
            address = f"127.0.0.1:{self._free_port()}"
            shard = ["--shard", str(number), "--num-shards", str(num_shards)]
            log = ["--log-dir", str(self._directory / "log")]
            self._arguments.append(["shard", "--address", address, *shard, *log, *more])
            self.addresses.append(address)
            self.processes.append(self._popen(number))

    def _popen(self, number: int) -> subprocess.Popen[bytes]:
        ready = self._directory / f"shard-{number}.json"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "param_server", *self._arguments[number], "--ready-file", str(ready)]
        with (self._directory / "shard.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=REPOSITORY, stderr=log)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not ready.exists():
            assert process.poll() is None, (self._directory / "shard.log").read_text()[-2000:]
            assert time.monotonic() < deadline_s, "the shard did not become ready"
            time.sleep(0.05)
        assert json.loads(ready.read_text())["pid"] == process.pid
        return process

    def kill(self) -> None:
        self.processes[0].kill()
        self.processes[0].wait()

    def restart(self) -> None:
        self.processes[0] = self._popen(0)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def shards(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Shards]:
    started = Shards(tmp_path, free_port)
    yield started
    started.end()


@dataclass
class Rig:
    """A trainer's parts beside its shards; time passes as the test says."""

    config: Config
    recommender: Recommender
    publisher: Publisher
    publishing: Publishing
    window: QualityWindow
    clients: ParamServerClients
    batches: Iterator[Impressions]
    now_ms: int = 1_000_000
    event_time_s: int = field(default=0)
    num_trained: int = field(default=0)

    def train(self, num: int = 1, *, flipped: bool = False) -> None:
        """Args: flipped: the labels of every second impression are wrong, which cannot be learned."""
        for _ in range(num):
            batch = next(self.batches)
            if flipped:
                batch.labels_NT[::2] = 1 - batch.labels_NT[::2]
            self.event_time_s = max(self.event_time_s, int(batch.event_time_ms_N.max()) // 1000)
            scores_NT = self.recommender.train(batch, now_s=self.event_time_s)
            self.window.add(
                scores_NT,
                labels_NT=batch.labels_NT,
                known_NT=batch.known_NT,
                domain_N=batch.domain_N,
                users_N=batch.user_ids_N,
            )
            self.num_trained += len(batch)
            self.publishing.trained(batch.produced_ms_N, now_ms=self.now_ms)

    def interval(self) -> None:
        """What the loop does when a publish is due; an idle publisher begins, a busy one may move on."""
        self.now_ms += 500
        self.publishing.advance(
            all_done=self.publisher.job_done, any_failed=self.publisher.job_failed, now_ms=self.now_ms
        )
        if self.publishing.idle:
            self.publishing.begin(self.moment(), full=False, now_s=0.0)

    def publish(self, *, full: bool = False) -> None:
        """One version, to its end."""
        self.now_ms += 500
        self.publishing.begin(self.moment(), full=full, now_s=0.0)
        self.finish()

    def finish(self) -> None:
        while not self.publishing.idle:
            self.publisher.wait()
            self.publishing.advance(
                all_done=self.publisher.job_done, any_failed=self.publisher.job_failed, now_ms=self.now_ms
            )

    def moment(self) -> Moment:
        return Moment(now_ms=self.now_ms, watermark_ms=self.event_time_s * 1000, positions=[])

    @property
    def held_back(self) -> dict[str, int]:
        return self.publisher.totals.held_back

    @property
    def rows_CD(self) -> torch.Tensor:
        return self.recommender.shards[TABLE].rows.rows_CD

    def num_pending(self) -> int:
        return self.recommender.shards[TABLE].changed.num_pending

    def assert_serving_equals_training(self, *clients: ParamServerClient) -> None:
        """Every row at the shard that owns it, bit for bit, and none that training does not hold."""
        live = self.recommender.shards[TABLE].ids.rows()
        owner_N = owner_of(live.keys_N, num_owners=len(clients)) if len(clients) > 1 else 0 * live.keys_N
        for number, client in enumerate(clients):
            own_N = owner_N == number
            _, served = client.pull(TABLE, live.keys_N[own_N])
            np.testing.assert_array_equal(served.ids_N, live.keys_N[own_N])
            mine = self.rows_CD[torch.from_numpy(live.slots_N[own_N])].numpy()
            np.testing.assert_array_equal(served.rows_ND.view(np.uint32), mine.view(np.uint32))
            np.testing.assert_array_equal(served.scores_N, live.scores_N[own_N])
            np.testing.assert_array_equal(served.last_seen_s_N, live.last_seen_s_N[own_N])
            assert client.status().num_rows == int(own_N.sum())

    def assert_began_anew(self, client: ParamServerClient, *, after: int, parent: Version) -> None:
        """Args: after: the generation that was fenced; parent: the head before."""
        newest = client.versions()[-1]
        assert newest.kind == "full"
        assert newest.version == Version(self.publisher.generation, 1)
        assert self.publisher.generation > after
        assert newest.parent == parent
        self.assert_serving_equals_training(client)


MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig(
    ranks: Ranks,
    make_config: Callable[..., Config],
    make_batches: Callable[..., list[Impressions]],
    tmp_path: Path,
) -> Iterator[MakeRig]:
    with ExitStack() as cleanup:

        def make(
            addresses: list[str],
            *,
            row_format: str = "float32",
            security: ClientSecurity | None = None,
            num_batches: int = 60,
            **publish: Any,
        ) -> Rig:
            config = make_config(bytes_limit=BYTES_LIMIT)
            config = replace(
                config,
                publish=replace(config.publish, segment_bytes_max=1 << 16, rules=RulesConfig(), **publish),
                serving=replace(config.serving, row_format=row_format),
            )
            clients = ParamServerClients(
                addresses, config.publish.request_timeout_s, security=security or ClientSecurity()
            )
            cleanup.callback(clients.close)
            recommender = Recommender(config, ranks=ranks)
            publisher = Publisher(
                recommender,
                client=clients,
                config=config,
                ranks=ranks,
                trace_path=tmp_path / "versions.jsonl",
                program_path=tmp_path / "program.cache",
            )
            cleanup.callback(publisher.close)
            window = QualityWindow(domains=config.schema.domains, tasks=config.schema.task_names, window=400)
            gate = quality_gate(config)
            publishing = Publishing(publisher, config=config, window=window, gate=gate, ranks=ranks)
            publisher.open(at_least=0)
            batches = iter(make_batches(config, num_batches))
            return Rig(config, recommender, publisher, publishing, window, clients, batches)

        yield make


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("full_every", "expected"), [(1, "FFFFFF"), (2, "FdFdFd"), (4, "FdddFd")])
def test_each_so_many_versions_a_full_one_is_published(
    shards: Shards, make_rig: MakeRig, tmp_path: Path, full_every: int, expected: str
) -> None:
    """And a trace that cannot be written stops nothing."""
    shards.start()
    rig = make_rig(shards.addresses, full_every=full_every)
    (tmp_path / "versions.jsonl").mkdir()
    for _ in expected:
        rig.train(1)
        rig.publish()
    with ParamServerClient(shards.addresses[0], 30) as client:
        kinds = "".join("F" if one.kind == "full" else "d" for one in client.versions())
    assert expected.endswith(kinds)
    assert kinds
    assert rig.publisher.totals.full == expected.count("F")


@pytest.mark.timeout(120)
def test_rows_that_are_not_finite_stay_out_and_pending_until_they_are_mended(
    shards: Shards, make_rig: MakeRig
) -> None:
    shards.start()
    rig = make_rig(shards.addresses)
    rig.train(3)
    rig.publish()
    shard = rig.recommender.shards[TABLE]
    key, slot = (int(column[0]) for column in (shard.ids.rows().keys_N, shard.ids.rows().slots_N))
    good_D = rig.rows_CD[slot].clone()
    with ParamServerClient(shards.addresses[0], 30) as client:
        rig.rows_CD[slot, 3] = float("nan")
        shard.changed.touch(np.array([slot]))
        rig.publish()
        assert rig.held_back == {"not_finite": 1}
        assert rig.num_pending() == 1
        _, served = client.pull(TABLE, np.array([key]))
        np.testing.assert_array_equal(served.rows_ND[0], good_D.numpy(), err_msg="serving keeps what it had")
        rig.publish(full=True)  # which leaves it out, too
        _, served = client.pull(TABLE, np.array([key]))
        assert len(served) == 0
        assert rig.num_pending() == 1
        rig.rows_CD[slot] = good_D * 2
        rig.publish()
        rig.assert_serving_equals_training(client)
    assert rig.num_pending() == 0


@pytest.mark.timeout(120)
def test_rows_beyond_the_row_format_stay_out_with_a_reason_of_their_own(
    shards: Shards, make_rig: MakeRig
) -> None:
    shards.start()
    rig = make_rig(shards.addresses, row_format="float16")
    rig.train(3)
    slots_N = rig.recommender.shards[TABLE].ids.rows().slots_N
    rig.rows_CD[slots_N[0], 0] = 70_000.0
    rig.rows_CD[slots_N[1], 0] = float("inf")
    rig.publish()
    assert rig.held_back == {"not_finite": 1, "out_of_range": 1}
    assert rig.num_pending() == 2
    assert rig.clients.status()[0].num_rows == len(slots_N) - 2


@pytest.mark.timeout(200)
@pytest.mark.parametrize("outage", ["stopped", "killed"])
def test_all_changes_of_an_outage_arrive_together_in_one_version(
    outage: str, shards: Shards, make_rig: MakeRig, tmp_path: Path
) -> None:
    """Many versions are due while the shard is away; training goes on in the same memory."""
    shards.start()
    rig = make_rig(shards.addresses, request_timeout_s=2, num_batches=140)
    rig.train(20)
    while rig.num_pending():
        rig.publish()
    before = rig.clients.status()[0].num_versions
    if outage == "killed":
        shards.kill()
    else:
        shards.processes[0].send_signal(signal.SIGSTOP)
    pending: list[int] = []
    memory_kib = 0
    for number in range(100):
        rig.train()
        rig.interval()
        time.sleep(0.06)
        pending.append(rig.num_pending())
        if number == 49:
            memory_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert rig.publisher.totals.failed >= 2
    assert pending[-1] > 0
    assert max(pending) <= 2 * rig.recommender.shards[TABLE].slots_per_rank
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kib < 8 << 10
    status = TrainerStatus(state="training")
    tell_of_publishing(status, rig.publisher, now_ms=rig.now_ms)
    assert status.pending_age_ms >= 99 * 500, "the oldest pending change is from the first interval"
    assert status.last_ack_age_s >= 50.0
    assert status.versions_failed == rig.publisher.totals.failed
    if outage == "killed":
        shards.restart()
    else:
        os.kill(shards.processes[0].pid, signal.SIGCONT)
    deadline_s = time.monotonic() + 60
    while rig.num_pending() or not rig.publishing.idle:
        assert time.monotonic() < deadline_s, "the shard is back, and nothing arrives"
        rig.interval()
        rig.finish()
    with ParamServerClient(shards.addresses[0], 30) as client:
        rig.assert_serving_equals_training(client)
        versions = client.versions()[before:]
    # Of a shard that only stood still, the version that was on its way may have arrived late, too.
    assert len(versions) <= (1 if outage == "killed" else 2)
    assert versions[-1].kind == "full"
    traces = [json.loads(line) for line in (tmp_path / "versions.jsonl").read_text().splitlines()]
    assert sum(num for trace in traces for _, num in trace["produced_ms"]) == rig.num_trained
    assert rig.publisher.backlog.age_ms(now_ms=rig.now_ms) == 0


@pytest.mark.timeout(120)
def test_after_an_operators_rollback_the_trainer_begins_a_generation_with_a_full_version(
    shards: Shards, make_rig: MakeRig
) -> None:
    shards.start()
    rig = make_rig(shards.addresses)
    for _ in range(3):
        rig.train(3)
        rig.publish()
    first = rig.publisher.generation
    with ParamServerClient(shards.addresses[0], 30) as client:
        made = client.rollback(Version(first, 1))
        assert made == Version(first, 4)
        rig.train(3)
        rig.publish()  # does not follow the head: all stays pending
        assert rig.publisher.totals.failed == 1
        assert rig.num_pending() > 0
        assert client.status().head == made
        rig.publish()  # opens the generation
        rig.publish()
        rig.assert_began_anew(client, after=first, parent=made)


@pytest.mark.timeout(120)
def test_after_a_repair_of_the_log_the_trainer_goes_on_with_a_full_version(
    shards: Shards, make_rig: MakeRig, tmp_path: Path
) -> None:
    """The newest version rots, and the shard starts again without it: no newer trainer, so no end."""
    shards.start()
    rig = make_rig(shards.addresses)
    for _ in range(2):
        rig.train(3)
        rig.publish()
    first = rig.publisher.generation
    shards.kill()
    newest = max((tmp_path / "log" / "manifests").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    shards.restart()
    rig.train(3)
    rig.publish()  # the generation is fenced: all stays pending
    assert rig.publisher.totals.failed == 1
    rig.publish()  # opens another
    rig.publish()
    with ParamServerClient(shards.addresses[0], 30) as client:
        rig.assert_began_anew(client, after=first + 1, parent=Version(first, 1))
        client.open_generation(0)  # and this is a newer trainer
        rig.train(3)
        with pytest.raises(FencedError, match="a newer trainer opened"):
            rig.publish()


@pytest.mark.timeout(120)
def test_versions_of_nothing_are_rare(shards: Shards, make_rig: MakeRig) -> None:
    shards.start()
    rig = make_rig(shards.addresses, interval_ms=500, idle_interval_ms=10_000, request_timeout_s=2)
    due = rig.publishing.due
    assert due(now_s=0.0), "the first version waits for nothing"
    rig.publish()
    assert not due(now_s=9.9)
    assert due(now_s=10.0)
    rig.train()
    assert not due(now_s=0.4)
    assert due(now_s=0.5)
    rig.publish()
    assert not due(now_s=9.9)
    rig.train()
    shards.kill()
    rig.publish()
    assert rig.publisher.totals.failed == 1
    assert due(now_s=0.5), "what failed is tried again as soon as what is new"
    shards.restart()
    rig.publish()
    assert due(now_s=0.5)
    rig.publish()
    assert not due(now_s=9.9)


@pytest.mark.timeout(120)
def test_two_shards_get_each_the_rows_that_they_own(shards: Shards, make_rig: MakeRig) -> None:
    shards.start(num_shards=2)
    rig = make_rig(shards.addresses)
    for _ in range(8):
        rig.train(7)
        rig.publish()
    counters = rig.recommender.shards[TABLE].ids.counters()
    assert sum(counters.evicted.values()) > 0, "deletes go to their shards, too"
    assert rig.publisher.totals.failed == 0
    with ParamServerClient(shards.addresses[0], 30) as one, ParamServerClient(shards.addresses[1], 30) as two:
        deadline_s = time.monotonic() + 20
        while two.status().head != one.status().head:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        rig.assert_serving_equals_training(one, two)


def openssl(*arguments: str, folder: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def pems(tmp_path: Path) -> Path:
    """An authority, and certificates of a shard and of a trainer."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority = ("-x509", "-days", "1", "-subj", "/CN=ours", "-keyout", "ours.key", "-out", "ours.pem")
    openssl("req", *key, *authority, folder=tmp_path)
    (tmp_path / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("shard", "trainer"):
        request = ("-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl("req", *key, *request, folder=tmp_path)
        signing = (
            "-CA",
            "ours.pem",
            "-CAkey",
            "ours.key",
            "-CAcreateserial",
            "-days",
            "1",
            "-extfile",
            "san",
        )
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem", folder=tmp_path)
    return tmp_path


@pytest.mark.timeout(120)
def test_a_shard_with_tls_and_a_token_is_published_to(
    shards: Shards, make_rig: MakeRig, make_config: Callable[..., Config], pems: Path
) -> None:
    """Certificates from the file's [serving], the token from the environment."""
    (pems / "token").write_text(TOKEN)
    shards.start(
        *("--tls-ca", str(pems / "ours.pem"), "--tls-cert", str(pems / "shard.pem")),
        *("--tls-key", str(pems / "shard.key"), "--token-file", str(pems / "token")),
    )
    config = make_config()
    serving = replace(
        config.serving,
        tls_ca_file=str(pems / "ours.pem"),
        tls_cert_file=str(pems / "trainer.pem"),
        tls_key_file=str(pems / "trainer.key"),
    )
    config = replace(config, serving=serving)
    with pytest.raises(AccessError, match="token is missing or wrong"):
        make_rig(shards.addresses, security=_shard_security(config, {}))
    security = _shard_security(config, {"FRESHET_SHARD_TOKEN": f"{TOKEN}\n"})
    rig = make_rig(shards.addresses, security=security)
    rig.train(3)
    rig.publish()
    with ParamServerClient(shards.addresses[0], 30, security=security) as client:
        rig.assert_serving_equals_training(client)


@pytest.mark.timeout(250)
@pytest.mark.parametrize("auto_rollback", [False, True])
def test_a_collapse_of_quality_is_held_and_serving_goes_on_after_it(
    auto_rollback: bool, shards: Shards, make_rig: MakeRig
) -> None:
    """Labels are flipped for a while: AUC falls, nothing is published, and all of it once AUC is back."""
    shards.start()
    rig = make_rig(
        shards.addresses,
        num_batches=400,
        gate_task="effective_view",
        gate_auc_drop_max=0.07,
        gate_impressions_min=500,
        auto_rollback=auto_rollback,
    )
    with ParamServerClient(shards.addresses[0], 30) as client:
        for _ in range(20):
            rig.train(5)
            rig.publish()
        assert rig.publisher.totals.held == 0
        for _ in range(20):
            if rig.publisher.held_because:
                break
            rig.train(2, flipped=True)
            rig.publish()
        published = rig.publisher.totals.full + rig.publisher.totals.delta
        assert "windowed AUC" in rig.publisher.held_because
        rolled_back = [one for one in client.versions() if one.rollback_of is not None]
        assert len(rolled_back) == int(auto_rollback)
        for _ in range(5):
            rig.train(2, flipped=True)
            rig.publish()
        assert rig.publisher.totals.held >= 6
        status = TrainerStatus(state="training")
        tell_of_publishing(status, rig.publisher, now_ms=rig.now_ms)
        assert status.held_because == rig.publisher.held_because
        assert status.versions_held == rig.publisher.totals.held
        assert rig.publisher.totals.full + rig.publisher.totals.delta == published
        assert rig.num_pending() > 0
        assert len([one for one in client.versions() if one.rollback_of]) == int(auto_rollback), "once"
        if auto_rollback:
            assert client.status().head == rolled_back[0].version
        while rig.publisher.held_because:
            rig.train(5)
            rig.publish()
        for _ in range(2):  # after a rollback the first only opens a generation
            rig.publish()
        assert rig.publisher.phase is Phase.IDLE
        assert rig.publisher.totals.failed == 0
        rig.assert_serving_equals_training(client)


@pytest.mark.timeout(250)
def test_a_rollback_that_fails_is_tried_again_when_the_next_version_is_due(
    shards: Shards, make_rig: MakeRig
) -> None:
    shards.start()
    rig = make_rig(
        shards.addresses,
        num_batches=200,
        request_timeout_s=2,
        gate_task="effective_view",
        gate_auc_drop_max=0.07,
        gate_impressions_min=500,
        auto_rollback=True,
    )
    for _ in range(20):
        rig.train(5)
        rig.publish()
    shards.kill()
    while not rig.publisher.held_because:
        rig.train(6, flipped=True)
        rig.publish()
    assert rig.publisher.totals.failed >= 1
    shards.restart()
    rig.train(2, flipped=True)
    for _ in range(3):
        rig.publish()
    assert rig.publisher.held_because
    with ParamServerClient(shards.addresses[0], 30) as client:
        assert len([one for one in client.versions() if one.rollback_of is not None]) == 1
