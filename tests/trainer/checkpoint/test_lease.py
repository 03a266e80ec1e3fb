"""One writer a directory: refused while another holds it, fenced once another has taken over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.checkpoint.folders import Folder
from trainer.checkpoint.lease import acquire_lease
from trainer.checkpoint.store import Store, open_store
from trainer.errors import CheckpointError, LeaseLostError


@pytest.fixture
def store(store_root: str) -> Store:
    return open_store(store_root)


def test_each_lease_has_a_higher_number(store: Store) -> None:
    generations = []
    for _ in range(3):
        lease = acquire_lease(store, lease_s=60, now_ms=0)
        generations.append(lease.generation)
        lease.release(now_ms=0)
    assert generations == [1, 2, 3]
    assert store.names("lease") == ["000003.json"], "old ones are removed"


def test_number_is_never_used_twice_even_if_leases_are_lost(store: Store) -> None:
    acquire_lease(store, lease_s=60, now_ms=0).release(now_ms=0)
    store.write(f"{Folder(lease=5, save=1, step=3)}/file", b"")
    store.remove("lease")
    lease = acquire_lease(store, lease_s=60, now_ms=0)
    assert lease.generation == 6
    lease.release(now_ms=0)


def test_second_run_is_refused_and_let_in_after_release(store: Store) -> None:
    lease = acquire_lease(store, lease_s=60, now_ms=0)
    with pytest.raises(CheckpointError, match="another trainer uses this checkpoint directory"):
        acquire_lease(store, lease_s=60, now_ms=59_000)
    lease.release(now_ms=59_000)
    again = acquire_lease(store, lease_s=60, now_ms=59_000)
    again.check()
    again.release(now_ms=59_000)


def test_without_locks_a_lease_runs_out_and_its_holder_is_fenced() -> None:
    store = open_store("memory://lease-runs-out")
    first = acquire_lease(store, lease_s=60, now_ms=0)
    first.renew(now_ms=50_000)
    with pytest.raises(
        CheckpointError,
        match=rf"process {os.getpid()} on .*, lease 1, renewed 59 s ago.* a start in 1 s takes it over",
    ):
        acquire_lease(store, lease_s=5, now_ms=109_000)
    second = acquire_lease(store, lease_s=60, now_ms=110_000)
    second.check()
    for call in (first.check, lambda: first.renew(now_ms=110_000), lambda: first.release(now_ms=110_000)):
        with pytest.raises(LeaseLostError, match="another run has taken over with lease 2"):
            call()
    second.check()


def test_without_locks_an_unreadable_lease_says_what_to_do() -> None:
    store = open_store("memory://lease-unreadable")
    store.write("lease/000004.json", b"{")
    with pytest.raises(CheckpointError, match=r"lease/000004\.json: is no lease.* delete this file"):
        acquire_lease(store, lease_s=60, now_ms=0)
    store.remove("lease/000004.json")
    assert acquire_lease(store, lease_s=60, now_ms=0).generation == 1


def test_of_two_that_claim_at_once_one_gets_the_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other created the file between this one's look and its own create."""
    names = type(store).names

    def overtaken(self: Store, folder: str = "") -> list[str]:
        found = names(self, folder)
        if folder == "lease":
            self.write("lease/000001.json", b"{}")
        return found

    monkeypatch.setattr(type(store), "names", overtaken)
    with pytest.raises(CheckpointError, match="another run took lease 1 at the same moment"):
        acquire_lease(store, lease_s=60, now_ms=0)


def test_killed_local_run_frees_its_lease_at_once(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from trainer.checkpoint.lease import acquire_lease\n"
            "from trainer.checkpoint.store import open_store\n"
            "lease = acquire_lease(open_store(sys.argv[1]), lease_s=3600, now_ms=0)\n"
            "print(lease.generation, flush=True)\n"
            "time.sleep(60)\n",
            str(tmp_path),
        ],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    store = open_store(str(tmp_path))
    with pytest.raises(CheckpointError, match="another trainer uses this checkpoint directory"):
        acquire_lease(store, lease_s=60, now_ms=0)
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=20)
    holder.stdout.close()
    lease = acquire_lease(store, lease_s=60, now_ms=0)
    assert lease.generation == 2
    lease.release(now_ms=0)
