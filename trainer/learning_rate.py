"""Warm-up of the dense learning rate: what share of it a step takes.

Only the dense part's: Adam's first estimates, or old ones on a stream that has moved on, make its steps too
large, and all impressions share the dense weights. A row has its own AdaGrad state, which a resume brings
back; and a row that is new needs its full rate at any time.
"""

from __future__ import annotations

from trainer.config.config import TrainConfig


class WarmUp:
    """The share of each step follows from its number alone, so a resumed run repeats it."""

    def __init__(self, train: TrainConfig, *, resumed_at: int | None) -> None:
        """Args: resumed_at: the step of the checkpoint that training goes on from; None = it begins."""
        self._num_steps = train.warm_up_steps
        begins = {"start": 0, "resume": resumed_at, "both": resumed_at or 0}
        self._begin = begins[train.warm_up]

    def share(self, step: int) -> float:
        """Args: step: steps that were taken before this one, since the model's beginning.

        Returns: in (0, 1]: 1/n, 2/n, ... and 1 from step n on, where n is train.warm_up_steps.
        """
        if self._begin is None or not self._num_steps:
            return 1.0
        return min(1.0, (step - self._begin + 1) / self._num_steps)
