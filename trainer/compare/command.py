"""`python -m trainer compare`: its options, and the sets of models and seeds that they stand for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from feature_eviction.argument_types import at_least
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.compare.compare import CompareOptions
    from trainer.compare.goals import Aim
    from trainer.compare.plan import Variant
    from trainer.compare.settings import Settings


class Size(NamedTuple):
    seeds: int
    impressions: int
    epochs: int
    """At most, in batch mode."""


DEFAULT = Size(3, 500_000, 3)
FULL = Size(5, 2_000_000, 2)
QUICK = Size(2, 200_000, 2)
QUICK_MODELS = ("shared_bottom", "mmoe", "dcnv2_mt", "pepnet")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser("compare", help="train all models on one stream and print who is better")
    compare.add_argument("--models", help="names with commas between (default: all; see docs/compare.md)")
    size = compare.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few models, two small seeds: five minutes")
    size.add_argument(
        "--full", action="store_true", help="5 seeds of 2 million impressions: the one to quote"
    )
    compare.add_argument("--seeds", type=at_least(1), help="how many, from 1 on (3)")
    compare.add_argument("--impressions", type=at_least(1), help="drawn for each seed")
    compare.add_argument("--ablations", action="store_true", help="PEPNet with one thing changed at a time")
    stream = compare.add_mutually_exclusive_group()
    stream.add_argument("--preset", help="the stream: seesaw (default), one_domain, ...")
    stream.add_argument(
        "--config",
        type=Path,
        help="TOML whose schema, model and stream are compared on, instead of a preset's",
    )
    compare.add_argument("--data", type=Path, help="KuaiRand file or folder instead of the synthetic stream")
    compare.add_argument(
        "--mode",
        choices=("batch", "online"),
        default="batch",
        help="epochs over files, or predict then train (default: %(default)s)",
    )
    compare.add_argument(
        "--epochs",
        type=at_least(1),
        help="batch mode: at most so many (3); the best on the validation day counts",
    )
    compare.add_argument("--min-interactions", type=at_least(1), help="of users and items that are kept (10)")
    compare.add_argument("--batch-size", type=at_least(1), help="for all models (512)")
    compare.add_argument("--dense-lr", type=_rate, help="Adam's, for all models (0.003)")
    compare.add_argument("--embedding-lr", type=_rate, help="AdaGrad's, for all models (0.1)")
    compare.add_argument(
        "--initial-accumulator", type=float, help="AdaGrad's of a new row, for all models (4)"
    )
    compare.add_argument("--workers", type=at_least(1), help="processes at a time (default: the processors)")
    compare.add_argument(
        "--out",
        type=Path,
        default=Path("freshet-compare"),
        help="folder of data, runs and tables (default: %(default)s)",
    )
    compare.set_defaults(command=_compare)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e3:
        raise argparse.ArgumentTypeError(f"expected a rate above 0, found {text}")
    return value


def _compare(options: argparse.Namespace) -> int:
    from trainer.compare.compare import compare

    return compare(options_of(options))


def options_of(options: argparse.Namespace) -> CompareOptions:
    """Raises: ConfigError for options that do not go together, unknown models and unknown presets."""
    from trainer.compare.compare import CompareOptions, in_order

    if options.ablations and options.models:
        raise ConfigError("--ablations has its own variants of pepnet; leave --models away")
    if options.data is not None and options.impressions is not None:
        raise ConfigError("--impressions: a recording is read to its end; cut the file, or leave --data away")
    settings = _settings(options)
    return CompareOptions(
        settings=settings,
        variants=in_order(_variants(options, settings)),
        num_workers=options.workers or os.cpu_count() or 1,
        out_dir=options.out,
        ablations=options.ablations,
        aim=_aim(settings),
    )


def _settings(options: argparse.Namespace) -> Settings:
    from trainer.compare.protocol import Protocol
    from trainer.compare.settings import Settings
    from trainer.config import load_config, preset
    from trainer.data.kuairand import TIME_ZONE_H

    size = FULL if options.full else QUICK if options.quick else DEFAULT
    chosen = {
        "batch_size": options.batch_size,
        "dense_learning_rate": options.dense_lr,
        "embedding_learning_rate": options.embedding_lr,
        "embedding_initial_accumulator": options.initial_accumulator,
    }
    config = None if options.config is None else load_config(options.config)
    name = options.preset or ("kuairand" if options.data is not None else "seesaw")
    # An unknown preset is refused before anything is drawn.
    name = preset(name).preset if config is None else config.preset
    protocol = Protocol(
        interactions_min=options.min_interactions or Protocol().interactions_min,
        time_zone_h=TIME_ZONE_H if options.data is not None else 0,
    )
    try:
        return Settings(
            preset=name,
            config=config,
            data="" if options.data is None else str(options.data),
            mode=options.mode,
            epochs=options.epochs or (1 if options.mode == "online" else size.epochs),
            seeds=options.seeds or size.seeds,
            impressions=options.impressions or size.impressions,
            protocol=protocol,
            **{key: value for key, value in chosen.items() if value is not None},
        )
    except ValueError as error:
        raise ConfigError(f"compare: {error}") from error


def _variants(options: argparse.Namespace, settings: Settings) -> list[Variant]:
    from trainer.compare.ablations import variants
    from trainer.compare.plan import TRUTH, Variant, check_models
    from trainer.compare.settings import base_config
    from trainer.model.registry import MODELS

    if options.ablations:
        return list(variants(base_config(settings, seed=1)))
    names = list(QUICK_MODELS if options.quick else MODELS)
    if options.models:
        names = [name.strip() for name in options.models.split(",") if name.strip()]
    check_models(names)
    return [Variant(name=name, model=name) for name in (*names, TRUTH)]


def _aim(settings: Settings) -> Aim:
    if settings.data:
        return "not_below"
    return "no_win" if settings.preset == "one_domain" else "published_gain"
