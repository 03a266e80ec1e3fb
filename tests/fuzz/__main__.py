"""python -m tests.fuzz TARGET --runs N: hunt with atheris where it is installed, else with seeded mutations.

python -m tests.fuzz corpus: write the committed corpus anew.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import INPUT_BYTES_MAX, hunt

DECODERS = [
    "proto.tensor_blob",
    "proto.row_segment",
    "proto.row_formats",
    "param_server",
    "tests.fuzz.targets",
]
"""What atheris watches; watching numpy and numba as well would cost most of its speed."""


def main() -> int:
    atheris: Any = None
    if importlib.util.find_spec("atheris") is not None:
        atheris = importlib.import_module("atheris")
    watched = atheris.instrument_imports(include=DECODERS) if atheris else contextlib.nullcontext()
    with watched:
        seeds = importlib.import_module("tests.fuzz.seeds")
        targets = importlib.import_module("tests.fuzz.targets").TARGETS
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=(*targets, "all", "corpus"), nargs="?", default="all")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.target == "corpus":
        seeds.write_corpus()
        return 0
    if options.target != "all" and atheris is not None:
        folder = seeds.CORPUS / options.target
        with_atheris(atheris, targets[options.target], folder, runs=options.runs, seed=options.seed)
        return 0
    num_findings = 0
    for name in targets if options.target == "all" else (options.target,):
        accepted, findings = hunt(targets[name], seeds.corpus(name), seed=options.seed, runs=options.runs)
        sys.stdout.write(f"{name}: {options.runs} runs, {accepted} accepted, {len(findings)} findings\n")
        for data, error in findings:
            sys.stdout.write(f"  {type(error).__name__}: {error}\n  {data.hex()}\n")
        num_findings += len(findings)
    return 1 if num_findings else 0


def with_atheris(atheris: Any, target: Any, folder: Path, *, runs: int, seed: int) -> None:
    """Coverage-guided; the process ends in it, with another code than 0 after a finding."""

    def fuzz_one(data: bytes) -> None:
        target(data)

    with tempfile.TemporaryDirectory(prefix="freshet-fuzz-") as grown:
        arguments = [
            sys.argv[0],
            f"-runs={runs}",
            f"-seed={seed + 1}",
            f"-max_len={INPUT_BYTES_MAX}",
            "-print_final_stats=1",
            f"-artifact_prefix={Path.cwd()}/",
            grown,  # new inputs go here and not into the committed corpus
            str(folder),
        ]
        atheris.Setup(arguments, fuzz_one)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
