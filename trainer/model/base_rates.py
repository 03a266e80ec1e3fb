"""Where a model's answers begin: at the tasks' base rates, not at one half.

Of a task that is positive once in a thousand, the first steps of training otherwise do nothing but lower its
logit by seven, through every weight that reaches it. The log-odds of the base rate as the output's bias spare
them that. Source: the prior of rare classes in arXiv 1708.02002, section 4.1.

Shapes: T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import structlog
import torch
from torch import nn

from trainer.config.schema import TaskConfig
from trainer.errors import ConfigError

log = structlog.get_logger()


def begin_at_base_rates(model: nn.Module, tasks: Sequence[TaskConfig]) -> None:
    """Set every `output_bias` of the model and its parts; T values each, in the order of the tasks.

    A model without one begins at one half, and the log says so.
    Raises: ConfigError if one has another number of values.
    """
    if all(task.base_rate == 0.5 for task in tasks):
        return
    biases = [getattr(part, "output_bias", None) for part in model.modules()]
    found = [bias for bias in biases if isinstance(bias, nn.Parameter)]
    if not found:
        log.warning("the model has no output_bias: base_rate has no effect", model=type(model).__name__)
    log_odds_T = torch.tensor([math.log(task.base_rate / (1 - task.base_rate)) for task in tasks])
    for bias in found:
        if bias.numel() != len(tasks):
            raise ConfigError(
                f"model {type(model).__name__}: expected an output_bias of {len(tasks)} values, one a task, "
                f"found shape {tuple(bias.shape)}"
            )
        with torch.no_grad():
            bias.copy_(log_odds_T.view(bias.shape))
