"""What is remembered of a run: growing files read line by line, and histories that stay bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from param_server.client import ReplicaState, UnavailableError, Version
from trainer.run import status
from trainer.run.freshness import FreshnessJoin
from trainer.run.observe import LineTail, Observer, Thinned, state_of
from trainer.run.run_directory import RunDirectory, open_run_directory
from trainer.run.status import TrainerStatus, VersionTrace, append_trace, traces_before, write_status


class Says:
    """Answers `status` with what it was given, or as a replica that is not there."""

    def __init__(self, state: ReplicaState | None) -> None:
        self.state = state

    def status(self) -> ReplicaState:
        if self.state is None:
            raise UnavailableError("replica 127.0.0.1:1: unavailable")
        return self.state


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    with open_run_directory(tmp_path / "run", resume=False) as opened:
        yield opened


def test_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "versions.jsonl"
    tail = LineTail(path)
    assert tail.read() == []
    with path.open("ab") as file:
        file.write(b"one\ntw")
        file.flush()
        assert tail.read() == [b"one"]
        file.write(b"o\nthree\n")
        file.flush()
        assert tail.read() == [b"two", b"three"]
        assert tail.read() == []


def test_a_file_that_begins_anew_is_read_to_its_end_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traces: list[VersionTrace]
) -> None:
    monkeypatch.setattr(status, "TRACE_BYTES_MAX", 1_000)
    path = tmp_path / "versions.jsonl"
    tail = LineTail(path)
    found = []
    for number in range(40):
        append_trace(path, msgspec.structs.replace(traces[0], sequence=number))
        if number % 3 == 0:
            found += tail.read()
    found += tail.read()
    assert [msgspec.json.decode(line, type=VersionTrace).sequence for line in found] == list(range(40))
    assert path.stat().st_size < 1_000 <= traces_before(path).stat().st_size < 1_300


def test_lines_of_an_earlier_run_are_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "versions.jsonl"
    path.write_bytes(b"old\n")
    tail = LineTail(path)
    with path.open("ab") as file:
        file.write(b"new\n")
    assert tail.read() == [b"new"]


@given(st.integers(0, 3000), st.integers(2, 40))
def test_thinned_history_is_bounded_even_and_ends_with_the_newest(count: int, max_items: int) -> None:
    thinned: Thinned[int] = Thinned(max_items)
    for number in range(count):
        thinned.append(number)
    items = thinned.items()
    assert len(items) <= max_items
    assert items == sorted(set(items))
    if count:
        assert (items[0], items[-1]) == (0, count - 1)
        gaps = {later - earlier for earlier, later in pairwise(items[:-1])}
        assert len(gaps) <= 1


def test_look_joins_files_and_replicas(
    directory: RunDirectory,
    trainer_status: TrainerStatus,
    replica_state: ReplicaState,
    traces: list[VersionTrace],
) -> None:
    observer = Observer(directory, FreshnessJoin(["replica-0", "replica-1"], steady_from_ms=0))
    write_status(directory.trainer_status, trainer_status)
    directory.versions.write_bytes(b"".join(msgspec.json.encode(trace) + b"\n" for trace in traces))
    applied = ((Version(1, 1), 1_200), (Version(1, 3), 3_300))
    links = {"replica-0": Says(replace(replica_state, applied=applied)), "replica-1": Says(None)}
    found = observer.look(2.5, links)
    assert found.trainer == trainer_status
    assert found.producer is None
    assert list(found.replicas) == ["replica-0"]
    assert found.replicas["replica-0"].version == Version(1, 7)
    assert found.replicas["replica-0"].applied == ()
    # version 1: 300 x3, 700 x1; 2 and 3 become visible at 3300: 1400 x3, 1800 x1 and 400 x3, 800 x1
    assert (found.freshness_p50_ms, found.freshness_p99_ms) == (400, 1_800)
    assert [trace.sequence for trace in observer.full_versions.items()] == [1]
    assert [trace.sequence for trace in observer.delta_versions.items()] == [2, 3]
    assert observer.history.items() == [found] == [observer.latest]
    trainer_status.tables[0].bytes = 1
    write_status(directory.trainer_status, trainer_status)
    observer.look(3.5, links)
    assert observer.table_bytes_peak == {"dim16": 900, "dim32": 100}


def test_replica_that_does_not_answer_is_no_error() -> None:
    assert state_of(Says(None)) is None


def test_look_at_a_run_that_has_said_nothing_yet(directory: RunDirectory) -> None:
    found = Observer(directory, FreshnessJoin([], steady_from_ms=0)).look(0.0, {})
    assert (found.trainer, found.producer, found.freshness_p50_ms) == (None, None, None)
