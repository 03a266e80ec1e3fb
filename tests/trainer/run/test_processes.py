"""One child: its readiness, its log, its exit, and the end of everything it started."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.errors import ChildError
from trainer.run.processes import Child, ChildSpec, Fact, describe_exit, find_last_error

Start = Callable[..., Child]


@pytest.fixture
def start(child_script: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[Child] = []

    def begin(
        mode: str, *arguments: str | Fact, facts: dict[str, dict[str, str | int]] | None = None
    ) -> Child:
        argv = (sys.executable, str(child_script), mode, mode, str(tmp_path), *arguments)
        spec = ChildSpec(name=mode, argv=argv, stop_grace_s=0.3)
        child = Child.start(spec, logs=tmp_path, ready=tmp_path, facts=facts or {})
        started.append(child)
        return child

    yield begin
    for child in started:
        child.kill()
        child.wait(30)


def test_ready_child_says_where_it_listens(start: Start, wait_for: Callable[..., None]) -> None:
    child = start("service")
    wait_for(lambda: child.ready_facts() is not None)
    assert (child.ready_facts() or {})["address"] == "service.example:1"
    assert child.exit_code() is None


def test_ready_file_of_an_earlier_run_is_not_believed(start: Start, tmp_path: Path) -> None:
    (tmp_path / "never-ready.json").write_text('{"address": "stale:1"}')
    assert start("never-ready").ready_facts() is None


def test_wrong_ready_file_is_an_error(start: Start, wait_for: Callable[..., None]) -> None:
    child = start("wrong-ready-file")

    def is_refused() -> bool:
        try:
            return child.ready_facts() is not None
        except ChildError as error:
            return "ready file" in str(error)

    wait_for(is_refused)


def test_fact_of_another_child_becomes_part_of_the_command(
    start: Start, wait_for: Callable[..., None]
) -> None:
    child = start("service", "--shard", Fact("shard", "address"), facts={"shard": {"address": "here:7"}})
    wait_for(lambda: child.ready_facts() is not None)
    assert str((child.ready_facts() or {})["said"]).startswith("--shard here:7 --ready-file ")


def test_fact_that_nobody_gave_is_an_error(start: Start) -> None:
    with pytest.raises(ChildError, match=r"service: needs 'address' of shard; its ready file gave \['pid'\]"):
        start("service", Fact("shard", "address"), facts={"shard": {"pid": 4}})


def test_exit_code_and_last_lines_are_the_childs_own(start: Start) -> None:
    child = start("dies")
    assert child.wait(60) == 3
    assert child.last_lines()[-2:] == ["line 99", "the disk is full"]
    assert len(child.last_lines(5)) == 5
    assert not child.ended_cleanly()


def test_lines_of_an_earlier_run_are_not_taken_for_its_own(start: Start, tmp_path: Path) -> None:
    (tmp_path / "dies-by-signal.log").write_text("an error of yesterday\n")
    child = start("dies-by-signal")
    assert child.wait(60) == -signal.SIGKILL
    assert child.last_lines() == []
    assert (tmp_path / "dies-by-signal.log").read_text() == "an error of yesterday\n"


def test_end_by_a_signal_is_passed_through(start: Start) -> None:
    child = start("dies-by-signal")
    assert child.wait(60) == -signal.SIGKILL


def test_command_that_does_not_exist_says_so(tmp_path: Path) -> None:
    spec = ChildSpec(name="ghost", argv=("/nowhere/ghost",))
    child = Child.start(spec, logs=tmp_path, ready=tmp_path, facts={})
    assert child.wait(60) == 127
    assert child.last_lines() == ["/nowhere/ghost: cannot be started (No such file or directory)"]


def test_sigterm_lets_the_child_end_by_itself(
    start: Start, wait_for: Callable[..., None], tmp_path: Path
) -> None:
    child = start("service")
    wait_for(lambda: child.ready_facts() is not None)
    child.terminate()
    assert child.wait(60) == 0
    assert (tmp_path / "order").read_text() == "service\n"
    assert child.ended_cleanly()


def test_kill_ends_workers_in_sessions_of_their_own(
    start: Start, wait_for: Callable[..., None], is_running: Callable[[int], bool], tmp_path: Path
) -> None:
    child = start("deaf")
    wait_for(lambda: child.ready_facts() is not None)
    pids = [int((tmp_path / "pids" / name).read_text()) for name in ("deaf", "deaf-worker")]
    child.terminate()
    assert child.wait(0.5) is None
    assert all(is_running(pid) for pid in pids)
    child.kill()
    assert child.wait(60) == -signal.SIGKILL
    assert not any(is_running(pid) for pid in pids)


def test_worker_does_not_outlive_the_child_it_belongs_to(
    start: Start, wait_for: Callable[..., None], is_running: Callable[[int], bool], tmp_path: Path
) -> None:
    child = start("deaf")
    wait_for(lambda: child.ready_facts() is not None)
    own, worker = [int((tmp_path / "pids" / name).read_text()) for name in ("deaf", "deaf-worker")]
    os.kill(own, signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    assert not is_running(worker)


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "ended by SIGKILL"), (-99, "ended by signal 99")],
)
def test_exit_is_described_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text


LAUNCHERS_END = [
    "Traceback (most recent call last):",
    '  File "run.py", line 9, in main',
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    "=====",
]
WORKERS_ERROR = [
    "[rank1]: Traceback (most recent call last):",
    '[rank1]:   File "loop.py", line 3, in step',
    "[rank1]:     raise ValueError(name)",
    "[rank1]: ValueError: item",
]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], []),
        (["all is well"], []),
        (["a", *WORKERS_ERROR, "b", *LAUNCHERS_END], WORKERS_ERROR),
        ([*WORKERS_ERROR, "error: no broker answers", *LAUNCHERS_END], ["error: no broker answers"]),
        (LAUNCHERS_END, []),
        (["x", *WORKERS_ERROR[:2]], WORKERS_ERROR[:2]),
    ],
)
def test_last_error_of_a_log_is_the_workers_not_the_launchers(lines: list[str], found: list[str]) -> None:
    assert find_last_error(lines) == found


def test_long_traceback_is_shown_with_its_first_and_last_lines(tmp_path: Path) -> None:
    code = "def f(n):\n    return f(n - 1) + 1 if n else g(n) + 1\ndef g(n):\n    return 1 / n + f(1)\nf(30)"
    spec = ChildSpec(name="deep", argv=(sys.executable, "-c", code.replace("f(n - 1)", "[f][0](n - 1)")))
    child = Child.start(spec, logs=tmp_path, ready=tmp_path, facts={})
    assert child.wait(60) == 1
    lines = child.last_error(4)
    assert len(lines) == 4
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError: division by zero"
