"""Where the time of one of Freshet's training steps goes, by clocks around its public parts.

The clock is the processor time of the thread that does the part, which other processes on the machine do not
stop. `map` is the other thread's; the parts from `embedding_lookup` to `other` are the training thread's and
together its `step`. The dense backward includes the verdict whether the step may be applied; the sparse
update is the tables' own backward, with TorchRec's fused optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.report import rounded
from benchmarks.train_step_ours import Ours
from trainer.stream.columns import Impressions
from trainer.tables import ShardedTables

PARTS = (
    "embedding_lookup",
    "dense_forward",
    "dense_backward",
    "sparse_update",
    "dense_optimizer",
    "changed_rows",
    "metrics",
)


class _Clocks:
    """Seconds by part."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}
        self._began_s = 0.0

    def begin(self) -> None:
        self._began_s = time.thread_time()

    def end(self, name: str) -> None:
        """What ran since the last call of begin or end was this part."""
        now_s = time.thread_time()
        self.spent_s[name] = self.spent_s.get(name, 0.0) + now_s - self._began_s
        self._began_s = now_s

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began_s = time.thread_time()
            result = call(*arguments, **named)
            self.spent_s[name] = self.spent_s.get(name, 0.0) + time.thread_time() - began_s
            return result

        return timed


class _TimedTables:
    """The sharded tables with clocks around what a step does with them."""

    def __init__(self, tables: ShardedTables, clocks: _Clocks) -> None:
        self._clocks = clocks
        self._lookup = clocks.around("embedding_lookup", tables)
        self._tables = tables

    def __call__(self, *arguments: Any) -> Tensor:
        embedding_BE: Tensor = self._lookup(*arguments)
        return embedding_BE

    def apply(self, *arguments: Any, **named: Any) -> None:
        self._clocks.end("dense_backward")
        self._tables.apply(*arguments, **named)
        self._clocks.end("sparse_update")


def parts_of_a_step(ours: Ours, batches: list[Impressions]) -> dict[str, float]:
    """Milliseconds by part, the mean over the batches; `other` is what is left of `step`."""
    recommender, clocks = ours.recommender, _Clocks()
    recommender.map = clocks.around("map", recommender.map)  # type: ignore[method-assign]
    for shard in recommender.shards.values():
        shard.changed.touch = clocks.around(  # type: ignore[method-assign]
            "changed_rows", shard.changed.touch
        )
        shard.changed.evict = clocks.around(  # type: ignore[method-assign]
            "changed_rows", shard.changed.evict
        )
    ours.window.add = clocks.around("metrics", ours.window.add)  # type: ignore[method-assign]
    ours.report = clocks.around("reports", ours.report)  # type: ignore[method-assign]
    recommender.embeddings = _TimedTables(recommender.embeddings, clocks)  # type: ignore[assignment]
    recommender.dense.register_forward_pre_hook(lambda *_: clocks.begin())
    recommender.dense.register_forward_hook(lambda *_: clocks.end("dense_forward"))
    optimizer = recommender.dense_optimizer
    optimizer.register_step_pre_hook(lambda *_: clocks.begin())
    optimizer.register_step_post_hook(lambda *_: clocks.end("dense_optimizer"))
    began_s, began_wall_s = time.thread_time(), time.perf_counter()
    ours.run(batches)
    step_s, wall_s = time.thread_time() - began_s, time.perf_counter() - began_wall_s
    spent_s = {name: clocks.spent_s[name] for name in PARTS}
    # They come by time, so that a few steps may be without.
    spent_s["reports"] = clocks.spent_s.get("reports", 0.0)
    spent_s["other"] = step_s - sum(spent_s.values())
    spent_s |= {"step": step_s, "map": clocks.spent_s["map"], "step_wall": wall_s}
    return {name: rounded(1e3 * value / len(batches)) for name, value in spent_s.items()}
