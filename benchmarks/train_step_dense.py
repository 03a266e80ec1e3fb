"""The dense network alone, beside the plain one: forward, loss, backward and Adam on random embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plain_pepnet import PlainPEPNet, copy_weights
from benchmarks.report import in_turns, rounded, say_skipped
from benchmarks.train_step_stream import BATCH, config_for
from trainer.model import PEPNet, multi_task_loss
from trainer.model.compiled import compile_dense, missing_compiler
from trainer.model.layout import FeatureLayout

STEPS_PER_ROUND = 5

Batch = tuple[Tensor, Tensor]
Forward = Callable[[Tensor], Tensor]


def dense_rows(dims: Sequence[int], *, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """float32, bfloat16 and, if wanted, compiled beside the plain network, on one thread."""
    torch.set_num_threads(1)
    return [row for dim in dims for row in _rows_of(dim, rounds=rounds, compiled=compiled)]


def _rows_of(dim: int, *, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    config = config_for(dim=dim, rows=1000, world_size=1, threads=1)
    layout = FeatureLayout.of(config.schema)
    torch.manual_seed(0)
    num_tasks = len(config.schema.tasks)
    plain = PlainPEPNet(layout, num_tasks=num_tasks, config=config.model)
    forms: dict[str, tuple[nn.Module, Forward]] = {"plain": (plain, plain)}
    full, reduced, to_compile = (PEPNet(layout, num_tasks=num_tasks, config=config.model) for _ in range(3))
    copy_weights(full, plain)
    forms |= {"float32": (full, full), "bfloat16": (reduced, partial(_reduced, reduced))}
    if missing := missing_compiler("cpu"):
        say_skipped("compiled", f"it needs {missing}")
    if compiled and not missing:
        forward = compile_dense(to_compile, num_rows=BATCH, width=layout.width, precision=torch.float32)
        forms["compiled"] = (to_compile, lambda embedding_BE: forward(embedding_BE, None))
    cpu_s: dict[str, list[float]] = {name: [] for name in forms}
    acts = {name: _trainer(*form, fused=name != "plain", cpu_s=cpu_s[name]) for name, form in forms.items()}
    generator = torch.Generator().manual_seed(1)
    seconds = in_turns(
        acts,
        lambda: [_batch(layout.width, generator) for _ in range(STEPS_PER_ROUND)],
        rounds=1 + rounds,
        limit_s=120.0,
    )
    # The first round warms caches and makes the optimizers' state.
    rates = {
        name: float(np.median(BATCH * STEPS_PER_ROUND / taken_RC[1:].sum(axis=1)))
        for name, taken_RC in seconds.items()
    }
    cpu = {name: float(np.median(taken[STEPS_PER_ROUND:])) for name, taken in cpu_s.items()}
    return [
        {
            "case": f"dense_{name}",
            "setup": "1x1",
            "dim": dim,
            "peer": "plain",
            "ours": rounded(rate),
            "theirs": rounded(rates["plain"]),
            "ratio": rounded(rate / rates["plain"]),
            "ratio_cpu": rounded(cpu["plain"] / cpu[name]),
        }
        for name, rate in rates.items()
        if name != "plain"
    ]


def _reduced(model: nn.Module, embedding_BE: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits_BT: Tensor = model(embedding_BE)
    return logits_BT.float()


def _batch(width: int, generator: torch.Generator) -> Batch:
    embedding_BE = 0.3 * torch.randn(BATCH, width, generator=generator)
    # New labels each time: a batch that is learned by heart ends in denormal gradients, which are slow.
    return embedding_BE, (torch.rand(BATCH, 6, generator=generator) < 0.3).float()


def _trainer(
    model: nn.Module, forward: Forward, *, fused: bool, cpu_s: list[float]
) -> Callable[[Batch], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused or None)
    known_BT, weight_T = torch.ones(BATCH, 6), torch.ones(6)

    def step(batch: Batch) -> None:
        began_s = time.process_time()
        leaf_BE = batch[0].clone().requires_grad_(True)
        logits_BT = forward(leaf_BE)
        loss = multi_task_loss(logits_BT, labels_BT=batch[1], known_BT=known_BT, weight_T=weight_T)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        cpu_s.append(time.process_time() - began_s)

    return step
