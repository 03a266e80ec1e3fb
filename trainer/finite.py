"""Whether a step may be applied: its loss, its logits and all gradients are finite, on every rank.

One number says it, since a sum or a norm over something that is not finite is not finite either. It travels
in the message that adds up the dense gradients, so the ranks agree without asking each other again.
Shapes: B rows, T tasks, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def own_health(loss: Tensor, *, logits_BT: Tensor, gradient_BE: Tensor) -> Tensor:
    """Finite if this rank's part is, but for the dense gradients; float32 [1].

    A gradient is judged by its norm, as optimizers square it: 1e20 counts as not finite, since AdaGrad and
    Adam would remember it as infinity.
    """
    health: Tensor = loss.detach() + logits_BT.detach().sum() + gradient_BE.norm()
    return health.reshape(1)


def dense_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of all dense gradients together."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def what_is_not_finite(loss: Tensor, *, logits_BT: Tensor, gradient_BE: Tensor) -> str:
    """For the operator, once a step was skipped: the first thing that went wrong in this rank's part."""
    if not torch.isfinite(logits_BT.detach()).all():
        return "logits"
    if not torch.isfinite(loss.detach()):
        return "loss"
    if not torch.isfinite(gradient_BE.norm()):
        return "gradient of the embeddings"
    return "gradient of the dense model, or another rank's part"
