"""L2 regularisation of the dense model, as the optimizer's weight decay.

l2 / 2 * sum of w^2 over all weights, added to the loss of each impression, has the gradient l2 * w. The loss
of a batch is a sum over its impressions, hence l2 * batch_size * w for a batch. The optimizer adds it after
the gradients of all ranks are summed: once, however many ranks there are. A batch that is not full is
regularised as a full one.

Weights are all parameters but biases, whose names begin with `bias`.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, *, l2: float, batch_size: int) -> list[dict[str, Any]]:
    """The model's parameters as a torch optimizer takes them. One group without regularisation.

    Args: l2: as in ModelConfig. batch_size: impressions of one step over all ranks together.
    """
    if not l2:
        return [{"params": list(model.parameters())}]
    weights: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (biases if is_bias(name) else weights).append(parameter)
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": l2 * batch_size}]
    return [*groups, {"params": biases}] if biases else groups


def is_bias(name: str) -> bool:
    """Args: name: of a parameter, as in named_parameters()."""
    return name.rpartition(".")[2].startswith("bias")
