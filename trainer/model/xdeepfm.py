"""xDeepFM: a compressed interaction network (CIN), a deep network and a linear part, their logits added.

X^0 are the features' embeddings as rows; row h of X^k is sum_ij W^(k,h)_ij (X^(k-1)_i * X^0_j), an
elementwise product (equation 6); each row is summed over its dims (7), and the sums of all layers, p+, the
last deep layer and E give the logit w_linear . E + w_dnn . x_dnn + w_cin . p+ + b (9). E is the whole
concatenated embedding, priors included.
Source: Lian et al., KDD 2018, arXiv 1803.05170, equations 6 to 9. Two deviations, as in deepfm.py: the linear
part reads embeddings instead of raw one-hot features, since there are no tables of dim 1; and with more
tasks, one such network a task stands on the shared embedding.

Shapes: B batch, E embedding, F features, D dim of a feature, H rows of a layer, T tasks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.gate_nu import xavier_uniform
from trainer.model.layout import FeatureLayout, common_dim, fields_of
from trainer.model.towers import TowerLinear, Towers, logits_of


class CompressedInteraction(nn.Module):
    """The CIN of T networks: their layers' rows, summed over dims."""

    def __init__(self, *, num_networks: int, num_features: int, row_counts: tuple[int, ...]) -> None:
        """Args: row_counts: H of each layer."""
        super().__init__()
        self.num_networks = num_networks
        self.weights = nn.ParameterList()
        for rows_in, rows_out in pairwise((num_features, *row_counts)):
            # The last axis but one counts the pairs (i, j), i the row of the layer before.
            weight_TPH = nn.Parameter(torch.empty(num_networks, rows_in * num_features, rows_out))
            xavier_uniform(weight_TPH, fan_in=rows_in * num_features, fan_out=rows_out)
            self.weights.append(weight_TPH)

    def forward(self, fields_BFD: Tensor) -> Tensor:
        """Returns: p+, float [T, B, sum of H]."""
        num, _, dim = fields_BFD.shape
        # Dims do not meet in a CIN: each (impression, dim) is an example of its own, N of them.
        x0_NF = fields_BFD.transpose(1, 2).reshape(num * dim, -1)
        x_TNH = x0_NF.unsqueeze(0)
        sums = []
        for weight_TPH in self.weights:
            pairs_TNP = (x_TNH.unsqueeze(3) * x0_NF.unsqueeze(1)).flatten(2)
            x_TNH = torch.bmm(pairs_TNP.expand(self.num_networks, -1, -1), weight_TPH)
            sums.append(x_TNH.reshape(-1, num, dim, x_TNH.shape[2]).sum(dim=2))
        return torch.cat(sums, dim=2)


class XDeepFM(nn.Module):
    """config.cin_rows rows a CIN layer, deep layers of config.tower_widths."""

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        """Raises: ConfigError if the features do not have one dim."""
        super().__init__()
        self.dim = common_dim(layout, needed_by="xdeepfm: its interaction network")
        self.linear = nn.Linear(layout.width, num_tasks, bias=False)
        # A row is one task's: Xavier's bound is that of a layer with one output.
        xavier_uniform(self.linear.weight, fan_in=layout.width, fan_out=1)
        self.deep = Towers(num_towers=num_tasks, widths=(layout.width, *config.tower_widths))
        self.cin = CompressedInteraction(
            num_networks=num_tasks, num_features=len(layout.features), row_counts=config.cin_rows
        )
        width = config.tower_widths[-1] + sum(config.cin_rows)
        self.head = TowerLinear(num_towers=num_tasks, width_in=width, width_out=1)

    @property
    def output_bias(self) -> nn.Parameter:
        """Added to the logits, [T, 1, 1]."""
        return self.head.bias_T1O

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        sums_TBH = self.cin(fields_of(embedding_BE, dim=self.dim))
        ends_TBH = torch.cat([self.deep(embedding_BE), sums_TBH], dim=2)
        linear_BT: Tensor = self.linear(embedding_BE)
        return linear_BT + logits_of(self.head(ends_TBH))
