"""Real processes to supervise: one small script that behaves as its first argument says."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from param_server.client import ReplicaState, Version
from trainer.config import Config, preset
from trainer.run.observe import Observation
from trainer.run.plan import RunOptions
from trainer.run.status import ProducerStatus, TableStatus, TrainerStatus, VersionTrace
from trainer.run.summary import Ending, ReplicaSummary

REPOSITORY = Path(__file__).parents[3]

CHILD_SCRIPT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

mode, name, directory = sys.argv[1:4]
directory = Path(directory)
pids = directory / "pids"
pids.mkdir(exist_ok=True)

def note_pid(who):
    (pids / who).write_text(str(os.getpid()))

def leave(number, frame):
    (directory / "order").open("a").write(name + "\\n")
    sys.exit(0)

if mode != "deaf":
    signal.signal(signal.SIGTERM, leave)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
note_pid(name)

def ready(**facts):
    path = Path(sys.argv[sys.argv.index("--ready-file") + 1])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"pid": os.getpid(), **facts}))
    os.replace(temporary, path)

def sleep_for_ever():
    while True:
        time.sleep(0.05)

if mode == "service":
    ready(address=name + ".example:1", said=" ".join(sys.argv[4:]))
    sleep_for_ever()
elif mode == "wrong-ready-file":
    Path(sys.argv[sys.argv.index("--ready-file") + 1]).write_text("[1, 2")
    sleep_for_ever()
elif mode == "never-ready":
    print("still looking for my port", flush=True)
    sleep_for_ever()
elif mode == "dies":
    ready()
    time.sleep(0.3)
    print("\\n".join(f"line {number}" for number in range(100)))
    print("the disk is full", file=sys.stderr)
    sys.exit(3)
elif mode == "dies-by-signal":
    ready()
    os.kill(os.getpid(), signal.SIGKILL)
elif mode == "deaf":
    # A worker of torchrun lives in a session of its own, and this one hears no SIGTERM either.
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(1000)"
    )
    subprocess.Popen([sys.executable, "-c", code, str(pids / (name + "-worker"))], start_new_session=True)
    while not (pids / (name + "-worker")).exists() or not (pids / (name + "-worker")).read_text():
        time.sleep(0.01)
    if "--ready-file" in sys.argv:
        ready()
    sleep_for_ever()
elif mode == "endless":
    sleep_for_ever()
elif mode == "trainer":
    import numpy as np
    from safetensors.numpy import save_file
    from trainer.run.status import TrainerStatus, write_status
    status = TrainerStatus(state="training", impressions_trained=900, step=1)
    write_status(directory / "status" / "trainer.json", status)
    while not (directory / "control" / "drain").exists():
        time.sleep(0.02)
    tensors = {"in.user_id": np.arange(3), "out.click": np.zeros(3, np.float32)}
    save_file(tensors, directory / "verify.safetensors", metadata={"version": "1.7"})
    status.impressions_trained = int(sys.argv[4]) if len(sys.argv) > 4 else 1000
    status.version, status.state, status.versions_full = "1.7", "stopped", 1
    write_status(directory / "status" / "trainer.json", status)
elif mode == "producer":
    from trainer.run.status import ProducerStatus, write_status
    status = ProducerStatus(state="done")
    status.impressions_produced = int(sys.argv[4]) if len(sys.argv) > 4 else 1000
    write_status(directory / "status" / "producer.json", status)
else:
    raise SystemExit("unknown mode " + mode)
"""


@pytest.fixture
def child_script(tmp_path: Path) -> Path:
    path = tmp_path / "child.py"
    path.write_text(CHILD_SCRIPT)
    return path


@pytest.fixture
def import_from_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children import the packages from here, wherever the tests were started."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def is_running() -> Callable[[int], bool]:
    def look(pid: int) -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state != "Z"

    return look


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool]], None]:
    """Wait for something that other processes bring about; a failure if it never comes."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline_s:
                pytest.fail("what was waited for did not happen")
            time.sleep(0.02)

    return wait


@pytest.fixture
def small_config() -> Config:
    return preset("quickstart")


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    return RunOptions(out_dir=tmp_path / "run", impressions=1000, live=False)


@pytest.fixture
def trainer_status() -> TrainerStatus:
    return TrainerStatus(
        state="stopped",
        generation=1,
        step=40,
        impressions_trained=990,
        dead_letters={"unknown_domain": 7, "bad_record": 3},
        lag_impressions=64,
        samples_per_s=2500.0,
        auc={"slide": {"click": 0.71, "like": None}, "discovery": {"click": 0.68, "like": 0.62}},
        gauc={"slide": {"click": 0.66, "like": None}, "discovery": {"click": 0.65, "like": 0.6}},
        tables=[
            TableStatus(
                name="dim16",
                rows=90,
                capacity=100,
                bytes=900,
                bytes_limit=1000,
                admitted=150,
                evicted={"score": 50, "expired": 10},
                refused={"probability": 5},
            ),
            TableStatus(
                name="dim32",
                rows=10,
                capacity=20,
                bytes=100,
                bytes_limit=200,
                admitted=11,
                evicted={"expired": 1},
                refused={},
            ),
        ],
        version="1.7",
        versions_full=2,
        versions_delta=6,
        rows_changed=400,
        rows_pushed=300,
        rows_held_back={"update_limit": 100},
        bytes_pushed=123_456,
        impressions_since_start=500,
        training_s=2.0,
    )


@pytest.fixture
def producer_status() -> ProducerStatus:
    return ProducerStatus(
        state="done",
        impressions_produced=1000,
        records_produced=16,
        best_possible_auc={"slide": {"click": 0.81, "like": 0.8}},
        best_possible_gauc={"slide": {"click": 0.8}},
    )


@pytest.fixture
def replica_state() -> ReplicaState:
    return ReplicaState(
        version=Version(1, 7),
        ready=True,
        age_ms=340,
        num_rows=100,
        num_predictions=3,
        num_unknown_ids=0,
        num_refused_requests=0,
        num_reloads=0,
        last_refusal="",
        applied=((Version(1, 6), 5_000), (Version(1, 7), 6_000)),
    )


@pytest.fixture
def observation(
    trainer_status: TrainerStatus, producer_status: ProducerStatus, replica_state: ReplicaState
) -> Observation:
    return Observation(
        t_s=12.0,
        trainer=trainer_status,
        producer=producer_status,
        replicas={"replica-0": replica_state, "replica-1": replica_state},
        freshness_p50_ms=420,
        freshness_p99_ms=910,
    )


@pytest.fixture
def ending() -> Ending:
    return Ending(
        ended="completed",
        impressions_wanted=1000,
        replicas=[
            ReplicaSummary(name=name, version="1.7", predictions_checked=384, max_abs_diff=2e-7)
            for name in ("replica-0", "replica-1")
        ],
        started_at="2026-01-02T03:04:05+00:00",
        duration_s=12.5,
        machine="a test's machine",
    )


@pytest.fixture
def traces() -> list[VersionTrace]:
    return [
        VersionTrace(
            generation=1,
            sequence=sequence,
            kind="full" if sequence == 1 else "delta",
            num_rows=10,
            num_deletes=0,
            num_bytes=1000 * sequence,
            taken_ms=1000 * sequence,
            committed_ms=1000 * sequence + 50,
            produced_ms=[(1000 * sequence - 100, 3), (1000 * sequence - 500, 1)],
        )
        for sequence in (1, 2, 3)
    ]
