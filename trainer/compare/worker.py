"""A worker process: run after run, asked for on stdin and answered on stdout, one JSON a line.

It is started by trainer.compare.pool. Importing PyTorch and TorchRec takes longer than a small run, so a
worker lives for many of them; each run makes its model and tables anew.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch

from feature_eviction import FeatureEvictionError
from trainer.collectives import Ranks, start_ranks
from trainer.compare.dataset import Dataset, load
from trainer.compare.plan import RunSpec
from trainer.compare.run import RunResult, run
from trainer.errors import FreshetError

PROGRESS_EVERY = 8_192
"""Impressions between two reports."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says. Exactly one of the three is set."""

    trained: int | None = None
    """Impressions since the last message."""
    result: RunResult | None = None
    error: str | None = None
    """Why the run was refused or stopped; the worker goes on."""


class _Reporter:
    def __init__(self, out: BinaryIO) -> None:
        self._out, self._trained = out, 0

    def say(self, message: Message) -> None:
        self._out.write(msgspec.json.encode(message) + b"\n")
        self._out.flush()

    def trained(self, num: int) -> None:
        self._trained += num
        if self._trained >= PROGRESS_EVERY:
            self.say(Message(trained=self._trained))
            self._trained = 0


def serve(lines: BinaryIO, out: BinaryIO, *, ranks: Ranks) -> None:
    """Answer every line until there is none."""
    reporter = _Reporter(out)
    loaded: tuple[str, Dataset] | None = None
    for line in lines:
        spec = msgspec.json.decode(line, type=RunSpec)
        try:
            if loaded is None or loaded[0] != spec.data:
                loaded = spec.data, load(Path(spec.data))
            result = run(spec, loaded[1], ranks=ranks, progress=reporter.trained)
        except (FreshetError, FeatureEvictionError, ValueError) as error:
            reporter.say(Message(error=f"{spec.name}: {error}"))
            continue
        reporter.say(Message(result=result))


def main() -> None:
    # What libraries print must not come between the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    serve(sys.stdin.buffer, out, ranks=start_ranks())


if __name__ == "__main__":
    main()
