"""How long Freshet's training stands still for versions and checkpoints, and what else a save takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks.report import rounded
from benchmarks.train_step_ours import Ours
from benchmarks.train_step_stream import Stream

CHECKPOINT_EVERY_S = 60.0
CHECKPOINTS = 4
BATCHES_AT_ONCE = 5
VERSIONS = 5
VERSION_STEPS = 8
"""About as many as there are in half a second, the default interval of publishing."""


class _Seconds(NamedTuple):
    wall_s: float
    cpu_s: float
    """Of all threads of this rank."""


def _timed(act: Callable[[], object]) -> _Seconds:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    act()
    return _Seconds(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def checkpoint_facts(ours: Ours, *, stream: Stream, num_steps: int) -> dict[str, float]:
    """Medians over some checkpoints; the first stands apart, since it takes its buffers from the system.

    `stall`: how long training stands still. `save`: from there until it is durable, beside training.
    `lost`: the stall, and what the steps beside the save took longer than num_steps without one. The shares
    are what a checkpoint a minute takes of training's wall clock, and what it adds to its processor time.
    """
    batches = stream.batches(num_steps)
    steps = _timed(partial(ours.run, batches))
    step = _Seconds(steps.wall_s / num_steps, steps.cpu_s / num_steps)
    measured = np.array([_one(ours, stream=stream, step=step) for _ in range(CHECKPOINTS)])
    stall_s, save_s, lost_s, lost_cpu_s = np.median(measured[1:], axis=0)
    cpu_of_training_s = CHECKPOINT_EVERY_S * step.cpu_s / step.wall_s
    return {
        "checkpoint_stall_ms": rounded(1e3 * stall_s),
        "checkpoint_first_stall_ms": rounded(1e3 * float(measured[0, 0])),
        "checkpoint_save_ms": rounded(1e3 * save_s),
        "checkpoint_lost_ms": rounded(1e3 * lost_s),
        "checkpoint_share": max(0.0, float(lost_s)) / CHECKPOINT_EVERY_S,
        "checkpoint_share_cpu": max(0.0, float(lost_cpu_s)) / cpu_of_training_s,
    }


def version_stall_ms(ours: Ours, *, stream: Stream) -> float:
    """Median over some versions of VERSION_STEPS steps each: the taking and copying of what changed."""
    stalls_s = []
    for _ in range(VERSIONS):
        stalls_s.append(_timed(ours.begin_turn).wall_s)
        ours.run(stream.batches(VERSION_STEPS))
        ours.end_turn()
    # The first had more to take.
    return rounded(1e3 * float(np.median(stalls_s[1:])))


def _one(ours: Ours, *, stream: Stream, step: _Seconds) -> tuple[float, float, float, float]:
    """(stall, save, lost, lost of processor time)."""
    began_s, saved_before = time.perf_counter(), ours.committed
    stall = _timed(ours.begin_checkpoint)
    lost_s, lost_cpu_s = stall
    while ours.saving:
        batches = stream.batches(BATCHES_AT_ONCE)
        steps = _timed(partial(ours.run, batches))
        lost_s += steps.wall_s - BATCHES_AT_ONCE * step.wall_s
        lost_cpu_s += steps.cpu_s - BATCHES_AT_ONCE * step.cpu_s
    if ours.committed is saved_before:
        raise RuntimeError("a checkpoint was not saved: the figures would not hold its cost")
    return stall.wall_s, time.perf_counter() - began_s, lost_s, lost_cpu_s
