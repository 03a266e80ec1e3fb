"""The dense model through torch.compile, where the machine has what that needs; else as it is.

A compiler fuses the elementwise passes that lie between the products. It takes some tens of seconds at a
start, and a compiler of C++ (for GPUs: Triton), which images for production often lack: off by default.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec

import structlog
import torch
from torch import Tensor, nn

log = structlog.get_logger()

Forward = Callable[[Tensor, Tensor | None], Tensor]


def compile_dense(dense: nn.Module, *, num_rows: int, width: int, precision: torch.dtype) -> Forward:
    """The model's forward for training, compiled by a first pass over zeros, forward and backward.

    Args: num_rows, width: of the embeddings that every step brings. precision: what the products run in.
    Returns: the forward of float32 [B, E] and None; the model itself where there is no compiler, which is
    logged.
    """
    device = next(dense.parameters()).device
    missing = missing_compiler(device.type)
    if missing is None and getattr(dense, "uses_domain", False):
        # It cuts the batch by domain: other shapes in every step, and what is compiled has one.
        missing = "a model that does not use the domain"
    if missing:
        log.warning("model.compile is on and has no effect", missing=missing, instead="PyTorch as it is")
        return dense
    started_s = time.monotonic()
    compiled: Forward = torch.compile(dense, dynamic=False)
    embedding_BE = torch.zeros(num_rows, width, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        logits_BT = compiled(embedding_BE, None)
    logits_BT.sum().backward()  # type: ignore[no-untyped-call]
    dense.zero_grad(set_to_none=True)
    log.info("dense model compiled", seconds=round(time.monotonic() - started_s, 1))
    return compiled


def missing_compiler(device: str) -> str | None:
    """What torch.compile would need on this device and does not find, in words."""
    if device == "cuda":
        return None if find_spec("triton") else "the package 'triton'"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"a C++ compiler ('{compiler}'; set CXX to another one)"
