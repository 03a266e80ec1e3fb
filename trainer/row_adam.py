"""Adam for the rows of a sharded table, in the lazy form: rows that a step does not touch stay as they are.

fbgemm has no Adam on CPUs. So the table's own fused optimizer is SGD with rate 1, and the touched rows are
zero while it runs: what it leaves in them is the negative gradient, exactly, with everything that the fused
backward does (the exchange between ranks, the sum over ids that occur twice). Backward of a pooled sum does
not read the rows.
Shapes: C local rows, D dim, U distinct rows that a step touches.
Source: torch.optim.SparseAdam (bias correction by the number of steps, not by each row's own).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BETA_FIRST, BETA_SECOND, EPS = 0.9, 0.999, 1e-8
"""Adam's published values, as the dense part has them."""
ROW_BYTES_PER_VALUE = 8
"""Two moments, float32 each."""


class RowAdam:
    """The moments of one table on this rank."""

    def __init__(self, rows_CD: Tensor, *, learning_rate: float) -> None:
        # `.data`: autograd watches the rows themselves, and cannot know that backward does not read them.
        self._rows_CD = rows_CD.data
        self._learning_rate = learning_rate
        self._num_steps = 0
        self.first_CD = torch.zeros_like(rows_CD)
        self.second_CD = torch.zeros_like(rows_CD)

    def take_out(self, slots_U: Tensor) -> Tensor:
        """The rows [U, D], which are zero from now on. Args: slots_U: distinct."""
        rows_UD = self._rows_CD.index_select(0, slots_U)
        self._rows_CD.index_fill_(0, slots_U, 0.0)
        return rows_UD

    def put_back(self, rows_UD: Tensor, *, slots_U: Tensor) -> None:
        """Move the rows that were taken out by the gradients that are now in their places."""
        self._num_steps += 1
        gradient_UD = -self._rows_CD.index_select(0, slots_U)
        first_UD = self.first_CD.index_select(0, slots_U).lerp_(gradient_UD, 1 - BETA_FIRST)
        second_UD = self.second_CD.index_select(0, slots_U).lerp_(gradient_UD**2, 1 - BETA_SECOND)
        self.first_CD.index_copy_(0, slots_U, first_UD)
        self.second_CD.index_copy_(0, slots_U, second_UD)
        root = (1 - BETA_SECOND**self._num_steps) ** 0.5
        rate = self._learning_rate * root / (1 - BETA_FIRST**self._num_steps)
        rows_UD = rows_UD - rate * first_UD / (second_UD.sqrt() + EPS)
        self._rows_CD.index_copy_(0, slots_U, rows_UD)


def step_rows(backward: Callable[[], None], *, adams: dict[str, RowAdam], touched: dict[str, Tensor]) -> None:
    """Run the tables' backward, whose fused optimizer is SGD with rate 1, as a step of Adam.

    Args: touched: table → the distinct local rows [U] that this backward reaches.
    """
    taken = {table: adam.take_out(touched[table]) for table, adam in adams.items()}
    backward()
    for table, adam in adams.items():
        adam.put_back(taken[table], slots_U=touched[table])
