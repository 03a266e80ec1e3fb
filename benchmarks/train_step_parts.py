"""Where the time of one of Freshet's training steps goes, by clocks around its public parts.

The clock is the processor time of the training thread, which other processes on the machine do not stop.
The sparse update is what backward does after the embeddings' gradient is there: TorchRec's fused optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.report import rounded
from benchmarks.train_step_ours import Ours
from trainer.stream.columns import Impressions

PARTS = (
    "map",
    "embedding_lookup",
    "dense_forward",
    "dense_backward",
    "sparse_update",
    "dense_optimizer",
    "other",
    "step",
)


class _Clocks:
    """Moments of one step, and the seconds spent in calls that were wrapped."""

    def __init__(self) -> None:
        self.moment_s: dict[str, float] = {}
        self.spent_s: dict[str, float] = {}

    def now(self, name: str) -> None:
        self.moment_s[name] = time.thread_time()

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began_s = time.thread_time()
            result = call(*arguments, **named)
            self.now(f"{name}_end")
            self.spent_s[name] = self.spent_s.get(name, 0.0) + time.thread_time() - began_s
            return result

        return timed


def parts_of_a_step(ours: Ours, batches: list[Impressions]) -> dict[str, float]:
    """Milliseconds by part, the median over the batches; `other` is what is left of the step."""
    recommender, clocks = ours.recommender, _Clocks()
    for shard in recommender.shards.values():
        shard.router.map = clocks.around("map", shard.router.map)  # type: ignore[method-assign]
    lookup = clocks.around("embedding_lookup", recommender.embeddings)

    def embeddings(*arguments: Any) -> Tensor:
        embedding_BE: Tensor = lookup(*arguments)
        embedding_BE.register_hook(lambda _: clocks.now("dense_backward_end"))  # type: ignore[no-untyped-call]
        return embedding_BE

    recommender.embeddings = embeddings  # type: ignore[assignment]
    recommender.dense.register_forward_pre_hook(lambda *_: clocks.now("forward_begin"))
    recommender.dense.register_forward_hook(lambda *_: clocks.now("forward_end"))
    optimizer = recommender.dense_optimizer
    optimizer.register_step_pre_hook(lambda *_: clocks.now("optimizer_begin"))
    optimizer.register_step_post_hook(lambda *_: clocks.now("optimizer_end"))
    measured = []
    for batch in batches:
        clocks.spent_s.clear()
        began_s = time.thread_time()
        ours.step(batch)
        step_s = time.thread_time() - began_s
        at, spent = clocks.moment_s, clocks.spent_s
        parts = [
            spent["map"],
            spent["embedding_lookup"],
            at["forward_end"] - at["forward_begin"],
            at["dense_backward_end"] - at["forward_end"],
            at["optimizer_begin"] - at["dense_backward_end"],
            at["optimizer_end"] - at["optimizer_begin"],
        ]
        measured.append([*parts, step_s - sum(parts), step_s])
    medians = np.median(np.array(measured), axis=0)
    return {name: rounded(1e3 * value) for name, value in zip(PARTS, medians, strict=True)}
