"""EPNet: a domain's view of the shared embedding (PEPNet, equations 5-6). Plugs onto any embedding.

Shapes: B batch, E embedding, D domain prior, F fields.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.gate_nu import GateInput, gated, xavier_uniform


class EPNet(nn.Module):
    """O_ep = GateNU(E(F_d) + stop_gradient(E)) * E, where + concatenates.

    Args:
        domain_width: columns of the domain prior E(F_d).
        field_dims: width of each feature's embedding in E.
        sees_embedding: False drops E from the gate's input, as the paper's early version did.
        seen_gradient: the gate trains the embedding that it sees: no stop_gradient.
        by_field: one gate value a field instead of one an element.
    Source: arXiv 2302.01115, equations 5 and 6.
    """

    def __init__(
        self,
        *,
        domain_width: int,
        field_dims: tuple[int, ...],
        gate_hidden: int,
        gamma: float = 2.0,
        sees_embedding: bool = True,
        seen_gradient: bool = False,
        by_field: bool = False,
    ) -> None:
        super().__init__()
        width = sum(field_dims)
        self.gamma = gamma
        self.by_field = by_field
        self.gate_input = GateInput(
            prior_width=domain_width,
            seen_width=width if sees_embedding else 0,
            width_hidden=gate_hidden,
            seen_gradient=seen_gradient,
        )
        self.gate = nn.Linear(gate_hidden, len(field_dims) if by_field else width)
        xavier_uniform(self.gate.weight, fan_in=self.gate.in_features, fan_out=self.gate.out_features)
        nn.init.zeros_(self.gate.bias)
        field_of_column_E = [field for field, dim in enumerate(field_dims) for _ in range(dim)]
        self.field_of_column_E: Tensor
        self.register_buffer("field_of_column_E", torch.tensor(field_of_column_E), persistent=False)

    def forward(self, domain_BD: Tensor, embedding_BE: Tensor) -> Tensor:
        """Returns: float [B, E], the embedding as this domain sees it."""
        (x_BH,) = self.gate_input(domain_BD, embedding_BE)
        z_BE = self.gate(x_BH)
        if self.by_field:
            z_BE = z_BE.index_select(1, self.field_of_column_E)
        return self.gamma * gated(z_BE, embedding_BE)
