"""Starting, waiting and stopping real processes in one place."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.errors import ChildError
from trainer.run.processes import ChildSpec
from trainer.run.run_directory import open_run_directory
from trainer.run.supervisor import InterruptedRun, StopSignals, Supervisor

MakeSpec = Callable[..., ChildSpec]


@pytest.fixture
def make_spec(child_script: Path, tmp_path: Path) -> MakeSpec:
    def make(mode: str) -> ChildSpec:
        argv = (sys.executable, str(child_script), mode, mode, str(tmp_path))
        return ChildSpec(name=mode, argv=argv, stop_grace_s=0.5)

    return make


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with (
        open_run_directory(tmp_path / "run", resume=False) as directory,
        StopSignals() as signals,
        Supervisor(directory, signals) as opened,
    ):
        yield opened


def test_facts_of_a_ready_child_are_kept(supervisor: Supervisor, make_spec: MakeSpec) -> None:
    facts = supervisor.start(make_spec("service"))
    assert facts["address"] == "service.example:1"
    assert supervisor.facts == {"service": facts}


def test_deaf_child_is_killed_and_reported_as_unclean(
    supervisor: Supervisor, make_spec: MakeSpec, is_running: Callable[[int], bool], tmp_path: Path
) -> None:
    supervisor.start(make_spec("deaf"))
    supervisor.start(make_spec("service"))
    supervisor.stop_all()
    assert [line.split(";")[0] for line in supervisor.unclean()] == ["deaf: ended by SIGKILL"]
    pids = [int(path.read_text()) for path in (tmp_path / "pids").iterdir()]
    assert len(pids) == 3
    assert not any(is_running(pid) for pid in pids)


def test_child_that_will_not_stop_when_its_time_is_up_is_an_error(
    supervisor: Supervisor, make_spec: MakeSpec
) -> None:
    supervisor.start(make_spec("deaf"))
    with pytest.raises(ChildError, match="deaf: still runs after SIGTERM"):
        supervisor.stop("deaf")


def test_run_that_is_broken_off_gives_a_child_no_more_than_its_short_grace(
    supervisor: Supervisor, make_spec: MakeSpec
) -> None:
    # With its whole grace this child would outlast the test.
    supervisor.start(replace(make_spec("deaf"), stop_grace_s=600.0, broken_off_grace_s=0.3))
    supervisor.break_off()
    supervisor.stop_all()
    assert [line.split(";")[0] for line in supervisor.unclean()] == ["deaf: ended by SIGKILL"]


def test_condition_that_does_not_come_true_ends_the_wait(supervisor: Supervisor, make_spec: MakeSpec) -> None:
    ticks: list[int] = []
    supervisor.on_tick(lambda: ticks.append(1))
    supervisor.start(make_spec("service"))
    assert not supervisor.wait_until(lambda: False, timeout_s=0.2)
    assert ticks


def test_end_of_a_child_that_may_end_is_no_error(supervisor: Supervisor) -> None:
    argv = (sys.executable, "-c", "")
    supervisor.start(ChildSpec(name="ends", argv=argv, ends_itself=True, ready_timeout_s=None))
    assert supervisor.wait_until(lambda: supervisor.has_ended("ends"), timeout_s=60)
    supervisor.check()
    assert supervisor.unclean() == []


def test_end_of_a_needed_child_is_an_error_until_it_may_end(supervisor: Supervisor) -> None:
    argv = (sys.executable, "-c", "print('bye')")
    supervisor.start(ChildSpec(name="ends", argv=argv, ends_itself=True, ready_timeout_s=None))
    supervisor.need("ends")
    with pytest.raises(ChildError, match="ends: exit code 0 before the stream had ended"):
        supervisor.wait_until(lambda: False, timeout_s=60)
    with pytest.raises(ChildError, match="ends: exit code 0 before"):
        supervisor.let_end("ends")


def test_needed_child_may_end_once_it_is_let(supervisor: Supervisor, make_spec: MakeSpec) -> None:
    argv = (sys.executable, "-c", "import time; time.sleep(0.5)")
    supervisor.start(ChildSpec(name="ends", argv=argv, ends_itself=True, ready_timeout_s=None))
    supervisor.need("ends")
    supervisor.let_end("ends")
    assert supervisor.wait_until(lambda: supervisor.has_ended("ends"), timeout_s=60)
    supervisor.check()


def test_buried_traceback_of_a_worker_is_shown(supervisor: Supervisor) -> None:
    code = "\n".join(
        (
            "import sys",
            "print('[rank0]: Traceback (most recent call last):')",
            "print('[rank0]:   File \"loop.py\", line 3, in step')",
            "print('[rank0]: ValueError: table item is full')",
            "print('launcher words\\n' * 40)",
            "sys.exit(1)",
        )
    )
    supervisor.start(ChildSpec(name="trainer", argv=(sys.executable, "-c", code), ready_timeout_s=None))
    with pytest.raises(ChildError) as raised:
        supervisor.wait_until(lambda: False, timeout_s=60)
    text = str(raised.value)
    assert text.count("[rank0]: ValueError: table item is full") == 1
    assert text.count("launcher words") == 19


def test_end_of_a_service_is_an_error_even_with_exit_code_0(supervisor: Supervisor) -> None:
    supervisor.start(ChildSpec(name="gone", argv=(sys.executable, "-c", ""), ready_timeout_s=None))
    with pytest.raises(ChildError, match=r"gone: exit code 0; its log .* is empty"):
        supervisor.wait_until(lambda: False, timeout_s=60)


def test_signal_ends_a_wait_and_handlers_are_put_back(supervisor: Supervisor) -> None:
    inside = signal.getsignal(signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(InterruptedRun) as raised:
        supervisor.wait_until(lambda: False, timeout_s=60)
    assert raised.value.signal == signal.SIGTERM
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != inside
    assert signal.getsignal(signal.SIGTERM) == inside
