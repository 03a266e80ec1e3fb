"""DCNv2: a cross network of full matrices, a deep network on what it gives. One a task, or one cross for all.

x_0 = E, the whole concatenated embedding, priors included; cross layers (equation 1), then on x_L the deep
layers h_(l+1) = ReLU(W h_l + b) (2) and the logit (3): the paper's stacked structure.
Source: Wang et al., WWW 2021, arXiv 2008.13535, equations 1 to 3. The paper predicts one label: with more
tasks, DCNv2 is one such network a task on the shared embedding. DCNv2-MT, a multi-task baseline of PEPNet
(arXiv 2302.01115, section 4.1), has one cross network that all tasks share and a deep network a task on it.

Shapes: B batch, E embedding, T tasks.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.config.config import ModelConfig
from trainer.model.cross import MatrixCross
from trainer.model.layout import FeatureLayout
from trainer.model.towers import LogitTowers


class _Stacked(nn.Module):
    """Cross networks below, a deep network a task above."""

    def __init__(self, layout: FeatureLayout, *, num_cross: int, num_tasks: int, config: ModelConfig) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.cross = MatrixCross(num_networks=num_cross, width=layout.width, num_layers=config.cross_layers)
        self.deep = LogitTowers(num_towers=num_tasks, widths=(layout.width, *config.tower_widths))

    def forward(self, embedding_BE: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Returns: logits, float [B, T]."""
        logits_BT: Tensor = self.deep(self.cross(embedding_BE).expand(self.num_tasks, -1, -1))
        return logits_BT


class DCNv2(_Stacked):
    """config.cross_layers cross layers below deep layers of config.tower_widths, in a network a task."""

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        super().__init__(layout, num_cross=num_tasks, num_tasks=num_tasks, config=config)


class DCNv2MultiTask(_Stacked):
    """The same with one cross network for all tasks."""

    def __init__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> None:
        super().__init__(layout, num_cross=1, num_tasks=num_tasks, config=config)
