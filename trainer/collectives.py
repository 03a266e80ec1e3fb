"""What ranks tell each other: small numbers, bytes, and rows of int64, over gloo.

Shapes: R ranks, N values. Every call is collective: all ranks make it, in the same order.
"""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.errors import ConfigError


class Ranks:
    """The process group of a run; one rank is the same code with nobody to talk to."""

    def __init__(
        self, device: torch.device, *, timeout: timedelta, group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device
        """Where this rank's tables and dense model live."""
        self._timeout = timeout
        self._group = group

    def for_another_thread(self) -> Ranks:
        """The same ranks over connections of their own: two threads may not share one order of calls.

        Collective.
        """
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=self._timeout)
        return Ranks(self.device, timeout=self._timeout, group=group)

    def gather(self, values_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Everybody's values int64 [R, N], by rank."""
        mine_N = torch.from_numpy(np.array(values_N, np.int64))
        if self.world_size == 1:
            return mine_N.numpy()[np.newaxis]
        every_R = [torch.empty_like(mine_N) for _ in range(self.world_size)]
        dist.all_gather(every_R, mine_N, group=self._group)
        return torch.stack(every_R).numpy()

    def sum(self, values_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        tensor_N = torch.from_numpy(np.array(values_N, np.int64))
        if self.world_size > 1:
            dist.all_reduce(tensor_N, op=dist.ReduceOp.SUM, group=self._group)
        return tensor_N.numpy()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Everybody's bytes, by rank. (all_gather_object would pickle.)"""
        if self.world_size == 1:
            return [data]
        lengths_R = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths_R, torch.tensor([len(data)], dtype=torch.int64), group=self._group)
        longest = max(int(length) for length in lengths_R)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        parts_R = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts_R, padded, group=self._group)
        return [
            part[: int(length)].numpy().tobytes() for part, length in zip(parts_R, lengths_R, strict=True)
        ]

    def exchange_counts(self, counts_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tell rank r counts_R[r]; learn what each rank tells this one."""
        if self.world_size == 1:
            return counts_R
        received_R = torch.zeros(self.world_size, dtype=torch.int64)
        dist.all_to_all_single(received_R, torch.from_numpy(counts_R), group=self._group)
        return received_R.numpy()

    def exchange(
        self,
        values_N: npt.NDArray[np.int64],
        *,
        send_R: npt.NDArray[np.int64],
        receive_R: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Send the first send_R[0] values to rank 0, the next to rank 1, ...; receive in rank order."""
        if self.world_size == 1:
            return values_N
        received = torch.empty(int(receive_R.sum()), dtype=torch.int64)
        dist.all_to_all_single(
            received,
            torch.from_numpy(np.ascontiguousarray(values_N)),
            receive_R.tolist(),
            send_R.tolist(),
            group=self._group,
        )
        return received.numpy()

    def sum_gradients(self, parameters: list[torch.nn.Parameter], *, also_F: torch.Tensor) -> torch.Tensor:
        """Add up the dense gradients of all ranks in one message, and some further numbers with them.

        Args: also_F: float32 [F] of this rank. Returns: the sum of all ranks' also_F.
        """
        if self.world_size == 1:
            return also_F
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([also_F, *(grad.reshape(-1) for grad in grads)])
        dist.all_reduce(flat)
        start = len(also_F)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = flat[start : start + grad.numel()].view_as(grad)
            start += grad.numel()
        return flat[: len(also_F)]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def _quieten_torchrec() -> None:
    """TorchRec 1.8 calls what torch 2.13 announces to rename: nobody who trains can do anything about it."""
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def check_device(device: str) -> None:
    """Raises: ConfigError if a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.device is 'cuda', and PyTorch sees no GPU; use 'cpu', or install the GPU build "
            "(make env DEVICE=cuda)"
        )


def start_ranks(device: str = "cpu", *, timeout_s: int = 120) -> Ranks:
    """Join the process group that torchrun describes, or make a group of one.

    Args: timeout_s: a rank that does not hear from another for so long, while joining or later, fails.
    Ids and decisions travel over gloo on any device; what lies on GPUs travels over NCCL. A plain start
    needs no address: its one-rank store lives in this process.
    Raises: ConfigError as check_device does.
    """
    check_device(device)
    _quieten_torchrec()
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo"
    here = torch.device("cpu")
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    if "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        attempt = PrefixStore(f"attempt-{_attempt()}", store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=timeout)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return Ranks(here, timeout=timeout)


def _attempt() -> str:
    """Keeps the ranks of one attempt to themselves.

    torchrun 2.13 gives restarted ranks the store in which the dead ones left their addresses, without a mark
    of the attempt: half of all restarts then waited for ranks that are gone. Its count of restarts is the
    same for all ranks of one node; over several nodes it may differ, and
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment gives each attempt a store of its own.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return "over-nodes"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
