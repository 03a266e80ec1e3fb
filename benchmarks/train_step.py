"""Impressions a second of Freshet's training step with everything on, beside training without it.

python -m benchmarks.train_step [--quick] [--dims N ...] [--setups RxT ...] [--contestants NAME ...]

A setup RxT is R ranks of T threads. The contestants of a setup do the same kind of batches in turns, in one
process a rank; a rate is the median over turns. Each of Freshet's turns is one publishing interval with one
version to a real shard process, and what a checkpoint a minute costs is taken off its rate. A rank of Freshet
maps ids in one more thread, beside its T. `ratio` is ours over theirs, in speed; `ratio_cpu` the same by
processor time of all threads, which other processes on a busy machine disturb less. A NAME is one of those
below; in the output Freshet's are the cases `step`, `step_always` and `step_compiled`.

ours               Freshet; an id of the 19 large classes gets a row when it is seen a second time
ours_always        Freshet, every id gets a row at first sight
ours_compiled      as ours, with the dense network compiled
static             TorchRec, ids modulo the rows, PEPNet and Adam as one writes them: the bound
static_same_dense  the same with Freshet's dense network and optimizer: what the id table and the rest cost
mch_POLICY_N       TorchRec's managed collision (lfu, dlfu) evicting every N batches (1, 10), before the plain
                   dense network
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import rounded, say, say_json, say_skipped, say_table
from benchmarks.train_step_dense import dense_rows
from trainer.model.compiled import missing_compiler

OURS = {"ours": "step", "ours_always": "step_always", "ours_compiled": "step_compiled"}
PEERS = ("static", "static_same_dense", "mch_lfu_1", "mch_lfu_10", "mch_dlfu_1", "mch_dlfu_10")
SETUPS = ("1x1", "1x2", "2x1")
DIMS = (16, 40)
ROWS = 1_000_000
START_LIMIT_S = 60.0


def why_absent(name: str, *, ranks: int) -> str | None:
    if name == "ours_compiled" and (missing := missing_compiler("cpu")):
        return f"it needs {missing}"
    if name.startswith("mch") and ranks > 1:
        return "over ranks it fails at its first eviction: fbgemm::reset_weight_momentum has no CPU kernel"
    return None


@contextmanager
def shard_process(directory: Path, name: str) -> Iterator[None]:
    """A parameter server in a process of its own; its address goes into `NAME.address`."""
    ready = directory / f"{name}.ready"
    command = [sys.executable, "-m", "param_server", "shard", "--log-dir", str(directory / f"{name}.log")]
    with (directory / f"{name}.shard.txt").open("wb") as output:
        process = subprocess.Popen([*command, "--ready-file", str(ready)], stdout=output, stderr=output)
        try:
            deadline_s = time.monotonic() + START_LIMIT_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(f"the shard process of '{name}' did not start: see {output.name}")
                time.sleep(0.05)
            (directory / f"{name}.address").write_text(json.loads(ready.read_text())["address"])
            yield
        finally:
            process.terminate()
            process.wait()


def measure(
    setup: str, dim: int, names: list[str], options: argparse.Namespace, *, rates_only: bool = False
) -> dict[str, Any]:
    """Start the ranks of one setup; what rank 0 says."""
    ranks, threads = (int(part) for part in setup.split("x"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    work = ["-m", "benchmarks.train_step_rank", "--dim", str(dim), "--threads", str(threads)]
    effort = ["--rows", str(options.rows), "--rounds", str(options.rounds), "--turn-s", str(options.turn_s)]
    effort += ["--warm-steps", str(5 if options.quick else 20)]
    if rates_only:
        effort += ["--rates-only"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        with ExitStack() as shards:
            for name in names:
                if name in OURS:
                    shards.enter_context(shard_process(directory, name))
            finished = subprocess.run(
                [*launch, *work, *effort, "--directory", folder, "--contestants", *names],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
    if finished.returncode:
        raise RuntimeError(f"{setup}, dim {dim}: a rank failed\n{finished.stderr[-4000:]}")
    facts: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return facts


def rows_of(setup: str, dim: int, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every form of ours beside every peer."""
    medians, cpu = (
        {name: float(np.median(rates)) for name, rates in facts[which].items()}
        for which in ("rates", "cpu_rates")
    )
    training, training_cpu = 1.0 - facts["checkpoint_share"], 1.0 / (1.0 + facts["checkpoint_share_cpu"])
    return [
        {
            "case": OURS[ours],
            "setup": setup,
            "dim": dim,
            "peer": peer,
            "ours": rounded(training * medians[ours]),
            "theirs": rounded(medians[peer]),
            "ratio": rounded(training * medians[ours] / medians[peer]),
            "ratio_cpu": rounded(training_cpu * cpu[ours] / cpu[peer]),
        }
        for ours in medians
        if ours in OURS
        for peer in medians
        if peer not in OURS
    ]


def scaling(dim: int, options: argparse.Namespace) -> dict[str, float]:
    """Two ranks over one, in turns of a process each; by the wall clock and by processor time.

    `cores_of_one`: how many cores one rank keeps busy. Its mapping thread counts, so that two ranks on two
    cores cannot gain more than 2 / cores_of_one.
    """
    rates: dict[str, list[tuple[float, float]]] = {"1x1": [], "2x1": []}
    for turn in range(options.scaling_rounds):
        for setup in ("1x1", "2x1") if turn % 2 == 0 else ("2x1", "1x1"):
            facts = measure(setup, dim, ["ours"], options, rates_only=True)
            rates[setup].append(
                (float(np.median(facts["rates"]["ours"])), float(np.median(facts["cpu_rates"]["ours"])))
            )
    one, one_cpu = (float(rate) for rate in np.median(np.array(rates["1x1"]), axis=0))
    two, two_cpu = (float(rate) for rate in np.median(np.array(rates["2x1"]), axis=0))
    return {
        "dim": dim,
        "one": rounded(one),
        "two": rounded(two),
        "ratio": rounded(two / one),
        # A rank's impressions a second of its own processor time: two ranks on cores of their own.
        "ratio_cpu": rounded(2 * two_cpu / one_cpu),
        "cores_of_one": rounded(one / one_cpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1x1, dim 16, short turns: a minute or two")
    parser.add_argument("--dims", type=int, nargs="+")
    parser.add_argument("--setups", nargs="*", choices=SETUPS, help="none: only --scaling-rounds")
    parser.add_argument("--contestants", nargs="+", choices=(*OURS, *PEERS))
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of the table (default {ROWS})")
    parser.add_argument("--rounds", type=int, help="turns of each contestant (default 4, quick 2)")
    parser.add_argument("--turn-s", type=float, help="a publishing interval (default 10, quick 2)")
    parser.add_argument(
        "--scaling-rounds", type=int, help="pairs of runs of two ranks and one (default 3, quick 0)"
    )
    options = parser.parse_args()
    # A benchmark that is told to stop ends its processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.rounds = options.rounds or (2 if options.quick else 4)
    options.turn_s = options.turn_s or (2.0 if options.quick else 10.0)
    if options.scaling_rounds is None:
        options.scaling_rounds = 0 if options.quick else 3
    setups = options.setups
    if setups is None:
        setups = SETUPS[:1] if options.quick else SETUPS
    dims = options.dims or (DIMS[:1] if options.quick else DIMS)
    wanted = options.contestants or (["ours", *PEERS] if options.quick else [*OURS, *PEERS])
    say(f"impressions a second, batch 1024, {options.rows:,} rows; ratio = ours / theirs")
    columns = ("case", "setup", "dim", "peer", "ours", "theirs", "ratio", "ratio_cpu")
    rows = []
    if setups:
        rows = dense_rows(dims, rounds=4 * options.rounds, compiled="ours_compiled" in wanted)
        say_table(rows, columns)
    by_setup = []
    for setup in setups:
        for dim in dims:
            absent = {name: why_absent(name, ranks=int(setup.split("x")[0])) for name in wanted}
            for name, why in absent.items():
                if why:
                    say_skipped(f"{name} at {setup}", why)
            facts = measure(setup, dim, [name for name in wanted if not absent[name]], options)
            new_rows = rows_of(setup, dim, facts)
            say_table(new_rows, columns)
            say(json.dumps({name: value for name, value in facts.items() if "rates" not in name}))
            rows += new_rows
            by_setup.append({"setup": setup, "dim": dim, **facts})
    scalings = [scaling(dim, options) for dim in dims if options.scaling_rounds]
    for one in scalings:
        say(json.dumps(one))
    say_json("train_step", rows=rows, facts={"two_ranks_over_one": scalings, "setups": by_setup})


if __name__ == "__main__":
    main()
