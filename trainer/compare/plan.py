"""From models and seeds to runs: what each trains on, with which configuration, under which name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from trainer.compare.dataset import DataFacts
from trainer.compare.settings import Settings, as_file_name, base_config, with_room
from trainer.config import Config
from trainer.config.schema import SchemaConfig
from trainer.errors import ConfigError

TRUTH = "true_probabilities"
"""Not a model: the probabilities that the labels were drawn with, which nothing can beat but by chance."""


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table: a model, and what is changed about its configuration."""

    name: str
    model: str
    model_changes: dict[str, Any] = {}
    optimizer_changes: dict[str, Any] = {}
    dim: int | None = None
    """The embedding dim of every feature; None = the preset's."""


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One training from nothing: all tasks and domains, or one task, or one domain."""

    variant: Variant
    seed: int
    task: str | None = None
    domain: str | None = None
    settings: Settings
    data: str
    """The file of columns."""
    facts: DataFacts

    def hash(self) -> str:
        """A short digest of everything that decides the result, but for the data and this program's code."""
        from trainer.model.outside import code_of
        from trainer.model.registry import is_outside

        settings = self.settings
        model = self.variant.model
        meaning = (
            config_of(self).hash(),
            [model, code_of(model)] if is_outside(model) else model,
            self.task,
            self.domain,
            settings.mode,
            settings.epochs,
        )
        return hashlib.sha256(msgspec.json.encode(meaning, order="deterministic")).hexdigest()[:16]

    @property
    def name(self) -> str:
        parts = [self.variant.name, f"seed{self.seed}", self.task, self.domain]
        return "-".join(as_file_name(part) for part in parts if part)


def check_models(names: Sequence[str]) -> None:
    """Raises: ConfigError with the closest names for a model that there is not, or a name given twice."""
    from trainer.model.registry import kind_of

    if not names:
        raise ConfigError("--models: no model is named")
    for name in names:
        try:
            kind_of(name)
        except ConfigError as error:
            raise ConfigError(f"--models: {str(error).removeprefix('model.name: ')}") from error
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"--models: named twice: {', '.join(doubled)}")


def runs_of(
    variant: Variant, *, seed: int, settings: Settings, data: Path, facts: DataFacts
) -> list[RunSpec]:
    """One run, or one for each task or domain, as the model is trained."""
    whole = RunSpec(variant=variant, seed=seed, settings=settings, data=str(data), facts=facts)
    if variant.model == TRUTH:
        return [whole]
    from trainer.model.registry import kind_of

    trained_per = kind_of(variant.model).trained_per
    if trained_per == "task":
        return [replace(whole, task=name) for name in base_config(settings, seed=seed).schema.task_names]
    if trained_per == "domain":
        return [replace(whole, domain=name) for name in facts.domains]
    return [whole]


def config_of(spec: RunSpec) -> Config:
    """The configuration that this run trains with; its hash and the data's digest name the result."""
    config = base_config(spec.settings, seed=spec.seed)
    variant = spec.variant
    schema = replace(_schema_of(config.schema, spec), domains=spec.facts.domains)
    if variant.dim is not None:
        schema = replace(schema, features=tuple(replace(one, dim=variant.dim) for one in schema.features))
    tables = tuple(replace(config.tables[0], dim=dim) for dim in schema.dims)
    name = config.model.name if variant.model == TRUTH else variant.model
    try:
        config = replace(
            config,
            schema=schema,
            tables=tables,
            model=replace(config.model, name=name, **variant.model_changes),
            optimizer=replace(config.optimizer, **variant.optimizer_changes),
        )
    except TypeError as error:
        raise ConfigError(f"variant '{variant.name}': {error}") from error
    return with_room(config, num_keys=spec.facts.num_keys)


def _schema_of(schema: SchemaConfig, spec: RunSpec) -> SchemaConfig:
    if spec.task is None:
        return schema
    tasks = tuple(task for task in schema.tasks if task.name == spec.task)
    return replace(schema, tasks=tasks, positive_task=spec.task)
