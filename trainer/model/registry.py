"""The models by name: what `model.name` may be, and how each is built.

A registered name, or `module:Class` of a model outside this package (docs/add_a_model.md). Every model takes
the concatenated embedding E and, where its class says `uses_domain = True`, the index of each impression's
domain; it returns one logit a task. Rows of the tables, the loss and the optimizers are the same for all.

Shapes: B batch, E width of the concatenated embedding, T tasks.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from torch import nn

from trainer.config.config import Config, ModelConfig
from trainer.config.schema import DOMAIN_SOURCE
from trainer.errors import ConfigError
from trainer.model.base_rates import begin_at_base_rates
from trainer.model.dcn import DCN
from trainer.model.dcnv2 import DCNv2, DCNv2MultiTask
from trainer.model.deepfm import DeepFM
from trainer.model.layout import FeatureLayout
from trainer.model.mmoe import MMoE
from trainer.model.outside import build_outside, import_builder
from trainer.model.pepnet import PEPNet
from trainer.model.pepnet_halves import EPNetAlone, PEPNetMMoE, PPNetAlone
from trainer.model.ple import PLE, PLEMultiDomain
from trainer.model.shared_bottom import SharedBottom
from trainer.model.shared_top import SharedTop
from trainer.model.specific_all import SpecificAll
from trainer.model.specific_top import SpecificTop
from trainer.model.xdeepfm import XDeepFM

TrainedPer = Literal["all", "task", "domain"]


class BuildModel(Protocol):
    """A model's class, or a function that returns a model."""

    def __call__(
        self, layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig
    ) -> nn.Module: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKind:
    """One model that `model.name` may name.

    What it builds has forward(embedding_BE, domain_B) -> logits_BT: float32 [B, E]; int64 [B], an index into
    the schema's domains, or None where the class does not say `uses_domain = True`; float32 [B, T].
    """

    build: BuildModel
    source: str
    """The paper and its equations."""
    trained_per: TrainedPer = "all"
    """What a comparison gives a training run of its own, tables included: nothing (one run for all), each
    task, or each domain."""


def _for_any_domains(model: type[nn.Module], **options: Any) -> BuildModel:
    """The builder of a model that needs no number of domains."""

    def build(layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig) -> nn.Module:
        return model(layout, num_tasks=num_tasks, config=config, **options)

    return build


_PEPNET = "PEPNet, arXiv 2302.01115"
_MMOE = "MMoE, doi 10.1145/3219819.3220007, equations 6 to 8"
_PLE = "PLE, doi 10.1145/3383313.3412236, sections 4.1 and 4.2"

MODELS: dict[str, ModelKind] = {
    "pepnet": ModelKind(build=_for_any_domains(PEPNet), source=f"{_PEPNET}, equations 2 to 9"),
    "epnet": ModelKind(build=_for_any_domains(EPNetAlone), source=f"{_PEPNET}, equations 2 to 6"),
    "ppnet": ModelKind(build=_for_any_domains(PPNetAlone), source=f"{_PEPNET}, equations 2, 3, 7 to 9"),
    "pepnet_mmoe": ModelKind(
        build=_for_any_domains(PEPNetMMoE), source=f"{_PEPNET}, equations 2 to 9, on {_MMOE}"
    ),
    "epnet_mmoe": ModelKind(
        build=_for_any_domains(EPNetAlone, mmoe=True), source=f"{_PEPNET}, equations 2 to 6, on {_MMOE}"
    ),
    "ppnet_mmoe": ModelKind(
        build=_for_any_domains(PPNetAlone, mmoe=True),
        source=f"{_PEPNET}, equations 2, 3, 7 to 9, on {_MMOE}",
    ),
    "deepfm": ModelKind(
        build=DeepFM, trained_per="task", source="DeepFM, arXiv 1703.04247, equations 1 to 4"
    ),
    "dcn": ModelKind(build=DCN, trained_per="task", source="DCN, arXiv 1708.05123, equations 2 to 5"),
    "xdeepfm": ModelKind(
        build=XDeepFM, trained_per="task", source="xDeepFM, arXiv 1803.05170, equations 6 to 9"
    ),
    "dcnv2": ModelKind(build=DCNv2, trained_per="task", source="DCNv2, arXiv 2008.13535, equations 1 to 3"),
    "dcnv2_mt": ModelKind(build=DCNv2MultiTask, source="DCNv2, arXiv 2008.13535, equations 1 to 3"),
    "shared_bottom": ModelKind(
        build=SharedBottom,
        source="Caruana, doi 10.1023/A:1007379606734; MMoE, doi 10.1145/3219819.3220007, equation 1",
    ),
    "mmoe": ModelKind(build=MMoE, source=_MMOE),
    "ple": ModelKind(build=PLE, source=_PLE),
    "ple_md": ModelKind(build=PLEMultiDomain, source=f"{_PLE}; {_PEPNET}, section 4.1"),
    "shared_top": ModelKind(build=SharedTop, source=f"{_PEPNET}, section 4.1"),
    "specific_top": ModelKind(build=SpecificTop, source=f"{_PEPNET}, section 4.1"),
    "specific_all": ModelKind(build=SpecificAll, trained_per="domain", source=f"{_PEPNET}, section 4.1"),
}


def is_outside(name: str) -> bool:
    """Whether `model.name` names a class outside this package."""
    return ":" in name


def kind_of(name: str) -> ModelKind:
    """Raises: ConfigError with the closest names if there is no such model, or if a class is not found."""
    if is_outside(name):
        return ModelKind(build=import_builder(name), source=name)
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(name.lower(), MODELS, n=3, cutoff=0.4)
    hint = f"the closest are {', '.join(close)}" if close else f"there are {', '.join(sorted(MODELS))}"
    raise ConfigError(
        f"model.name: unknown model '{name}'; {hint}. A model of your own is named 'module:Class'."
    )


def build_model(layout: FeatureLayout, *, num_tasks: int, num_domains: int, config: ModelConfig) -> nn.Module:
    """The dense model that `config.name` names, its weights drawn from torch's generator.

    Raises: ConfigError if there is no such model, if the features do not give it what it needs, or if a model
        from outside is not what training asks for.
    """
    kind = kind_of(config.name)
    if config.options and not is_outside(config.name):
        raise ConfigError(
            f"model.options: '{next(iter(config.options))}' is for a model of your own; "
            f"'{config.name}' does not read it"
        )
    build = partial(kind.build, layout, num_tasks=num_tasks, num_domains=num_domains, config=config)
    if is_outside(config.name):
        return build_outside(build, name=config.name, embedding_width=layout.width, num_tasks=num_tasks)
    return build()


def model_of(config: Config) -> nn.Module:
    """The dense model of a whole configuration, which begins at the tasks' base rates.

    Raises: ConfigError as build_model and begin_at_base_rates do.
    """
    model = build_model(
        FeatureLayout.of(config.schema),
        num_tasks=len(config.schema.tasks),
        num_domains=len(config.schema.domains),
        config=config.model,
    )
    begin_at_base_rates(model, config.schema.tasks)
    return model


def uses_domain(model: nn.Module) -> bool:
    """Whether the model must be told each impression's domain."""
    return bool(getattr(model, "uses_domain", False))


def check_can_be_served(model: nn.Module, *, config: Config) -> None:
    """Raises: ConfigError for a model that uses the domain where no request will bring it."""
    if uses_domain(model) and DOMAIN_SOURCE not in [one.name for one in config.schema.features]:
        raise ConfigError(
            f"model '{config.model.name}' uses the domain's index, and the schema has no feature "
            f"'{DOMAIN_SOURCE}', so no request to a replica would bring it. Add that feature, choose another "
            "model, or train with `python -m trainer train` and serving.shard_address = '', which publishes "
            "nothing."
        )
