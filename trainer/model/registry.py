"""The models by name: what `model.name` may be, and how each is built.

A registered name, or `module:Class` of a model outside this package (docs/add_a_model.md). Every model takes
the concatenated embedding E and, where it says so by `uses_domain = True`, the index of each impression's
domain; it returns one logit a task. Sparse rows, the loss and the optimizers are the same for all of them.

Shapes: B batch, E width of the concatenated embedding, T tasks.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from trainer.config.config import ModelConfig
from trainer.errors import ConfigError
from trainer.model.layout import FeatureLayout
from trainer.model.pepnet import PEPNet

TrainedPer = Literal["all", "task", "domain"]


class BuildModel(Protocol):
    """A model's class, or a function that returns a model."""

    def __call__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> nn.Module: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKind:
    """One model that `model.name` may name.

    Its module has forward(embedding_BE, domain_B): float32 [B, E] and, where its class says
    `uses_domain = True`, int64 [B], else None; and returns float32 logits [B, T].
    """

    build: BuildModel
    trained_per: TrainedPer = "all"
    """What a comparison gives a training run of its own, tables included: nothing (one run for all), each
    task, or each domain."""
    source: str
    """The paper and its equations."""


def _pepnet(layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig) -> nn.Module:
    return PEPNet(layout, num_tasks=num_tasks, config=config)


MODELS: dict[str, ModelKind] = {
    "pepnet": ModelKind(build=_pepnet, source="PEPNet, arXiv 2302.01115, equations 2 to 9"),
}


def kind_of(name: str) -> ModelKind:
    """Raises: ConfigError with the closest names if there is no such model."""
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4)
    hint = f"the closest names are {', '.join(close)}" if close else f"there are {', '.join(sorted(MODELS))}"
    raise ConfigError(
        f"model.name: unknown model '{name}'; {hint}. A model outside this package is named 'module:Class'."
    )


def build_model(layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig) -> nn.Module:
    """The dense model that `config.name` names, its weights drawn from torch's generator.

    Raises: ConfigError if there is no such model, or if the features do not give it what it needs.
    """
    kind = kind_of(config.name)
    return kind.build(layout, num_tasks=num_tasks, num_domains=num_domains, config=config)


def uses_domain(model: nn.Module) -> bool:
    """Whether the model must be told each impression's domain; such a model cannot be served yet."""
    return bool(getattr(model, "uses_domain", False))
