"""Real workers: a run whose worker is killed fails, and every other one is done."""

from __future__ import annotations

import os
import signal
import sys

import psutil
import pytest
from msgspec.structs import replace

from trainer.compare.pool import Event, run_all
from trainer.compare.run import code_digest


def _worker() -> int:
    (child,) = [one for one in psutil.Process().children() if "trainer.compare.worker" in one.cmdline()]
    return child.pid


@pytest.mark.slow
def test_a_killed_worker_costs_its_run_only(make_specs, settings):
    """The first run is long and is killed in the middle; the second needs a new worker."""
    (long,) = make_specs("shared_bottom", settings=replace(settings, epochs=200))
    (short,) = make_specs("shared_bottom")
    heard: list[Event] = []
    killed = []

    def hear(event: Event) -> None:
        heard.append(event)
        if event.spec == long and event.message.trained and not killed:
            killed.append(_worker())
            os.kill(killed[0], signal.SIGKILL)

    run_all([long, short], num_workers=1, hear=hear)
    assert len(killed) == 1
    failures = [event for event in heard if event.message.error is not None]
    assert [event.spec for event in failures] == [long]
    assert f"{long.name}: the worker ended with code -9" in failures[0].message.error
    (result,) = [event.message.result for event in heard if event.message.result is not None]
    assert (result.name, result.run_hash, result.code) == (short.name, short.hash(), code_digest())
    assert not [one for one in psutil.Process().children() if "trainer.compare.worker" in one.cmdline()]


@pytest.mark.slow
def test_a_run_that_is_refused_leaves_its_worker_at_work(make_specs):
    """The same worker answers with an error, then with a result."""
    (good,) = make_specs("shared_bottom")
    bad = replace(good, data="/nowhere/columns.safetensors")
    heard: list[Event] = []
    workers = []

    def hear(event: Event) -> None:
        heard.append(event)
        workers.append(_worker())

    run_all([bad, good], num_workers=1, hear=hear)
    assert "the columns cannot be read" in (heard[0].message.error or "")
    assert heard[-1].message.result is not None
    assert len(set(workers)) == 1


def test_an_answer_that_cannot_be_read_fails_its_run_only(make_specs, monkeypatch, tmp_path):
    """The program in the worker's place says what no worker does, and would go on for a minute."""
    program = tmp_path / "worker"
    program.write_text('#!/bin/sh\nread spec\necho \'{"trained": "much"}\'\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (first,), (second,) = make_specs("shared_bottom"), make_specs("mmoe")
    heard: list[Event] = []
    run_all([first, second], num_workers=1, hear=heard.append)
    assert [event.spec for event in heard] == [first, second]
    for event in heard:
        assert (event.message.error or "").startswith(f"{event.spec.name}: unreadable answer: Expected `int")


def test_no_runs_are_no_work():
    run_all([], num_workers=2, hear=lambda _: pytest.fail("nothing to hear"))
