"""DeepFM: a factorisation machine and a deep network on the same embeddings, their logits added.

y = sigmoid(y_FM + y_DNN) (equation 1); y_FM = <w, x> + sum_(i<j) <V_i, V_j> x_i x_j (2); the deep layers are
a_(l+1) = ReLU(W a_l + b) on a_0 = E (3 and 4). E is the whole concatenated embedding, priors included; V_j
x_j is the embedding of feature j, averaged where it has several ids.
Source: Guo et al., IJCAI 2017, arXiv 1703.04247, equations 1 to 4. Two deviations:
- The first-order term <w, x> has a weight of its own for each id. There are no tables of dim 1 here: each
  weight is a linear function of its id's embedding, so <w, x> is a linear layer over E.
- The paper predicts one label: with more tasks, one such network a task stands on the shared embedding. The
  pairwise term has no parameters but the embeddings, so the tasks then share it.

Shapes: B batch, E embedding, F features, D dim of a feature, T tasks.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.gate_nu import xavier_uniform
from trainer.model.layout import FeatureLayout, common_dim, fields_of
from trainer.model.towers import LogitTowers


class DeepFM(nn.Module):
    """Deep layers of config.tower_widths; the logit's bias is the deep network's."""

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        """Raises: ConfigError if the features do not have one dim."""
        super().__init__()
        self.dim = common_dim(layout, needed_by="deepfm: its factorisation machine")
        self.first_order = nn.Linear(layout.width, num_tasks, bias=False)
        # A row is one task's: Xavier's bound is that of a layer with one output.
        xavier_uniform(self.first_order.weight, fan_in=layout.width, fan_out=1)
        self.deep = LogitTowers(num_towers=num_tasks, widths=(layout.width, *config.tower_widths))

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        logits_BT: Tensor = self.first_order(embedding_BE) + self.deep(embedding_BE)
        pairs_B = pairwise_products(fields_of(embedding_BE, dim=self.dim))
        return logits_BT + pairs_B.unsqueeze(1)


def pairwise_products(fields_BFD: Tensor) -> Tensor:
    """sum_(i<j) <v_i, v_j>, float [B]: half of what the square of the sum has over the sum of the squares."""
    squared_BD = fields_BFD.sum(dim=1).square() - fields_BFD.square().sum(dim=1)
    return 0.5 * squared_BD.sum(dim=1)
