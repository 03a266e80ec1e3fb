"""From a changed row to an answer: versions through real processes, predict while they switch, whole runs.

python -m benchmarks.freshness [--quick] [--parts version predict run] [--versions N] [--rows N]

version  100,000 rows x 40 of a table go to a shard process and two replica processes, over and over.
         `visible` is from the beginning of the take to the later replica's switch. take, encode, append
         (published and durable) and commit are timed by the writer; prepare and switch in this process, on
         the same version, after the clock stopped; stream is what is left.
predict  a client in a process of its own asks one replica at a fixed pace, in turns: nothing is published
         (quiet), versions are published and the replica is pinned (the shard's and the writer's work, no
         switch), and it follows them (switching). Times count from when a request was due.
run      `python -m trainer run`: event to visible, from its summary.json, at 2,000 impressions a second, at
         four fifths of what it can train, and with a producer that is faster than it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.freshness_writer import TimedReplica, Writer
from benchmarks.processes import listening
from benchmarks.report import rounded, say_json, say_table
from param_server.client import ParamServerClient, ReplicaClient, Version
from trainer.collectives import Ranks, start_ranks

PHASES = ("take", "encode", "append", "commit", "stream", "prepare", "switch")
PARTS = ("version", "predict", "run")
KINDS = ("quiet", "pinned", "switching")
GOALS = {"predict_p999_ms": 2.0, "event_to_visible_p99_ms": 1_000.0}
VISIBLE_LIMIT_S = 60.0
PREDICT_ROWS = 20_000
PREDICT_EVERY_S = 0.5
PREDICT_BATCH = 20
PREDICT_RATE = 100.0


@contextmanager
def serving(num_replicas: int) -> Iterator[tuple[str, list[str]]]:
    """A shard process and its replicas; their addresses."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        directory = Path(folder)
        log = ("--log-dir", str(directory / "log"))
        shard = stack.enter_context(listening(directory, "shard", "shard", *log))
        replicas = [
            stack.enter_context(listening(directory, name, "replica", "--shard", shard, "--name", name))
            for name in (f"replica-{number}" for number in range(num_replicas))
        ]
        yield shard, replicas


def visible_ms(replica: ReplicaClient, version: Version) -> int:
    """When a replica switched to a version, unix milliseconds; waits for it."""
    deadline_s = time.monotonic() + VISIBLE_LIMIT_S
    while time.monotonic() < deadline_s:
        for applied, at_ms in reversed(replica.status().applied):
            if applied == version:
                return at_ms
        time.sleep(0.02)
    raise RuntimeError(f"version {version} is not visible after {VISIBLE_LIMIT_S} s")


def measure_versions(
    *, table_rows: int, num_rows: int, versions: int, ranks: Ranks
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Versions one after the other: a row for each phase, and the totals."""
    taken: dict[str, list[float]] = {name: [] for name in ("visible", *PHASES)}
    writer, timed = Writer(rows=table_rows, ranks=ranks), TimedReplica()
    with serving(2) as (shard, addresses), ExitStack() as stack:
        client = stack.enter_context(ParamServerClient(shard, timeout_s=60))
        replicas = [stack.enter_context(ReplicaClient(address)) for address in addresses]
        num_bytes = 0
        for number in range(-2, versions):
            # The first is everything, the second warms up; neither counts.
            sent = writer.open(client) if number == -2 else writer.change_and_send(client, num_rows=num_rows)
            last_ms = max(visible_ms(replica, sent.version) for replica in replicas)
            phases = sent.phases_ms | timed.load(sent.received)
            if number < 0:
                continue
            num_bytes = sent.num_bytes
            visible = last_ms - sent.taken_ms
            phases["stream"] = max(0.0, last_ms - sent.committed_ms - phases["prepare"] - phases["switch"])
            for name, value in (phases | {"visible": visible}).items():
                taken[name].append(value)
    rows = [
        {
            "case": "version",
            "phase": name,
            "p50_ms": rounded(float(np.percentile(values, 50))),
            "p99_ms": rounded(float(np.percentile(values, 99))),
        }
        for name, values in taken.items()
    ]
    return rows, {"versions": versions, "rows": num_rows, "bytes": num_bytes, "table_rows": table_rows}


class Predicting:
    """The client's process."""

    def __init__(self, address: str, *, table_rows: int) -> None:
        command = [sys.executable, "-m", "benchmarks.freshness_predict", address, "--rows", str(table_rows)]
        pace = ["--batch", str(PREDICT_BATCH), "--rate", str(PREDICT_RATE)]
        self._process = subprocess.Popen(
            [*command, *pace], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, seconds: float) -> list[float]:
        """Milliseconds of each request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the predicting client ended; its error is above")
        taken_ms: list[float] = json.loads(line)
        return taken_ms

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def measure_predict(
    *, table_rows: int, rounds: int, turn_s: float, ranks: Ranks
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Turns of each kind at one replica: a row for each kind, and the differences."""
    taken: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    switched = 0
    writer = Writer(rows=table_rows, ranks=ranks)
    with serving(1) as (shard, (address,)), ExitStack() as stack:
        client = stack.enter_context(ParamServerClient(shard, timeout_s=60))
        replica = stack.enter_context(ReplicaClient(address))
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=1))
        visible_ms(replica, writer.open(client).version)
        predicting = Predicting(address, table_rows=table_rows)
        stack.callback(predicting.close)
        predicting.ask(1.0)
        for turn in range(rounds):
            for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:
                newest = replica.status().version
                assert newest is not None
                if kind == "pinned":
                    replica.pin(newest)
                asking = pool.submit(predicting.ask, turn_s)
                sent = None
                while kind != "quiet" and not asking.done():
                    due_s = time.monotonic() + PREDICT_EVERY_S
                    sent = writer.change_and_send(client, num_rows=PREDICT_ROWS)
                    switched += kind == "switching"
                    time.sleep(max(0.0, due_s - time.monotonic()))
                taken[kind].append(asking.result())
                if kind == "pinned":
                    replica.unpin()
                if sent is not None:
                    visible_ms(replica, sent.version)
    return predict_rows(taken), predict_facts(taken, switched=switched)


def predict_rows(taken: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """Percentiles of all requests of a kind, and the median over its turns of a turn's p99.9."""
    rows = []
    for kind, turns in taken.items():
        p50, p99, p999 = np.percentile(np.concatenate(turns), (50, 99, 99.9))
        row = {"case": "predict", "phase": kind, "requests": sum(map(len, turns))}
        row |= {"p50_ms": rounded(p50), "p99_ms": rounded(p99), "p999_ms": rounded(p999)}
        rows.append(row | {"p999_of_turns_ms": rounded(float(np.median(_p999_of_turns(turns))))})
    return rows


def predict_facts(taken: dict[str, list[list[float]]], *, switched: int) -> dict[str, Any]:
    """How much later the slowest answers come: the median over the rounds of the difference of two turns."""
    slow = {kind: np.array(_p999_of_turns(turns)) for kind, turns in taken.items()}
    return {
        "versions_switched": switched,
        "p999_of_turns_ms": {kind: values.round(3).tolist() for kind, values in slow.items()},
        "p999_more_than_quiet_ms": rounded(float(np.median(slow["switching"] - slow["quiet"]))),
        "p999_more_than_pinned_ms": rounded(float(np.median(slow["switching"] - slow["pinned"]))),
    }


def _p999_of_turns(turns: list[list[float]]) -> list[float]:
    return [float(np.percentile(turn, 99.9)) for turn in turns]


def measure_runs(*, seconds: float) -> list[dict[str, Any]]:
    """The whole path as `make run` starts it, at three paces."""
    rows = [run_once("paced", rate=2_000, impressions=int(2_000 * seconds))]
    full = run_once("faster_than_it", rate=1_000_000, impressions=int(4_000 * seconds))
    capacity = max(1, int(full["samples_per_s"]))
    rows.append(run_once("four_fifths", rate=4 * capacity // 5, impressions=int(0.8 * capacity * seconds)))
    return [*rows, full]


def run_once(name: str, *, rate: int, impressions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainer", "run", "--no-live", "--out", f"{folder}/run"]
        size = ["--rate", str(rate), "--impressions", str(impressions)]
        finished = subprocess.run(
            [*command, *size], capture_output=True, text=True, check=False, env=os.environ.copy()
        )
        if finished.returncode:
            raise RuntimeError(f"run '{name}' failed\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    steady = summary["freshness_steady_ms"]
    return {
        "case": "run",
        "phase": name,
        "rate": rate,
        "impressions": summary["impressions_trained"],
        "samples_per_s": summary["samples_per_s"],
        "p50_ms": steady["p50"],
        "p99_ms": steady["p99"],
        "whole_p99_ms": summary["freshness_ms"]["p99"],
        "versions": summary["versions"]["published"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few versions, short turns, a short run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--versions", type=int, help="default 40, quick 5")
    parser.add_argument("--rows", type=int, help="of a version (default 100,000, quick 10,000)")
    parser.add_argument("--rounds", type=int, help="turns of each kind (default 6, quick 1)")
    parser.add_argument("--turn-s", type=float, help="default 10, quick 2")
    parser.add_argument("--run-s", type=float, help="produce for so long (default 40, quick 8)")
    options = parser.parse_args()
    quick = options.quick
    num_rows = options.rows or (10_000 if quick else 100_000)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"goals": GOALS}
    ranks = start_ranks()
    if "version" in options.parts:
        measured, facts["version"] = measure_versions(
            table_rows=4 * num_rows,
            num_rows=num_rows,
            versions=options.versions or (5 if quick else 40),
            ranks=ranks,
        )
        say_table(measured, ("case", "phase", "p50_ms", "p99_ms"))
        rows += measured
    if "predict" in options.parts:
        measured, facts["predict"] = measure_predict(
            table_rows=4 * PREDICT_ROWS,
            rounds=options.rounds or (1 if quick else 6),
            turn_s=options.turn_s or (2.0 if quick else 10.0),
            ranks=ranks,
        )
        say_table(measured, ("case", "phase", "requests", "p50_ms", "p99_ms", "p999_ms", "p999_of_turns_ms"))
        rows += measured
    if "run" in options.parts:
        measured = measure_runs(seconds=options.run_s or (8.0 if quick else 40.0))
        say_table(measured, ("case", "phase", "rate", "samples_per_s", "p50_ms", "p99_ms", "whole_p99_ms"))
        rows += measured
    say_json("freshness", rows=rows, facts=facts)


if __name__ == "__main__":
    main()
